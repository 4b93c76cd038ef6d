"""From an adapter to an ordinary sparse checkpoint, and the check that it is one."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import inject_adapter_in_model
from safetensors import safe_open
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .initialization.sources import Tensors, locate, open_tensors, saved_codes
from .subset import keep_of
from .tuner import masked_layers, saved_config
from .tuner.card import write_merged_card
from .tuner.layer import MaskProLayer, to_planes
from .tuner.model import fingerprint


_NOT_MASKED = {
    "embed_tokens",
    "embed_positions",
    "wte",
    "wpe",
    "shared",
    "lm_head",
    "embed_out",
    "score",
    "classifier",
}
# What belongs to a checkpoint besides its weights. A model card would describe the dense model.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "additional_chat_templates/*")
_IN_MEMORY = "model.merge_and_unload(safe_merge=True)"
# Masks are unfolded for so many rows at a time.
_ROWS = 1024


def check_sparsity(
    model: nn.Module | Mapping[str, torch.Tensor] | str | Path, n: int, m: int, names: Iterable[str] | None = None
) -> dict[str, float]:
    """
    Check that every group of m consecutive input weights has at most n non-zeros.

    Args:
        model (`torch.nn.Module`, `dict` or `str`): A model, a state dict, or the folder of a safetensors checkpoint.
            In a state dict the weight of a `Conv1D` cannot be told from that of a linear layer: pass the model.
        n (`int`): Non-zeros allowed per group.
        m (`int`): Size of a group.
        names (`Iterable[str]`, *optional*): Parameters to check. By default the weight of every linear layer except
            the output head.

    Returns:
        `dict[str, float]`: Share of zeros by parameter.

    Raises:
        `ValueError`: naming the first parameter that violates the pattern, or if there is nothing to check.
    """
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} is no pattern; n is at least 1 and m no less.")
    wanted = None if names is None else set(names)
    report = {}
    for name, weight in _linear_weights(model):
        if wanted is not None and name not in wanted:
            continue
        if problem := _violation(weight, n, m):
            raise ValueError(f"{name}: {problem}.")
        report[name] = 1 - torch.count_nonzero(weight).item() / weight.numel()
    if missing := (wanted or set()) - set(report):
        raise ValueError(f"{sorted(missing)[0]} is not a linear weight of the model.")
    if not report:
        raise ValueError("there is no linear weight to check.")
    return report


def _violation(weight: torch.Tensor, n: int, m: int) -> str | None:
    """How a weight violates a pattern, or `None`."""
    if weight.shape[1] % m:
        return f"{weight.shape[1]} inputs do not divide into groups of {m}"
    nonzeros = (to_planes(weight, m) != 0).sum(1)
    if int(nonzeros.max()) <= n:
        return None
    groups = int((nonzeros > n).sum())
    return f"{groups:,} of {nonzeros.numel():,} groups have more than {n} of {m} non-zeros"


def sparse_weights(model: nn.Module | Mapping[str, torch.Tensor], n: int, m: int) -> list[str]:
    """The linear weights of a model or state dict that have a pattern."""
    return [name for name, weight in _linear_weights(model) if _violation(weight, n, m) is None]


def to_semi_structured(model: nn.Module) -> dict[str, str]:
    """
    Convert the 2:4 layers of a merged model on CUDA to torch's semi-structured tensors, in place and layer by layer.

    The products then run on sparse tensor cores, in one direction: for inference alone. There is no file format for
    the converted weights; convert after every load.

    Args:
        model (`torch.nn.Module`): A merged model in float16 or bfloat16 on a GPU of compute capability 8.0 or newer.

    Returns:
        `dict[str, str]`: By parameter, why a linear layer besides the output head was left dense.

    Raises:
        `ValueError`: if the model is not on such a GPU, or none of its layers qualifies.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"the model is on {device}, and torch's 2:4 products need CUDA; move it there first.")
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        raise ValueError(f"compute capability {capability[0]}.{capability[1]} has no 2:4 products; 8.0 is the first.")
    left, names = {}, _linear_names(model)
    for name in tqdm(names, desc="converting", disable=None):
        module = model.get_submodule(name.removesuffix(".weight"))
        if reason := _why_dense(module):
            left[name] = reason
        else:
            sparse = torch.sparse.to_sparse_semi_structured(module.get_parameter("weight").detach())
            module.weight = nn.Parameter(sparse, requires_grad=False)
    if len(left) == len(names):
        raise ValueError(f"no layer can be converted; {names[0]}: {left[names[0]]}.")
    return left


