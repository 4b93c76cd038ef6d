"""Starting masks that somebody else made: adapters, pruned checkpoints, mask files."""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from ..subset import group_members, mask_of, mode, mode_codes, pack, unpack, unpack_codes
from ..tuner import MaskProConfig, MaskProLayer, logit_scale, masked_layers, saved_config
from ..tuner.base import check_masks, plain
from ..tuner.files import one_line, open_safetensors, weight_files
from ..tuner.layer import LOGITS
from .checkpoints import Piece, pieces_of, shapes_of


MASKLLM_FILE = "mask_compressed.npz"

# Gives the mask of a layer, bool `[out_features, m, groups]`, by its name in the base model.
Reader = Callable[[str, MaskProLayer], torch.Tensor]
Tensors = dict[str, Callable[[], torch.Tensor]]
ALL = slice(None)


@torch.no_grad()
def fill_masks(model: nn.Module, adapter_name: str, source: str) -> None:
    """
    Fill the starting masks of an adapter from a file or folder.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        adapter_name (`str`): The adapter.
        source (`str`): A folder or Hub id with a mask adapter, a pruned checkpoint (its zeros) or MaskLLM's
            `mask_compressed.npz`; such an `.npz` file; or a `.safetensors` file with a bool or 0/1 tensor per
            parameter, named like the parameter, with or without `.mask` at the end. Nothing is unpickled.

    Raises:
        `ValueError`: naming the first layer whose mask is missing, has another shape or violates the pattern; nothing
            is filled then.
    """
    layers = masked_layers(model, adapter_name)
    with ExitStack() as stack:
        read = _reader(locate(source), stack, model, adapter_name)
        # Packed, since all of them are held until the last one is known to fit.
        config = next(iter(layers.values())).maskpro_config[adapter_name]
        packed = {name: pack(read(name, layer), config.n, config.m) for name, layer in layers.items()}
    for name, layer in layers.items():
        mask = unpack(packed[name], config.n, config.m, layer.in_features)
        layer.set_initial_mask(adapter_name, mask)


def locate(source: str) -> Path:
    """A source on this machine, fetched from the Hub if it is an id."""
    path = Path(source)
    if os.path.exists(path):
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix in (".npz", ".safetensors"):
        raise ValueError(f"{source} does not exist; pass a folder, a .npz or .safetensors file, or a Hub id.")
    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", MASKLLM_FILE]))


def _reader(path: Path, stack: ExitStack, model: nn.Module, adapter_name: str) -> Reader:
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return _adapter_reader(path, stack, adapter_name)
        if (path / MASKLLM_FILE).is_file():
            return _reader(path / MASKLLM_FILE, stack, model, adapter_name)
        return _checkpoint_reader(weight_files(path), stack, model, adapter_name)
    if path.suffix == ".npz":
        try:
            archive = stack.enter_context(ZipFile(path))
        # What is damaged is noticed in many ways: a version or a flag that Python does not know, text that is none.
        except Exception as error:
            raise ValueError(f"{path} is not a whole .npz file: {one_line(error)}.") from error
        # Packed bits and a header; of a few compressed bytes an entry can be of any size.
        layers = masked_layers(model, adapter_name).values()
        most = 2**16 + max(layer.out_features * layer.in_features for layer in layers) // 8
        arrays: Tensors = {
            name.removesuffix(".npy"): partial(_array, archive, name, most) for name in archive.namelist()
        }
        if len(arrays) < len(archive.namelist()):
            raise ValueError(f"{path} has several entries of one name; leave one of them.")
        masks = _by_parameter(arrays, path)
        return _mask_reader(masks, adapter_name, _of_bits)
    if path.suffix == ".safetensors":
        masks = _by_parameter(open_tensors([path], stack), path)
        return _mask_reader(masks, adapter_name, _of_numbers)
    raise ValueError(f"{path} is neither .npz nor .safetensors; convert it, since pickled files are not read.")


