"""Starting masks: one file per rule, the layer-by-layer walk that they share, refinement, and masks from elsewhere."""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..subset import group_members, mask_of, mode
from ..tuner import (
    DATA_FREE,
    RULES,
    MaskProConfig,
    MaskProExpertWeight,
    MaskProLayer,
    check_calls,
    evaluating,
    masked_layers,
    one_adapter,
    split_init_mask,
)
from ..tuner.base import listed
from . import blocks, gblm, magnitude, pruner_zero, random, ria, sparsegpt, swaps, wanda
from .batches import read_batches, sequences_in, tokens_in
from .calibration import generated_text, random_windows, start_token_of
from .gradients import gradient_norms
from .sources import fill_masks
from .walk import FEWEST_TOKENS, Calibration, Inputs, one_pass, walk


__all__ = ["generated_text", "initialize_masks", "needs_data", "random_windows", "start_token_of"]

logger = logging.getLogger(__name__)

# How far swaps go from the outputs of a layer's own inputs towards those of the dense model.
TOWARDS_DENSE = 0.2
# Swaps of an expert that saw fewer tokens than so many for each of its inputs suit these tokens alone.
TOKENS_TO_REFINE = 0.25

_SCORES = {
    "magnitude": magnitude.scores,
    "random": random.scores,
    "wanda": wanda.scores,
    "ria": ria.scores,
    "gblm": gblm.scores,
    "pruner-zero": pruner_zero.scores,
}


def needs_data(init_mask: str) -> bool:
    """Whether a starting mask needs calibration text."""
    rule, refined = split_init_mask(init_mask)
    return bool(refined) or (rule in RULES and rule not in DATA_FREE)


def initialize_masks(model: nn.Module, dataloader: Iterable[Mapping[str, torch.Tensor]] | None = None) -> None:
    """
    Fill the starting masks that `MaskProConfig.init_mask` names, for every active mask adapter.

    `"magnitude"`, the start that needs no data, and `"random"` are there already and are left alone.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        dataloader (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches of calibration text. Each maps
            arguments of the model's forward to tensors or flags, as `{"input_ids": int64 [sequences, tokens]}`; see
            [`random_windows`]. Needed by every rule but these two, and by `"+swaps"` and `"+blocks"`. Padding, by
            the batch's `attention_mask`, does not count.

    Raises:
        `ValueError`: if the method needs data and there is none, a batch is something else, or a mask from elsewhere
            does not fit.
    """
    adapters = {
        name: layer.maskpro_config[name]
        for layer in model.modules()
        if isinstance(layer, MaskProLayer)
        for name in layer.active_adapters
        if name in layer.maskpro_config and not layer.maskpro_config[name].awaits_file
    }
    batches = None if dataloader is None else read_batches(model, dataloader)
    for name, config in adapters.items():
        if needs_data(config.init_mask) and batches is None:
            raise ValueError(
                f"init_mask={config.init_mask!r} needs calibration text; pass a dataloader, or start from "
                "'magnitude', which needs none."
            )
        with one_adapter(model, name):
            _initialize(model, name, config, batches or [])


