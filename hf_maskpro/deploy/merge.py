"""From an adapter to an ordinary sparse checkpoint."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import inject_adapter_in_model
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..starts.sources import Tensors, locate, open_adapter, open_tensors, saved_codes
from ..subset import keep_of
from ..tuner import masked_layers, saved_config
from ..tuner.base import fingerprint
from ..tuner.files import inside, json_object, weight_files
from ..tuner.layer import MaskProLayer
from .card import write_merged_card
from .check import check_weights, parameter_names, saved_weights, skeleton_of
from .folders import check_free, new_folder


# What belongs to a checkpoint besides its weights. A model card would describe the dense model.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "additional_chat_templates/*")
_IN_MEMORY = "model.merge_and_unload(safe_merge=True)"
# Masks are unfolded for so many rows at a time.
_ROWS = 1024


def merge(model: str | Path, adapter: str | Path, output: str | Path, overwrite: bool = False) -> dict[str, float]:
    """
    Write the ordinary sparse checkpoint of a base model and a mask adapter: zeros in a plain dense file.

    It goes from file to file tensor by tensor, and never holds more than a few of them. Files, names, dtypes and tied
    weights are those of the base checkpoint; its tokenizer and generation config come along. The checkpoint is checked
    before it takes its place on disk.

    Args:
        model (`str` or `Path`): The base model's safetensors checkpoint: a folder or a Hub id.
        adapter (`str` or `Path`): The mask adapter: a folder or a Hub id.
        output (`str` or `Path`): The folder to write.
        overwrite (`bool`): Replace a folder that is in use.

    Returns:
        `dict[str, float]`: Share of zeros by masked parameter.

    Raises:
        `ValueError`: if the folder is in use, the adapter is no mask adapter or does not fit, the base is quantized or
            not the one that the mask was learned for, a file of it is a link out of its folder, or a kept weight is
            not finite.
    """
    check_free(output, overwrite, model, adapter)
    base, masks = checkpoint_folder(model), locate(str(adapter))
    if "quantization_config" in json_object(base / "config.json"):
        raise ValueError(f"{model} is quantized; merge into the checkpoint that it was quantized from.")
    config = saved_config(masks)
    learned_on = (config.auto_mapping or {}).get("base_model_class")
    skeleton = skeleton_of(base, "AutoModelForCausalLM" if config.task_type == "CAUSAL_LM" else learned_on)
    files = weight_files(base)
    with ExitStack() as stack:
        keys = list(open_tensors(files, stack))
        names = parameter_names(skeleton, keys)
        # Only the tuner knows which layers the adapter is for, and which it cannot mask.
        layers = masked_layers(inject_adapter_in_model(config, skeleton))
        saved = open_adapter(masks, stack)
        _check_fit(layers, saved, set(names.values()))

        def masked(key: str, weight: torch.Tensor) -> torch.Tensor:
            name = names.get(key, "").removesuffix(".weight")
            if name not in layers or not key.endswith(".weight"):
                return weight
            known = config.base_fingerprint
            if known is not None and known.get(name) != fingerprint(weight):
                raise ValueError(f"the mask was learned for other weights than {key}; pass the base that it names.")
            return _masked(weight, name, layers[name], saved_codes(saved, config, name, layers[name]))

        with new_folder(output, overwrite) as folder, tqdm(total=len(keys), desc="merging", disable=None) as bar:
            for file in files:
                _rewrite(file, folder / file.name, masked, bar)
            copy_companions(base, folder, files)
            write_merged_card(folder, config.to_dict())
            weights = saved_weights(folder, skeleton_of(folder, type(skeleton).__name__))
            return check_weights(weights, config.n, config.m, [f"{name}.weight" for name in layers])


def copy_companions(base: Path, folder: Path, files: list[Path]) -> None:
    """
    Copy what belongs to a checkpoint besides these weights, without what other tools would make of it. A link leads to
    the folder itself or to where its weights lie: anything else is no part of a checkpoint, and may be a secret.
    """
    beside_weights = {file.resolve().parent for file in files}
    for pattern in _COMPANIONS:
        for path in base.glob(pattern):
            # An index beside a single file is that of other weights.
            if path.name != SAFE_WEIGHTS_INDEX_NAME or files[0].name != SAFE_WEIGHTS_NAME:
                (folder / path.relative_to(base)).parent.mkdir(exist_ok=True)
                shutil.copyfile(inside(base, path, *beside_weights), folder / path.relative_to(base))
    drop_sparsity_config(folder)


def drop_sparsity_config(folder: Path) -> None:
    """Take what an earlier compression left out of `config.json`: vLLM fails on it."""
    raw = json_object(folder / "config.json")
    if raw.pop("sparsity_config", None) is not None:
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def checkpoint_folder(model: str | Path) -> Path:
    """The folder of a checkpoint, fetched from the Hub if it is an id."""
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(model), allow_patterns=["model*.safetensors", *_COMPANIONS]))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model} has no config.json; pass a model's folder or a Hub id.")
    return folder


def _check_fit(layers: dict[str, MaskProLayer], saved: Tensors, parameters: set[str]) -> None:
    """Refuse an adapter that holds more than masks for these layers, and a checkpoint without weights of their own."""
    for key in saved:
        name, _, kind = key.removeprefix("base_model.model.").partition(".maskpro_")
        if not kind:
            raise ValueError(f"the adapter also holds {name}, from modules_to_save; merge it with {_IN_MEMORY}.")
        if name not in layers:
            raise ValueError(f"the adapter file has masks for layers that the model has not: {name}.")
    for name in layers:
        if f"{name}.weight" not in parameters:
            raise ValueError(f"{name} has no tensor of its own in the checkpoint; merge it with {_IN_MEMORY}.")


def _masked(weight: torch.Tensor, name: str, layer: MaskProLayer, codes: torch.Tensor) -> torch.Tensor:
    """A copy of a weight in the checkpoint's layout with its dropped entries at +0."""
    if weight.shape != layer.get_base_layer().weight.shape:
        shapes = list(weight.shape), list(layer.get_base_layer().weight.shape)
        raise ValueError(f"{name}.weight: the checkpoint has shape {shapes[0]}, its config.json says {shapes[1]}.")
    if not weight.is_floating_point():
        raise ValueError(f"{name}.weight is {weight.dtype}, and quantized weights are not supported.")
    weight = weight.clone()
    m = layer.in_features // codes.shape[1]
    for rows, kept in zip(layer.out_in(weight).split(_ROWS), codes.split(_ROWS), strict=True):
        rows.masked_fill_(~keep_of(kept, m), 0)
        if not rows.isfinite().all():
            raise ValueError(f"{name}.weight: a kept weight is not finite.")
    return weight


def _rewrite(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor], bar: tqdm) -> None:
    """Copy a safetensors file tensor by tensor, with its header: names, shapes and dtypes do not change."""
    with source.open("rb") as old, target.open("wb") as new, safe_open(source, framework="pt") as tensors:
        size = old.read(8)
        header = old.read(int.from_bytes(size, "little"))
        new.write(size + header)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for key in sorted(entries, key=lambda key: entries[key]["data_offsets"]):
            tensor = change(key, tensors.get_tensor(key))
            new.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            bar.update()
