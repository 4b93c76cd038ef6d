"""Which weights a mask is for, their values, fingerprint and commit; and for which masks a configuration is."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from peft.utils.integrations import dequantize_bnb_weight

from .card import hub_id
from .config import MaskProConfig


# Why weights are taken as they are.
HALF = "float16 weights cannot be compared with those that the mask was learned for."
UNKNOWN = "the adapter does not say which weights it was learned for; they are not checked."

# Weights of a layer that its fingerprint looks at, at least.
_FINGERPRINTED = 4096


def fingerprint(weight: torch.Tensor) -> str:
    """
    A hash of a few thousand weights spread over a matrix, as bfloat16: the same for a float32 copy of it.

    Args:
        weight (`torch.Tensor`): Of any shape, float32 or bfloat16.
    """
    return fingerprint_of_sample(weight.shape, weight.flatten()[:: sampled_step(weight.shape)])


def sampled_step(shape: Sequence[int]) -> int:
    """How far the weights of a fingerprint lie apart in a flattened matrix of a shape."""
    return max(1, prod(shape) // _FINGERPRINTED)


def fingerprint_of_sample(shape: Sequence[int], sample: torch.Tensor) -> str:
    """[`fingerprint`] of a matrix of a shape, from the weights that it looks at."""
    values = sample.to("cpu", torch.bfloat16).view(torch.int16)
    return hashlib.blake2b(f"{list(shape)}".encode() + values.numpy().tobytes(), digest_size=8).hexdigest()


def masks_digest(names: Iterable[str], get: Callable[[str], torch.Tensor]) -> str:
    """
    A hash of the masks of an adapter, and of the first row of all logits: it tells those of one save from another's.

    Args:
        names (`list[str]`): The tensors of the adapter's file.
        get (`Callable[[str], torch.Tensor]`): Gives the one of a name.
    """
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(name for name in names if ".maskpro_" in name):
        tensor = torch.atleast_1d(get(name))
        rows = tensor[:1] if ".maskpro_theta" in name else tensor
        found.update(rows.flatten().view(torch.uint8).cpu().numpy())
    return found.hexdigest()


def check_masks(config: MaskProConfig, names: Iterable[str], get: Callable[[str], torch.Tensor]) -> None:
    """
    Refuse masks of another save than a configuration's, where it says of which they are.

    Raises:
        `ValueError`: if they are.
    """
    if config.masks_digest is not None and config.masks_digest != masks_digest(names, get):
        raise ValueError(
            "the adapter's masks are not those that its configuration was saved with, as where saving was cut off "
            "between the two; take both files from one save, or drop masks_digest from adapter_config.json."
        )


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is stored in fewer bits than it is computed with, by torchao or in bitsandbytes' 4 bits."""
    return type(weight).__module__.startswith("torchao.") or type(weight).__name__ == "Params4bit"


def plain(weight: torch.Tensor) -> torch.Tensor:
    """What a weight is computed with: of a quantized one a copy in its full size."""
    if not is_quantized(weight):
        return weight
    values = dequantize_bnb_weight(weight) if type(weight).__name__ == "Params4bit" else weight.dequantize()
    return values.detach()


def _kind(fingerprint: str) -> str:
    return fingerprint.rpartition(":")[0]


def warn_if_quantized(known: dict[str, str], found: dict[str, str]) -> None:
    """Warn if fingerprints, by layer, are of a quantized copy and of full weights, or of unlike copies."""
    if any(_kind(known[name]) != _kind(value) for name, value in found.items()):
        warnings.warn(
            "the mask was learned over a quantized copy of its base, or this is one: they are not compared, so see to "
            "it that they are the same model.",
            stacklevel=3,
        )


def is_other(known: str | None, found: str) -> bool:
    """Whether a fingerprint is of other weights. That of a quantized copy says nothing of weights unlike it."""
    return known is None or (known != found and _kind(known) == _kind(found))


def check_base(config: MaskProConfig, weights: dict[str, torch.Tensor]) -> None:
    """
    Record which weights a new mask is for, which are finite; refuse other weights than those that a loaded mask was
    learned for.
    """
    if any(weight.is_meta for weight in weights.values()):
        # A skeleton: there is nothing to compare.
        return
    # A finished mask may well drop such weights; what is learned from now on would compare with them.
    if not config.awaits_file:
        other = [name for name, weight in weights.items() if not _is_finite(plain(weight))]
        if other:
            raise ValueError(f"cannot mask {listed(other)}: the base model has weights there that are not finite.")
    if any(weight.dtype == torch.float16 for weight in weights.values()):
        if config.awaits_file:
            warnings.warn(HALF, stacklevel=2)
        return
    found = {
        name: f"{type(weight).__name__}:" * is_quantized(weight) + fingerprint(plain(weight))
        for name, weight in weights.items()
    }
    known = config.base_fingerprint
    if config.awaits_file and known is None:
        warnings.warn(UNKNOWN, stacklevel=2)
    elif config.awaits_file and config.check_base:
        assert known is not None
        other = [name for name, value in found.items() if is_other(known.get(name), value)]
        if other:
            raise ValueError(
                f"the mask was learned for other weights than this model has, in {len(other)} of {len(found)} layers: "
                f"{listed(other)}. Load the base model that it names, or pass a config= with check_base = False."
            )
        warn_if_quantized(known, found)
        # Saved again, it can still be compared with what it was learned for.
        return
    config.base_fingerprint = found


def _is_finite(weight: torch.Tensor) -> bool:
    # NaN is the least and the largest of what it is among; and unlike isfinite this takes no memory.
    return bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def cached_commit(name: str) -> str | None:
    """The commit of a model in the Hub's cache, if there is only one that it can have been loaded from."""
    repo = hub_id(name)
    file = try_to_load_from_cache(repo, "config.json") if repo else None
    if not isinstance(file, str) or len(list(Path(file).parents[1].iterdir())) > 1:
        return None
    return Path(file).parent.name


def listed(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
