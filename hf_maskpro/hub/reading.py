"""Look into a saved mask adapter, and put results into it."""

import json
from collections.abc import Collection
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from ..subset import check_packed
from ..subset.codec import packed_width, word_layout
from ..tuner import MaskProConfig, saved_config
from ..tuner.base import check_masks
from ..tuner.card import CARD_FILES, CONFIG_FILE, share_changed, write_card
from ..tuner.files import json_object, one_line, private_folder
from ..tuner.layer import LOGITS


MASK_FILE = "adapter_model.safetensors"


def read_masks(folder: str | Path) -> tuple[MaskProConfig, dict[str, torch.Tensor]]:
    """
    Read a mask adapter without its base model, checking every word and logit of it.

    Args:
        folder (`str` or `Path`): The adapter's folder.

    Returns:
        `tuple[MaskProConfig, dict[str, torch.Tensor]]`: Its configuration, and by layer the packed mask, uint8
        `[out_features, bytes]`.

    Raises:
        `ValueError`: if it is not a mask adapter, or anything in it is not as it should be.
    """
    folder = Path(folder)
    config = saved_config(folder)
    digits, size = word_layout(config.n, config.m)
    masks = {}
    try:
        with safe_open(folder / MASK_FILE, framework="pt") as tensors:
            # A mask comes before its logits.
            for key in sorted(tensors.keys()):
                kind = _kind(key, config)
                if kind == "mask":
                    packed = tensors.get_tensor(key)
                    if packed.ndim != 2 or not packed.numel():
                        raise ValueError(f"{one_line(key)} has shape {list(packed.shape)}, not [out_features, bytes].")
                    check_packed(packed, config.n, config.m, packed.shape[1] // size * digits * config.m)
                    masks[_layer(key)] = packed
                elif kind == "theta":
                    _check_logits(key, tensors.get_tensor(key), masks.get(_layer(key)), config)
            check_masks(config, tensors.keys(), tensors.get_tensor)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder / MASK_FILE} is not a file of masks: {error}") from error
    _check_whole(str(folder / MASK_FILE), config, masks)
    return config, masks


def _check_logits(key: str, theta: torch.Tensor, packed: torch.Tensor | None, config: MaskProConfig) -> None:
    if packed is None:
        raise ValueError(f"it holds {one_line(key)} without the mask that it starts from.")
    fits = theta.ndim == 3 and theta.shape[:2] == (len(packed), config.m)
    if not fits or packed.shape[1] != packed_width(config.n, config.m, theta.shape[2] * config.m):
        raise ValueError(f"{one_line(key)} has shape {list(theta.shape)}, which is not that of its mask.")
    if theta.dtype not in LOGITS or not theta.isfinite().all():
        raise ValueError(f"{one_line(key)} holds logits that are not finite numbers in float32 or bfloat16.")


def _kind(key: str, config: MaskProConfig) -> str:
    """What a tensor of an adapter's file is: `mask`, `theta` or a weight that `modules_to_save` names."""
    kind = key.rpartition(".maskpro_")[2]
    if kind in ("mask", "theta") and ".maskpro_" not in _layer(key):
        return kind
    # By the end of a name, as PEFT does: "norm" stands for every layernorm too.
    if not any(f"{module}." in key for module in config.modules_to_save or []):
        raise ValueError(f"it holds {one_line(key)}, which is neither a mask nor of modules_to_save.")
    return "weight"


def _layer(key: str) -> str:
    """The layer whose mask or logits a tensor of an adapter's file is."""
    return key.removeprefix("base_model.model.").removesuffix(".maskpro_mask").removesuffix(".maskpro_theta")


def _check_whole(file: str, config: MaskProConfig, layers: Collection[str]) -> None:
    expected = config.lineage[-1]["groups_changed"] if config.lineage else {}
    if missing := sorted(set(expected) - set(layers)):
        raise ValueError(f"{file} has no mask for {one_line(missing[0])}.")


