"""From an adapter to an ordinary sparse checkpoint, and the check that it is one."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .tuner.layer import MaskProLayer, to_planes


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
    wanted = None if names is None else set(names)
    report = {}
    for name, weight in _linear_weights(model):
        if wanted is not None and name not in wanted:
            continue
        if weight.shape[1] % m:
            raise ValueError(f"{name}: {weight.shape[1]} inputs do not divide into groups of {m}.")
        nonzeros = (to_planes(weight, m) != 0).sum(1)
        if int(nonzeros.max()) > n:
            groups = int((nonzeros > n).sum())
            raise ValueError(f"{name}: {groups:,} of {nonzeros.numel():,} groups have more than {n} of {m} non-zeros.")
        report[name] = 1 - nonzeros.sum().item() / weight.numel()
    if missing := (wanted or set()) - set(report):
        raise ValueError(f"{sorted(missing)[0]} is not a linear weight of the model.")
    if not report:
        raise ValueError("there is no linear weight to check.")
    return report


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
        files = sorted(Path(model).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{model} has no safetensors checkpoint.")
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        names = set(_linear_names(skeleton))
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, the handle is no dict
                    if name in names:
                        yield name, _rows(skeleton, name)(tensors.get_tensor(name))


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
    output = Path(output)
    check_free(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as parent:
        folder = Path(parent) / "new"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(Path(parent) / "old")
        folder.rename(output)


def check_free(output: str | Path, overwrite: bool) -> None:
    """
    Raises:
        `ValueError`: if `output` is a file, or a folder in use and `overwrite` is not set.
    """
    output = Path(output)
    if output.is_file():
        raise ValueError(f"{output} is a file; choose another output folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} is not empty; choose another output folder or pass --overwrite.")


def merge(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase | None, output: str | Path, overwrite: bool = False
) -> dict[str, float]:
    """
    Write the ordinary sparse checkpoint of a model with an active mask adapter: zeros in a plain dense file.

    The model is merged in place. The checkpoint is checked before it takes its place on disk.

    Args:
        model ([`~peft.PeftModel`]): The model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Saved beside it.
        output (`str` or `Path`): The folder to write.
        overwrite (`bool`): Replace a folder that is in use.

    Returns:
        `dict[str, float]`: Share of zeros by masked parameter.

    Raises:
        `ValueError`: if the folder is in use, or a weight is not finite.
    """
    config = model.peft_config[model.active_adapter]
    names = [f"{name}.weight" for name in model.base_model.targeted_module_names]
    with new_folder(output, overwrite) as folder:
        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return check_sparsity(folder, config.n, config.m, names)