def _by_parameter(tensors: Tensors, path: Path) -> Tensors:
    """Masks by the parameter that they are for; with or without `.mask` at its end, a name stands for the same one."""
    masks = {key.removesuffix(".mask"): get for key, get in tensors.items()}
    if twice := [key for key in masks if key in tensors and f"{key}.mask" in tensors]:
        raise ValueError(f"{path} has two masks for {one_line(twice[0])}; leave one of them.")
    return masks


def open_tensors(files: list[Path], stack: ExitStack) -> Tensors:
    """
    What gives each tensor of some safetensors files.

    Raises:
        `ValueError`: if one is none.
    """
    known: Tensors = {}
    for file in files:
        handle = stack.enter_context(open_safetensors(file))
        for key in handle.keys():  # noqa: SIM118, the handle is no dict
            known[key] = partial(handle.get_tensor, key)
    return known


def open_adapter(folder: Path, config: MaskProConfig, stack: ExitStack) -> Tensors:
    """
    What gives each tensor of a saved mask adapter, which has this configuration.

    Raises:
        `ValueError`: if the masks are of another save, or there is a second name for one, by which PEFT would load
            another one than is read here.
    """
    known = open_tensors([folder / "adapter_model.safetensors"], stack)
    for key in known:
        if re.search(r"\.maskpro_(mask|theta)\.", key):
            raise ValueError(f"the adapter file has a name that is none of a mask's: {one_line(key)}.")
    check_masks(config, known, lambda key: known[key]())
    return known


def _array(archive: ZipFile, name: str, most: int) -> torch.Tensor:
    if (size := archive.getinfo(name).file_size) > most:
        raise ValueError(f"the source's entry has {size:,} bytes, and no mask of this model needs more than {most:,}.")
    try:
        with archive.open(name) as file:
            # Without pickles, which numpy would run.
            return torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))
    # The file's own list may be sound and its entries damaged, encrypted, or compressed in a way that is not known.
    except Exception as error:
        raise ValueError(f"the source's entry cannot be read: {one_line(error)}.") from error


