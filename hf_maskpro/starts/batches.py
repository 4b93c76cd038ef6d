"""What a batch of calibration text is."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


# Tensors, and flags.
Batch = Mapping[str, Any]


def forward_arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward, by name, also of one that PEFT has wrapped."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return inspect.signature(base.forward).parameters


def without_cache(model: nn.Module) -> dict[str, bool]:
    """What a model's forward is given so that it keeps no keys and values: nothing where it would keep none."""
    known = forward_arguments(model)
    hands_on = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in known.values())
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    keeps = any(hasattr(config.get_text_config(decoder=True), "use_cache") for config in configs)
    return {"use_cache": False} if "use_cache" in known or (hands_on and keeps) else {}


def read_batches(model: nn.Module, dataloader: Iterable[Batch]) -> list[dict[str, Any]]:
    """
    All batches of a dataloader, without what is `None` in them.

    Raises:
        `ValueError`: if one is no batch that the model's forward takes.
    """
    known = forward_arguments(model)
    others = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in known.values())
    if isinstance(dataloader, Mapping):
        raise ValueError(_wanted("the dataloader is a mapping, perhaps one batch; pass a list of batches"))
    batches = list(dataloader)
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(_wanted(f"a batch is a {type(batch).__name__}"))
        if wrong := [name for name, value in batch.items() if not isinstance(value, torch.Tensor | bool | None)]:
            raise ValueError(_wanted(f"{wrong[0]!r} of a batch is a {type(batch[wrong[0]]).__name__}"))
        if not any(isinstance(value, torch.Tensor) for value in batch.values()):
            raise ValueError(_wanted("a batch has no tensor"))
        # Labels are for the rules that look at a gradient.
        foreign = [name for name in batch if name not in known and name != "labels"]
        # What forward hands on by other names says nothing by itself.
        if foreign and not (others and len(foreign) < len(batch)):
            raise ValueError(_wanted(f"the model's forward has no argument {foreign[0]!r}"))
        ids = batch.get("input_ids")
        if ids is not None and ids.dim() != 2:
            raise ValueError(_wanted(f"'input_ids' of a batch has the shape {list(ids.shape)}"))
    return [{name: value for name, value in batch.items() if value is not None} for batch in batches]


def _wanted(found: str) -> str:
    return (
        f"{found}; a batch is a mapping of arguments of the model's forward to tensors, as "
        "{'input_ids': int64 [sequences, tokens]}, see hf_maskpro.starts.random_windows."
    )


def sequences_in(batch: Batch) -> int:
    """How many sequences a batch holds."""
    tensors = (value for value in batch.values() if isinstance(value, torch.Tensor))
    return len(batch.get("input_ids", next(tensors)))


def tokens_in(batch: Batch) -> int:
    """How many tokens of text a batch holds, without padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return sum(batch[name].shape[:2].numel() for name in ("input_ids", "inputs_embeds") if name in batch)
