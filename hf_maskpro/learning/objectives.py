"""What is minimised: the language-model loss, the divergence from the dense model, or a weighted sum of both."""

import json
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import ModelOutput

from ..tuner import evaluating, unmasked


OBJECTIVES = ("language-modeling", "distillation")

# Tokens whose logits are there at a time.
SPAN = 128


def objective_weights(objective: str | dict[str, float] | None) -> dict[str, float]:
    """
    What an objective adds up.

    Args:
        objective (`str` or `dict[str, float]`, *optional*): `"language-modeling"`, which is the default,
            `"distillation"`, or the weight of each, also as JSON.

    Raises:
        `ValueError`: if it names another, or has no positive weight.
    """
    found: Any = objective or "language-modeling"
    try:
        if isinstance(found, str) and found.startswith("{"):
            found = json.loads(found)
        if found in OBJECTIVES:
            return {found: 1.0}
        # One weight alone would say nothing.
        if set(found) == set(OBJECTIVES) and all(0 < weight < float("inf") for weight in found.values()):
            return found
    except (TypeError, ValueError, AttributeError):
        pass
    names = ", ".join(map(repr, OBJECTIVES))
    raise ValueError(f"objective is {objective!r}; use {names}, or a positive weight for each of them.")


def share_of_loss(
    trainer: Trainer, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """The micro-batch's share of the loss of the whole batch: shares add up to it. A scalar without a graph."""
    loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch).detach()
    # Such a loss is a sum over the number of items already.
    if trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None):
        return loss
    return loss / trainer.current_gradient_accumulation_steps


