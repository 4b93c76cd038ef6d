"""From an adapter to an ordinary sparse checkpoint."""

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import inject_adapter_in_model
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..starts.checkpoints import Matrix, Piece, matrices_of, pieces_of, shapes_of
from ..starts.sources import Tensors, locate, open_adapter, saved_codes
from ..subset import keep_of
from ..tuner import masked_layers, saved_config
from ..tuner.base import HALF, UNKNOWN, fingerprint_of_sample, is_other, sampled_step, warn_if_quantized
from ..tuner.files import inside, json_object, one_line, open_safetensors, weight_files
from ..tuner.layer import MaskProLayer
from .card import write_merged_card
from .check import check_weights, saved_weights, skeleton_of
from .folders import check_free, new_folder


# What belongs to a checkpoint besides its weights. A model card would describe the dense model.
_COMPANIONS = (
    *("*.json", "*.jinja", "*.model", "*.txt", "*.spm", "*.codes", "*.tokenizer", "*.tiktoken"),
    *("*.py", "LICENSE*", "additional_chat_templates/*"),
)
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
        `ValueError`: if the folder is in use, or the adapter is no mask adapter or does not fit. Also if the base is
            quantized or not the one that the mask was learned for, a file of it is a link out of its folder, or a kept
            weight is not finite.
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
        shapes = shapes_of(files)
        pieces, matrices = pieces_of(skeleton, shapes), matrices_of(skeleton)
        # Only the tuner knows which layers the adapter is for, and which it cannot mask.
        layers = {
            f"{name}{layer.parameter_suffix}": (name, layer)
            for name, layer in masked_layers(inject_adapter_in_model(config, skeleton)).items()
        }
        saved = open_adapter(masks, config, stack)
        _check_fit(layers, saved, pieces)
        if config.base_fingerprint is None:
            warnings.warn(UNKNOWN, stacklevel=2)
        else:
            warn_if_quantized(config, dict.fromkeys(config.base_fingerprint, ""))
        prints = {
            parameter: _Fingerprint(config.base_fingerprint.get(name), matrices[parameter])
            for parameter, (name, _) in layers.items()
            if config.base_fingerprint is not None
        }

        def masked(key: str, weight: torch.Tensor) -> torch.Tensor:
            wanted = [piece for piece in pieces.get(key, []) if piece.parameter in layers]
            if not wanted:
                return weight
            if not weight.is_floating_point():
                raise ValueError(f"{key} is {weight.dtype}, and quantized weights are not supported.")
            weight = weight.clone()
            for piece in wanted:
                name, layer = layers[piece.parameter]
                matrix = piece.matrix_of(weight)
                if prints and weight.dtype == torch.float16:
                    warnings.warn(HALF, stacklevel=2)
                elif prints and not prints[piece.parameter].fits(piece, matrix):
                    raise ValueError(
                        f"the mask was learned for other weights than {key}; pass the base that it names."
                    )
                if not _mask(matrix[piece.source], saved_codes(saved, config, name, layer, piece.rows)):
                    raise ValueError(f"{key}: a kept weight is not finite.")
            return weight

        with new_folder(output, overwrite) as folder, tqdm(total=len(shapes), desc="merging", disable=None) as bar:
            for file in files:
                _rewrite(file, folder / file.name, masked, bar)
            copy_companions(base, folder, files)
            write_merged_card(folder, config.to_dict())
            weights = saved_weights(folder, skeleton_of(folder, type(skeleton).__name__), layers)
            return check_weights(weights, config.n, config.m, layers)


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


def _check_fit(layers: dict[str, tuple[str, MaskProLayer]], saved: Tensors, pieces: dict[str, list[Piece]]) -> None:
    """Refuse an adapter that holds more than masks for these layers, and a checkpoint that lacks rows of theirs."""
    names = {name for name, _ in layers.values()}
    for key in saved:
        name, _, kind = key.removeprefix("base_model.model.").partition(".maskpro_")
        if not kind:
            raise ValueError(
                f"the adapter also holds {one_line(name)}, from modules_to_save; merge it with {_IN_MEMORY}."
            )
        if name not in names:
            raise ValueError(f"the adapter file has masks for layers that the model has not: {one_line(name)}.")
    held = dict.fromkeys(layers, 0)
    for found in pieces.values():
        for piece in found:
            if piece.parameter in layers:
                held[piece.parameter] += len(range(piece.rows.start, piece.rows.stop, piece.rows.step))
    for parameter, (name, layer) in layers.items():
        if held[parameter] < layer.out_features:
            raise ValueError(f"{name} has no tensor of its own in the checkpoint; merge it with {_IN_MEMORY}.")


class _Fingerprint:
    """The fingerprint of a parameter, from the rows that the tensors of a checkpoint hold of it."""

    def __init__(self, known: str | None, matrix: Matrix) -> None:
        self.known, self.shape = known, matrix.shape
        places = torch.unravel_index(torch.arange(0, prod(self.shape), sampled_step(self.shape)), self.shape)
        self.rows, self.columns = places[-2:] if not matrix.transposed else places[:-3:-1]
        if len(places) == 3:
            self.rows = self.rows + matrix.rows * places[0]
        self.sample = torch.zeros(len(self.rows), dtype=torch.bfloat16)
        self.missing = len(self.sample)

    def fits(self, piece: Piece, matrix: torch.Tensor) -> bool:
        """Look at the rows of a piece; whether all is as it was, once all is known."""
        steps = self.rows - piece.rows.start
        here = (steps >= 0) & (self.rows < piece.rows.stop) & (steps % piece.rows.step == 0)
        source = piece.source.start + steps[here] // piece.rows.step * piece.source.step
        self.sample[here] = matrix[source, self.columns[here]].bfloat16()
        self.missing -= int(here.sum())
        if self.missing > 0:
            return True
        return not is_other(self.known, fingerprint_of_sample(self.shape, self.sample), self.sample)


def _mask(rows: torch.Tensor, codes: torch.Tensor) -> bool:
    """Put +0 in the place of what is dropped; whether what is kept is finite."""
    m = rows.shape[1] // codes.shape[1]
    for part, kept in zip(rows.split(_ROWS), codes.split(_ROWS), strict=True):
        part.masked_fill_(~keep_of(kept, m), 0)
        if not part.isfinite().all():
            return False
    return True


def _rewrite(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor], bar: tqdm) -> None:
    """Copy a safetensors file tensor by tensor, with its header: names, shapes and dtypes do not change."""
    with source.open("rb") as old, target.open("wb") as new, open_safetensors(source) as tensors:
        size = old.read(8)
        header = old.read(int.from_bytes(size, "little"))
        new.write(size + header)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for key in sorted(entries, key=lambda key: entries[key]["data_offsets"]):
            tensor = change(key, tensors.get_tensor(key))
            new.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            bar.update()
