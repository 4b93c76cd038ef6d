"""Which weights a mask is for, their values, fingerprint and commit; and for which masks a configuration is."""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft.utils.integrations import dequantize_bnb_weight

from .card import hub_id
from .config import MaskProConfig
from .files import one_line


# Why weights are taken as they are.
HALF = "float16 weights cannot be compared with those that the mask was learned for."
UNKNOWN = "the adapter does not say which weights it was learned for; they are not checked."

# Weights of a layer that its fingerprint looks at, at least.
_FINGERPRINTED = 4096
# Of these the signs of so many at most, and what share of them may differ between a copy and what it is of.
_SIGNS, _MOST_SIGNS = 256, 0.35


def fingerprint(weight: torch.Tensor) -> str:
    """
    A hash of a few thousand weights spread over a matrix, as bfloat16: the same for a float32 copy of it. That of a
    quantized one begins with its type, and ends with the signs of some of these weights.

    Args:
        weight (`torch.Tensor`): Of any shape, float32, bfloat16 or quantized.
    """
    values = plain(weight)
    sample = _sample(values)
    known = fingerprint_of_sample(values.shape, sample)
    return f"{type(weight).__name__}:{known}:{_signs(sample)}" if is_quantized(weight) else known


def _sample(values: torch.Tensor) -> torch.Tensor:
    return values.flatten()[:: sampled_step(values.shape)]


def _signs(sample: torch.Tensor) -> str:
    """Which of some weights of a sample are positive, as hexadecimal digits: what quantizing leaves of most."""
    positive = sample[:: -(-len(sample) // _SIGNS)] > 0
    return f"{int(''.join('01'[bit] for bit in positive.tolist()), 2):0{-(-len(positive) // 4)}x}"


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
    """Whether a weight is stored in fewer bits than it is computed with, by torchao or bitsandbytes."""
    return type(weight).__module__.startswith("torchao.") or is_of_bitsandbytes(weight)


def is_of_bitsandbytes(weight: torch.Tensor) -> bool:
    """Whether bitsandbytes has quantized a weight."""
    kind = type(weight).__name__
    return kind == "Params4bit" or (kind == "Int8Params" and weight.dtype == torch.int8)


def weight_of(module: Any, name: str = "weight") -> Any:
    """A layer's weight, `None` if it is no parameter."""
    weight = module._parameters.get(name)
    # bitsandbytes takes the scales of 8 bits away from it when the layer is first called.
    if type(weight).__name__ == "Int8Params" and weight.SCB is None:
        weight.SCB = module.state.SCB
    return weight


def is_laid_out_for_cpus(weight: Any) -> bool:
    """Whether bitsandbytes has run a 4-bit weight on a CPU, and changed the order of its numbers for that."""
    return type(weight).__name__ == "Params4bit" and vars(weight.quant_state).get("packing_format_for_cpu", False)


def plain(weight: torch.Tensor) -> torch.Tensor:
    """What a weight is computed with: of a quantized one a copy in its full size."""
    if not is_quantized(weight):
        return weight
    of_torchao = type(weight).__module__.startswith("torchao.")
    # What has the scales of 8 bits is the module's state, or the weight itself.
    values = weight.dequantize() if of_torchao else dequantize_bnb_weight(weight, weight)
    return values.detach()


def _kind(fingerprint: str) -> str:
    return fingerprint.partition(":")[0] if ":" in fingerprint else ""


def warn_if_quantized(config: MaskProConfig, found: dict[str, str]) -> None:
    """Warn if fingerprints, by layer, are of a quantized copy and of full weights, or of unlike copies."""
    known = config.base_fingerprint or {}
    kinds = {(_kind(known[name]), _kind(value)) for name, value in found.items()}
    unlike = sorted(pair for pair in kinds if pair[0] != pair[1])
    if not unlike:
        return
    learned, here = unlike[-1]
    base = config.base_model_name_or_path or "its base"
    if config.revision is not None:
        base += f" at revision {config.revision}"
    if learned:
        warnings.warn(
            f"the mask was learned over a copy of {base} that is quantized ({learned:.40}): of these weights no more "
            f"than the signs were compared, of {_SIGNS} a layer.",
            stacklevel=3,
        )
    else:
        warnings.warn(
            f"the mask was learned over the full weights of {base}, and these are quantized ({here}): they were not "
            "compared, so see to it that they were made from those.",
            stacklevel=3,
        )


def is_other(known: str | None, found: str, sample: torch.Tensor) -> bool:
    """
    Whether a fingerprint is of other weights than one that was made of a sample. Where the known one is of a quantized
    copy, and the other is not or of another kind, the signs tell; that of full weights has none to be compared by.
    """
    if known is None or _kind(known) == _kind(found):
        return known != found
    if not _kind(known):
        return False
    theirs, mine = known.rpartition(":")[2], _signs(sample)
    if not re.fullmatch(f"[0-9a-f]{{{len(mine)}}}", theirs):
        return True
    differ = (int(theirs, 16) ^ int(mine, 16)).bit_count()
    # Of weights that have nothing to do with each other a half differs; of 4-bit copies a fifth at the worst.
    return differ > _MOST_SIGNS * 4 * len(mine)


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
    found = {name: fingerprint(weight) for name, weight in weights.items()}
    known = config.base_fingerprint
    if config.awaits_file and known is None:
        warnings.warn(UNKNOWN, stacklevel=2)
    elif config.awaits_file and config.check_base:
        assert known is not None
        other = [
            name for name, value in found.items() if is_other(known.get(name), value, _sample(plain(weights[name])))
        ]
        if other:
            raise ValueError(
                f"the mask was learned for other weights than this model has, in {len(other)} of {len(found)} layers: "
                f"{listed(other)}. Load the base model that it names; in Python, a config with check_base=False goes "
                "without."
            )
        warn_if_quantized(config, found)
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
    return ", ".join(map(one_line, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