def ranks_of_loss(trainer: Trainer) -> int:
    """What a sum over this process's tokens is multiplied by before it is divided by the number of items."""
    # Ranks' losses are averaged, and the items are those of all.
    return trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Summed negative log-likelihood of every sequence.

    Args:
        logits (`torch.Tensor`): `[sequences, tokens, vocabulary]`, of any floating dtype.
        labels (`torch.Tensor`): int64 `[sequences, tokens]`, -100 where a token does not count.

    Returns:
        `torch.Tensor`: float32 `[sequences]`.
    """
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").sum(1)


class LossBySpans:
    """
    The negative log-likelihood of the next token and KL(dense || masked) of it, each by its weight. The dense model is
    the same one without its adapters. The head and what follows it run over [`SPAN`] tokens at a time, forward and
    backward at once, so that no more logits than theirs are ever in memory.

    Args:
        model (`torch.nn.Module`): A causal language model with adapters.
        weights (`dict[str, float]`): From [`objective_weights`]; without `"distillation"` the dense model is not run.
        temperature (`float`): Of both distributions; the divergence is multiplied by its square.

    Raises:
        `ValueError`: if the model has no head over a decoder of its own, or trains that head.
    """

    def __init__(self, model: nn.Module, weights: dict[str, float], temperature: float):
        self._weights, self._temperature = weights, temperature
        self._causal: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
        head: nn.Module | None = None
        if isinstance(self._causal, PreTrainedModel) and not self._causal.config.is_encoder_decoder:
            head = self._causal.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"objective='distillation' needs a causal language model, not {type(self._causal).__name__}; "
                "use objective='language-modeling'."
            )
        if any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError(
                "objective='distillation' trains no head; leave it out of modules_to_save and target_modules."
            )
        # What gives the head its states, once a batch has shown which module that is.
        self._backbone: Any = None
        # What it gave last: the head is run on states in its form.
        self._output: Any = None
        # The dense model's states of the last batch, whose tensors these are, in these versions.
        self._batch: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._dense = torch.empty(0)

    def sequence_losses(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Args:
            model (`torch.nn.Module`): The model as the trainer wraps it.
            inputs (`dict`): A batch with `labels`, int64 `[sequences, tokens]`, -100 where a token does not count.

        Returns:
            `torch.Tensor`: Summed loss of every sequence, float32 `[sequences]`.
        """
        if "labels" not in inputs:
            raise ValueError(f"a batch has no labels, only {', '.join(inputs)}; add them, as a copy of input_ids.")
        labels = inputs["labels"]
        counts = labels[:, 1:] != -100
        if self._backbone is None:
            with self._as_dense():
                backbone = self._feeds_head(model, inputs)
            self._check_nothing_else_learns(backbone)
            self._backbone = backbone
        if "distillation" in self._weights:
            self._know_dense(model, inputs, counts)
        states, targets = self._states(model, inputs)[:, :-1][counts], labels[:, 1:][counts]

        def losses_of(some: torch.Tensor, start: int) -> torch.Tensor:
            here = slice(start, start + len(some))
            return self._token_losses(some, targets[here], here)

        losses = _SpanBySpan.apply(states, losses_of)
        self._output = None
        return losses.new_zeros(len(labels)).index_add(0, counts.nonzero()[:, 0], losses)

    def _token_losses(self, states: torch.Tensor, targets: torch.Tensor, here: slice) -> torch.Tensor:
        logits = self._logits(states)
        losses = logits.new_zeros(len(targets))
        if (weight := self._weights.get("language-modeling")) is not None:
            losses = losses + weight * F.cross_entropy(logits, targets, reduction="none")
        if (weight := self._weights.get("distillation")) is not None:
            with torch.no_grad():
                wanted = (self._logits(self._dense[here]) / self._temperature).log_softmax(-1)
            found = (logits / self._temperature).log_softmax(-1)
            divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
            losses = losses + weight * self._temperature**2 * divergence
        return losses

    @contextmanager
    def _as_dense(self) -> Iterator[None]:
        with torch.no_grad(), evaluating(self._causal), unmasked(self._causal):
            yield

    def _know_dense(self, model: nn.Module, inputs: dict[str, Any], counts: torch.Tensor) -> None:
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        versions = [tensor._version for tensor in tensors]
        known = len(tensors) == len(self._batch) and all(map(operator.is_, tensors, self._batch))
        if not known or versions != self._versions:
            with self._as_dense():
                self._dense = self._states(model, inputs)[:, :-1][counts]
            self._batch, self._versions = tensors, versions

    def _feeds_head(self, model: nn.Module, inputs: dict[str, Any]) -> nn.Module:
        """The module whose output the model itself takes to its head: of those that run, the outermost."""
        ran: list[nn.Module] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            ran.append(module)
            if isinstance(output, ModelOutput):
                # As in [`_states`], the head is spared what is not looked at.
                output.last_hidden_state = output.last_hidden_state[:, :1]

        handles = [
            module.register_forward_hook(note)
            for module in {self._causal.base_model, self._causal.get_decoder()} - {self._causal}
        ]
        try:
            self._run(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not ran:
            raise ValueError(
                f"objective='distillation' does not find the decoder of {type(self._causal).__name__}; "
                "use objective='language-modeling'."
            )
        return ran[-1]

    def _check_nothing_else_learns(self, backbone: nn.Module) -> None:
        """A span's graph goes from the backbone's states to its loss, and what comes between would not be moved."""
        inside = set(backbone.parameters())
        for name, parameter in self._causal.named_parameters():
            if parameter.requires_grad and parameter not in inside:
                raise ValueError(
                    f"objective='distillation' trains the decoder alone, and {name} is not in it; exclude that layer "
                    "by exclude_modules, or use objective='language-modeling'."
                )

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        known = {name: value for name, value in inputs.items() if name != "labels"}
        model(**known | {"use_cache": False, "return_dict": True})

    def _states(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """What the backbone hands to the head, `[sequences, tokens, hidden]`."""
        states = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states.append(output.last_hidden_state)
            # The head is to come; it is spared all but one token.
            output.last_hidden_state = output.last_hidden_state[:, :1]
            if "router_logits" in output:
                # A loss of the router's is none of a token's.
                output.router_logits = None
            self._output = output

        handle = self._backbone.register_forward_hook(keep)
        try:
            self._run(model, inputs)
        finally:
            handle.remove()
        return states[0]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """The model's own head, and whatever it does to the logits, over `[tokens, hidden]`; at least float32."""
        self._output.last_hidden_state = states.unsqueeze(0)
        before = vars(self._backbone).get("forward")
        self._backbone.forward = lambda *args, **kwargs: self._output
        try:
            logits = self._causal(use_cache=False, return_dict=True).logits[0]
        finally:
            del self._backbone.forward
            # Where something else has replaced it, it is put back.
            if before is not None:
                self._backbone.forward = before
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def language_modeling_by_spans(model: nn.Module) -> LossBySpans | None:
    """
    The model's own loss, over spans of tokens; `None` where that is another, has terms of other kinds, or where what
    comes after the decoder is trained. A class does not say what its loss is, so it is tried on the dense model and
    two short sequences: one is padded, and a label of the padding counts. A model on which that fails has its own.
    """
    try:
        objective = LossBySpans(model, {"language-modeling": 1.0}, 1.0)
        ids = torch.arange(16, device=objective._causal.device).view(2, 8)
        ids = ids % objective._causal.config.get_text_config().vocab_size
        present, labels = torch.ones_like(ids), ids.clone()
        present[1, 6:] = 0
        labels[0, 3] = labels[1, 7] = -100
        inputs = {"input_ids": ids, "attention_mask": present, "labels": labels}
        with objective._as_dense():
            own = model(**inputs, use_cache=False, return_dict=True)
            plain = sequence_losses(own.logits, labels).sum() / 12
            found = objective.sequence_losses(model, inputs).sum() / 12
        is_plain = torch.allclose(own.loss.to(plain), plain, rtol=1e-5, atol=0)
        # Products of other shapes round otherwise, in bfloat16 to three digits.
        agree = is_plain and torch.allclose(found, plain, rtol=1e-2, atol=0)
    # A model may need other inputs, or give other outputs.
    except Exception:
        return None
    return objective if agree else None


class _SpanBySpan(torch.autograd.Function):
    """Losses of rows that do not depend on each other; a span's gradient is taken while its graph is there."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, losses_of: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        losses, gradients = [], []
        wanted = ctx.needs_input_grad[0]
        for index, span in enumerate(rows.split(SPAN)):
            with torch.set_grad_enabled(wanted):
                some = span.detach().requires_grad_(wanted)
                found = losses_of(some, index * SPAN)
                if wanted:
                    gradients += torch.autograd.grad(found.sum(), some)
            losses.append(found.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(1).to(gradient.dtype), None