def inspect_adapter(source: str, revision: str | None = None, subfolder: str | None = None) -> dict[str, Any]:
    """
    What a mask adapter holds.

    Of one on the Hub that is not in the cache it reads the configuration and the header of the safetensors file.

    Args:
        source (`str`): Its folder, or the Hub id of its repository.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        subfolder (`str`, *optional*): The adapter's folder in it.

    Raises:
        `ValueError`: if it is not a mask adapter, or is not whole.
    """
    folder = Path(source) / (subfolder or "")
    name = f"{subfolder}/{MASK_FILE}" if subfolder else MASK_FILE
    checked = folder.is_dir()
    if not checked:
        folder = Path(hf_hub_download(source, CONFIG_FILE, subfolder=subfolder, revision=revision)).parent
        checked = isinstance(try_to_load_from_cache(source, name, revision=revision), str)
    if checked:
        config, masks = read_masks(folder)
        layers, size = list(masks), (folder / MASK_FILE).stat().st_size
        own = own_bytes(folder)
    else:
        config = saved_config(folder)
        header = HfApi().parse_safetensors_file_metadata(source, name, revision=revision)
        kinds = {key: _kind(key, config) for key in header.tensors}
        layers = [_layer(key) for key, kind in kinds.items() if kind == "mask"]
        spans = [header.tensors[key].data_offsets for key, kind in kinds.items() if kind != "weight"]
        own = sum(end - start for start, end in spans)
        _check_whole(f"{name} of {source}", config, layers)
        size = get_hf_file_metadata(hf_hub_url(source, name, revision=revision)).size or 0
    stages = config.lineage or []
    return {
        "kind": "mask adapter",
        "pattern": config.pattern,
        "base_model": config.base_model_name_or_path,
        "layers": len(layers),
        "target_weights": config.target_weights,
        "file_bytes": size,
        "bits_per_weight": 8 * own / config.target_weights if config.target_weights else None,
        "holds_logits": config.save_logits,
        "started_from": [stage["init_mask"] for stage in stages],
        "groups_changed": [share_changed(stage) for stage in stages],
        "checked": "every word" if checked else "the header of the file",
    }


def record_evaluation(folder: str | Path, dataset: str, metric: str, value: float, protocol: str) -> None:
    """
    Put a result into a saved adapter's configuration and card, in the place of an earlier one by the same protocol.

    Args:
        folder (`str` or `Path`): The adapter's folder.
        dataset (`str`): What was measured on.
        metric (`str`): What was measured, for instance `"perplexity"`.
        value (`float`): The result.
        protocol (`str`): How: window, tokens.

    Raises:
        `ValueError`: if the result is not finite, or the adapter does not say how its mask was made.
    """
    folder = Path(folder)
    if not isfinite(value):
        raise ValueError(f"{metric} on {dataset} is {value}, which is no result to record.")
    path = folder / CONFIG_FILE
    entry = {"dataset": dataset, "metric": metric, "value": value, "protocol": protocol}
    # What it leaves out has its default.
    raw = saved_config(folder).to_dict() | json_object(path)
    if not raw.get("lineage") or not raw.get("target_weights"):
        raise ValueError(f"{path} does not say how its mask was made; save the adapter again.")
    stage = raw["lineage"][-1]
    others = [known for known in stage.get("evaluations", []) if {**known, "value": value} != entry]
    stage["evaluations"] = [*others, entry]
    with private_folder(folder, *CARD_FILES) as new:
        (new / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True), encoding="utf-8")
        write_card(new, raw, own_bytes(folder))


def own_bytes(folder: Path) -> int:
    """Bytes of the masks and logits of an adapter: what the method stores, without a header or `modules_to_save`."""
    with safe_open(folder / MASK_FILE, framework="pt") as tensors:
        own = [key for key in tensors.keys() if ".maskpro_" in key]  # noqa: SIM118, the handle is no dict
        return sum(tensors.get_tensor(key).nbytes for key in own)