def _initialize(model: nn.Module, adapter_name: str, config: MaskProConfig, batches: list[dict[str, Any]]) -> None:
    for name, layer in masked_layers(model, adapter_name).items():
        if layer.base_weight.is_meta:
            raise ValueError(
                f"the weight of {name} is offloaded or not there; load the base model whole, without device_map: on a "
                "CPU it is mapped from its file, and read layer by layer."
            )
    with_data = needs_data(config.init_mask)
    rule, refined = split_init_mask(config.init_mask)
    if rule not in RULES:
        fill_masks(model, adapter_name, rule)
        if Path(rule).exists():
            # The adapter may be shared: of a path it says no more than the last name.
            config.init_mask = f"./{Path(rule).name}" + "".join(f"+{refinement}" for refinement in refined)
            config.start["init_mask"] = config.init_mask
    if batches:
        with evaluating(model):
            check_calls(model, partial(one_pass, model, batches[0]))
    if not with_data:
        return
    gradients = gradient_norms(model, adapter_name, batches) if rule in ("gblm", "pruner-zero") else {}

    by_magnitude: set[tuple[str, int]] = set()
    unseen: list[str] = []

    def choose(name: str, layer: MaskProLayer, inputs: Inputs | None, number: int = 0) -> torch.Tensor:
        if inputs is not None and not inputs.squares.isfinite().all():
            raise ValueError(f"{name}: its inputs are not finite; load the model in bfloat16 or float32.")
        weight, rows = layer.matrix(number).detach().float(), layer.rows_of(number)
        calibration = Calibration(inputs, gradients[name][rows] if name in gradients else None)
        if calibration.gradient is not None and not calibration.gradient.isfinite().all():
            raise ValueError(f"{name}: its gradients are not finite; load the model in bfloat16 or float32.")
        expert, tokens = isinstance(layer, MaskProExpertWeight), 0 if inputs is None else inputs.tokens
        # What looks at no inputs has gradients.
        dead = calibration.gradient is not None and not calibration.gradient.any()
        blind = dead if inputs is None else not tokens
        if blind and expert:
            by_magnitude.add((name.rpartition(".")[0], number))
        elif blind:
            unseen.append(name)
        mask = _mask_by_rule("magnitude" if blind and rule in RULES else rule, weight, calibration, config, name)
        if mask is None:
            mask = mask_of(layer.initial_codes(adapter_name)[rows], config.m)
        if "swaps" in refined and not blind and not (expert and tokens < TOKENS_TO_REFINE * layer.in_features):
            assert inputs is not None
            assert inputs.gram is not None
            shift = None if inputs.lost is None else TOWARDS_DENSE * weight @ inputs.lost
            mask = swaps.refine(weight, mask, inputs.gram, shift)
        layer.set_initial_mask(adapter_name, mask, rows)
        return mask

    if rule == "pruner-zero" and not refined:
        # It looks at no inputs.
        for name, layer in masked_layers(model, adapter_name).items():
            for number in range(layer.experts):
                choose(name, layer, None, number)
    else:
        learn = partial(blocks.learn, adapter_name) if "blocks" in refined else None
        with_gram = rule == "sparsegpt" or "swaps" in refined
        walk(model, adapter_name, batches, with_gram, choose, bool(refined), learn)
    kept = "largest weights" if rule in RULES else "masks of the source"
    if unseen:
        logger.warning(f"calibration: {listed(unseen)} saw no data; their {kept} are kept.")
    if by_magnitude:
        count = f"{len(by_magnitude):,} expert{'s' * (len(by_magnitude) > 1)}"
        logger.warning(
            f"calibration: {count} saw fewer than {FEWEST_TOKENS} tokens, for which their {kept} are taken; pass more "
            "text to calibrate them."
        )
    config.start["calibration"] = {
        "sequences": sum(map(sequences_in, batches)),
        "tokens": sum(map(tokens_in, batches)),
    }


def _mask_by_rule(
    rule: str, weight: torch.Tensor, calibration: Calibration, config: MaskProConfig, name: str
) -> torch.Tensor | None:
    """A layer's mask, bool `[out_features, m, groups]`; `None` if it comes from a source."""
    if rule not in RULES:
        return None
    size = group_members(weight.abs(), config.m)
    if rule == "sparsegpt":
        assert calibration.inputs is not None
        try:
            mask = sparsegpt.mask(weight, calibration, config.n, config.m)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"{name}: the Hessian of its inputs is not positive definite; calibrate on more or other text."
            ) from error
        seen = group_members(calibration.inputs.squares.unsqueeze(0), config.m).any(1, keepdim=True)
        return torch.where(seen, mask, mode(size, config.n))
    scores = group_members(_SCORES[rule](weight, calibration), config.m)
    # Of features that are always zero a rule knows nothing but the weights: they come after all others, the largest
    # first.
    return mode(torch.where(scores == 0, -1 / size, scores), config.n)