def _why_dense(module: nn.Module) -> str | None:
    """Why torch cannot multiply by a linear layer's weight as a 2:4 one, or `None` if it can."""
    if isinstance(module, Conv1D):
        return "Conv1D multiplies by the transposed weight"
    weight = module.get_parameter("weight").detach()
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"it is {weight.dtype}, not float16 or bfloat16"
    # cuSPARSELt's, which is torch's default.
    if any(size % 16 for size in weight.shape):
        return f"its shape is {list(weight.shape)}, and both must be multiples of 16"
    return _violation(weight, 2, 4)


def _linear_weights(model: nn.Module | Mapping[str, torch.Tensor] | str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of linear layers as `[out_features, in_features]`, one at a time."""
    if isinstance(model, nn.Module):
        if any(isinstance(module, MaskProLayer) for module in model.modules()):
            raise ValueError("the model has a mask adapter that is not merged; call merge_and_unload first.")
        for name in _linear_names(model):
            yield name, _rows(model, name)(model.get_parameter(name).detach())
    elif isinstance(model, Mapping):
        for name, weight in model.items():
            if name.endswith(".weight") and weight.ndim == 2 and not _NOT_MASKED & set(name.split(".")):
                yield name, weight
    else:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json; pass the folder of a checkpoint.")
        skeleton = _skeleton(folder)
        names = set(_linear_names(skeleton))
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                for key, name in _parameter_names(skeleton, tensors.keys()).items():
                    if name in names:
                        yield name, _rows(skeleton, name)(tensors.get_tensor(key))


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads, which need not be all that lie there."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise ValueError(f"{folder} has no safetensors checkpoint.")
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _parameter_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """
    The parameters that tensors of a checkpoint become as transformers loads them; without those that it converts, such
    as experts that it fuses.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    names = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if converted is None:
            names[key] = name
    return names


def _linear_names(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _rows(model: nn.Module, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    transposed = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
    return lambda weight: weight.T if transposed else weight


@contextmanager
def new_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    A temporary folder that takes the place of `output` once it is complete.

    Args:
        output (`str` or `Path`): The folder to make.
        overwrite (`bool`): Replace a folder that is there.

    Raises:
        `ValueError`: if the folder is in use and `overwrite` is not set.
    """
    output = Path(output).resolve()
    check_free(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as parent:
        folder = Path(parent) / "new"
        folder.mkdir()
        yield folder
        if not output.exists():
            folder.rename(output)
            return
        # Outside the temporary folder, which is deleted even if the second renaming fails.
        old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.old-")) / output.name
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old.parent)


def check_free(output: str | Path, overwrite: bool, *inputs: str | Path | None) -> None:
    """
    Raises:
        `ValueError`: if `output` is a file, or a folder in use and `overwrite` is not set, or it holds an input.
    """
    output = Path(output)
    for given in inputs:
        path = Path(given or "").resolve()
        if given and path.exists() and output.resolve() in (path, *path.parents):
            raise ValueError(f"{output} holds {given}, which would be lost; choose another output folder.")
    if output.is_file():
        raise ValueError(f"{output} is a file; choose another output folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} is not empty; choose another output folder or pass --overwrite.")


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
            not the one that the mask was learned for, or a kept weight is not finite.
    """
    check_free(output, overwrite, model, adapter)
    base, masks = checkpoint_folder(model), locate(str(adapter))
    if "quantization_config" in json.loads((base / "config.json").read_text()):
        raise ValueError(f"{model} is quantized; merge into the checkpoint that it was quantized from.")
    config, skeleton = saved_config(masks), _skeleton(base)
    files = weight_files(base)
    with ExitStack() as stack:
        keys = list(open_tensors(files, stack))
        names = _parameter_names(skeleton, keys)
        # Only the tuner knows which layers the adapter is for, and which it cannot mask.
        layers = masked_layers(inject_adapter_in_model(config, skeleton))
        saved = open_tensors([masks / "adapter_model.safetensors"], stack)
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
            write_merged_card(folder, config)
            return check_sparsity(folder, config.n, config.m, [f"{name}.weight" for name in layers])


def copy_companions(base: Path, folder: Path, files: list[Path]) -> None:
    """Copy what belongs to a checkpoint besides these weights, without what other tools would make of it."""
    for pattern in _COMPANIONS:
        for path in base.glob(pattern):
            # An index beside a single file is that of other weights.
            if path.name != SAFE_WEIGHTS_INDEX_NAME or files[0].name != SAFE_WEIGHTS_NAME:
                (folder / path.relative_to(base)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / path.relative_to(base))
    drop_sparsity_config(folder)


def drop_sparsity_config(folder: Path) -> None:
    """Take what an earlier compression left out of `config.json`: vLLM fails on it."""
    raw = json.loads((folder / "config.json").read_text())
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