def _mask_reader(
    known: Tensors, adapter_name: str, interpret: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Reader:
    """Reads masks by parameter; `interpret` tells of every weight whether one keeps it."""

    def read(name: str, layer: MaskProLayer) -> torch.Tensor:
        key = f"{name}{layer.parameter_suffix}"
        if key not in known:
            raise ValueError(f"the source has no mask for {key}.")
        try:
            keeps = layer.out_in(interpret(known[key](), plain(layer.base_weight)))
            return _whole(keeps, layer, layer.maskpro_config[adapter_name], exactly=True)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    return read


def _checkpoint_reader(files: list[Path], stack: ExitStack, model: nn.Module, adapter_name: str) -> Reader:
    """Reads what a pruned checkpoint keeps, whose tensors are named and stored in any way that transformers loads."""
    tensors = open_tensors(files, stack)
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        raise ValueError("checkpoints are read as transformers loads them, and the model is none of its models.")
    held: dict[str, list[tuple[str, Piece]]] = {}
    for key, pieces in pieces_of(base, shapes_of(files)).items():
        for piece in pieces:
            held.setdefault(piece.parameter, []).append((key, piece))

    def read(name: str, layer: MaskProLayer) -> torch.Tensor:
        parameter = f"{name}{layer.parameter_suffix}"
        keeps = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
        rows = 0
        for key, piece in held.get(parameter, []):
            keeps[piece.rows] = piece.matrix_of(tensors[key]())[piece.source] != 0
            rows += len(keeps[piece.rows])
        if rows < len(keeps):
            raise ValueError(f"the source has no weight for {parameter}.")
        try:
            return _whole(keeps, layer, layer.maskpro_config[adapter_name], exactly=False)
        except ValueError as error:
            raise ValueError(f"{parameter}: {error}") from error

    return read


def _whole(keeps: torch.Tensor, layer: MaskProLayer, config: MaskProConfig, exactly: bool) -> torch.Tensor:
    """
    A mask of a layer, from what a source keeps, bool `[out_features, in_features]`. Where a pruned group has fewer
    weights left, it may have kept a zero; else the largest of the dropped joins.
    """
    keeps = group_members(keeps, config.m).to(layer.base_weight.device)
    kept = keeps.sum(1)
    fits = kept == config.n if exactly else kept <= config.n
    if not fits.all():
        raise ValueError(
            f"{int((~fits).sum()):,} of {kept.numel():,} groups do not keep {config.n} of {config.m}; pass the "
            "pattern that the source was pruned to."
        )
    size = group_members(layer.out_in(plain(layer.base_weight).detach()), config.m).float().abs()
    size = size.masked_fill(size == 0, torch.finfo(torch.float32).max)
    return mode(size.masked_fill(keeps, torch.inf), config.n)


def _check_shape(tensor: torch.Tensor, weight: torch.Tensor) -> None:
    if tensor.shape != weight.shape:
        raise ValueError(f"the source has shape {list(tensor.shape)}, the model {list(weight.shape)}.")


def _of_numbers(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    _check_shape(tensor, weight)
    if not ((tensor == 0) | (tensor == 1)).all():
        raise ValueError("a mask is bool or holds nothing but 0 and 1.")
    return tensor != 0


def _of_bits(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """MaskLLM's: the bits of the flattened mask, highest bit first, padded to a byte."""
    size = -(-weight.numel() // 8)
    if tensor.dtype != torch.uint8 or tensor.shape != (size,):
        raise ValueError(
            f"the source has {tensor.dtype} of shape {list(tensor.shape)}, and {weight.numel():,} weights need "
            f"{size:,} packed bytes."
        )
    shifts = torch.arange(7, -1, -1)
    return ((tensor.unsqueeze(1) >> shifts) & 1 == 1).flatten()[: weight.numel()].view(weight.shape)


def _adapter_reader(folder: Path, stack: ExitStack, adapter_name: str) -> Reader:
    """The learned mask of a saved mask adapter."""
    config = saved_config(folder)
    tensors = open_adapter(folder, config, stack)

    def read(name: str, layer: MaskProLayer) -> torch.Tensor:
        own = layer.maskpro_config[adapter_name]
        if (config.n, config.m) != (own.n, own.m):
            raise ValueError(
                f"the source is {config.pattern} and the adapter {own.pattern}; pass n={config.n} and m={config.m}."
            )
        return mask_of(saved_codes(tensors, config, name, layer), config.m).to(layer.base_weight.device)

    return read


def saved_codes(
    tensors: Tensors, config: MaskProConfig, name: str, layer: MaskProLayer, rows: slice = ALL
) -> torch.Tensor:
    """The learned mask of some rows of a layer of a saved mask adapter as codes, int32 `[rows, groups]`."""
    key, name = f"base_model.model.{name}.maskpro_", f"{name}{layer.parameter_suffix}"
    if f"{key}mask" not in tensors:
        raise ValueError(f"the source has no mask for {name}.")
    packed = tensors[f"{key}mask"]()
    if len(packed) != layer.out_features:
        raise ValueError(f"{name}: the source has {len(packed)} rows, the model {layer.out_features}.")
    packed = packed[rows]
    try:
        codes = unpack_codes(packed, config.n, config.m, layer.in_features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if f"{key}theta" not in tensors:
        return codes
    theta = tensors[f"{key}theta"]()
    if theta.shape != (layer.out_features, config.m, codes.shape[1]):
        raise ValueError(f"{name}: the source's theta has shape {list(theta.shape)}.")
    theta = theta[rows]
    if theta.dtype not in LOGITS or not theta.isfinite().all():
        raise ValueError(f"{name}: the source's theta is not finite float32 or bfloat16.")
    return mode_codes(theta, packed, logit_scale(config), config.n)
