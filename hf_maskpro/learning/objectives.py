"""What is minimised: the language-model loss, the divergence from the dense model, or a weighted sum of both."""

import json
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Trainer

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


class Distillation:
    """
    KL(dense || masked) of the next token, and with a weight of its own its negative log-likelihood. The dense model is
    the same one without its adapters. The head and what follows it run over [`SPAN`] tokens at a time, forward and
    backward at once, so that no more logits than theirs are ever in memory.

    Args:
        model (`torch.nn.Module`): A causal language model with adapters.
        weights (`dict[str, float]`): From [`objective_weights`].
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
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        versions = [tensor._version for tensor in tensors]
        known = len(tensors) == len(self._batch) and all(map(operator.is_, tensors, self._batch))
        if not known or versions != self._versions:
            with torch.no_grad(), evaluating(self._causal), unmasked(self._causal):
                if self._backbone is None:
                    self._backbone = self._feeds_head(model, inputs)
                self._dense = self._states(model, inputs)[:, :-1][counts]
            self._batch, self._versions = tensors, versions
        states, targets, dense = self._states(model, inputs)[:, :-1][counts], labels[:, 1:][counts], self._dense

        def losses_of(some: torch.Tensor, start: int) -> torch.Tensor:
            here = slice(start, start + len(some))
            return self._token_losses(some, dense[here], targets[here])

        losses = _SpanBySpan.apply(states, losses_of)
        self._output = None
        return losses.new_zeros(len(labels)).index_add(0, counts.nonzero()[:, 0], losses)

    def _token_losses(self, states: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._logits(states)
        losses = logits.new_zeros(len(targets))
        if (weight := self._weights.get("language-modeling")) is not None:
            losses = losses + weight * F.cross_entropy(logits, targets, reduction="none")
        if (weight := self._weights.get("distillation")) is not None:
            with torch.no_grad():
                wanted = (self._logits(dense) / self._temperature).log_softmax(-1)
            found = (logits / self._temperature).log_softmax(-1)
            divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
            losses = losses + weight * self._temperature**2 * divergence
        return losses

    def _feeds_head(self, model: nn.Module, inputs: dict[str, Any]) -> nn.Module:
        """The module whose output the model itself takes to its head: of those that run, the outermost."""
        ran: list[nn.Module] = []
        handles = [
            module.register_forward_hook(lambda module, args, output: ran.append(module))
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
