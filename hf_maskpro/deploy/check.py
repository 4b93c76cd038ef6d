"""The check that a model has a pattern of sparsity."""

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..starts.checkpoints import Matrix, matrices_of, pieces_of, shapes_of
from ..starts.sources import open_tensors
from ..subset import group_members
from ..tuner import MaskProLayer
from ..tuner.experts import router_names
from ..tuner.files import json_object, weight_files


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
            In a state dict experts and the weight of a `Conv1D` cannot be told from others: pass the model.
        n (`int`): Non-zeros allowed per group.
        m (`int`): Size of a group.
        names (`Iterable[str]`, *optional*): Parameters to check. By default the weights of every linear layer and
            expert, except the output head and routers.

    Returns:
        `dict[str, float]`: Share of zeros by parameter.

    Raises:
        `ValueError`: naming the first parameter that violates the pattern, or if there is nothing to check.
    """
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} is no pattern; n is at least 1 and m no less.")
    return check_weights(_linear_weights(model, everything=names is not None), n, m, names)


def check_weights(
    weights: Iterable[tuple[str, torch.Tensor]], n: int, m: int, names: Iterable[str] | None
) -> dict[str, float]:
    """[`check_sparsity`] of weights `[out_features, in_features]` with their names."""
    wanted = None if names is None else set(names)
    zeros: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, weight in weights:
        if wanted is not None and name not in wanted:
            continue
        if problem := violation(weight, n, m):
            raise ValueError(f"{name}: {problem}.")
        # Of experts the matrices come one by one.
        zeros[name] = zeros.get(name, 0) + weight.numel() - int(torch.count_nonzero(weight))
        sizes[name] = sizes.get(name, 0) + weight.numel()
    if missing := (wanted or set()) - set(sizes):
        raise ValueError(f"{sorted(missing)[0]} is not a linear weight of the model.")
    if not sizes:
        raise ValueError("there is no linear weight to check.")
    return {name: zeros[name] / size for name, size in sizes.items()}


def violation(weight: torch.Tensor, n: int, m: int) -> str | None:
    """How a weight violates a pattern, or `None`."""
    if weight.shape[1] % m:
        return f"{weight.shape[1]} inputs do not divide into groups of {m}"
    nonzeros = (group_members(weight, m) != 0).sum(1)
    if int(nonzeros.max()) <= n:
        return None
    groups = int((nonzeros > n).sum())
    return f"{groups:,} of {nonzeros.numel():,} groups have more than {n} of {m} non-zeros"


def sparse_weights(model: nn.Module | Mapping[str, torch.Tensor], n: int, m: int) -> list[str]:
    """The linear weights of a model or state dict that have a pattern."""
    found: dict[str, bool] = {}
    for name, weight in _linear_weights(model):
        found[name] = found.get(name, True) and violation(weight, n, m) is None
    return [name for name, sparse in found.items() if sparse]


def _linear_weights(
    model: nn.Module | Mapping[str, torch.Tensor] | str | Path, everything: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The weights of linear layers as `[out_features, in_features]`, one at a time: of experts many by one name. Output
    head and routers are among them if `everything` is.
    """
    if isinstance(model, nn.Module):
        if any(isinstance(module, MaskProLayer) for module in model.modules()):
            raise ValueError("the model has a mask adapter that is not merged; call merge_and_unload first.")
        for name, matrix in (matrices_of(model) if everything else _checked(model)).items():
            weight = model.get_parameter(name).detach()
            for one in weight if weight.ndim == 3 else [weight]:
                yield name, one.T if matrix.transposed else one
    elif isinstance(model, Mapping):
        left = set() if everything else _NOT_MASKED
        for name, weight in model.items():
            if name.endswith(".weight") and weight.ndim == 2 and not left & set(name.split(".")):
                yield name, weight
    else:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json; pass the folder of a checkpoint.")
        skeleton = skeleton_of(folder)
        yield from saved_weights(folder, skeleton, matrices_of(skeleton) if everything else _checked(skeleton))


def saved_weights(
    folder: Path, skeleton: PreTrainedModel, names: Container[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of a checkpoint, by their names, as `[out_features, in_features]`, piece by piece."""
    files = weight_files(folder)
    pieces = pieces_of(skeleton, shapes_of(files))
    for file in files:
        with ExitStack() as stack:
            for key, get in open_tensors([file], stack).items():
                for piece in pieces.get(key, []):
                    if piece.parameter in names:
                        yield piece.parameter, piece.matrix_of(get())[piece.source]


def skeleton_of(folder: Path, model_class: str | None = None) -> PreTrainedModel:
    """
    The model of a checkpoint, without memory for its weights.

    Args:
        folder (`Path`): The checkpoint.
        model_class (`str`, *optional*): Its class in transformers. By default the one that it was saved from. Where
            that is no model of transformers, it is the causal language model of its architecture.

    Raises:
        `ValueError`: if its `config.json` does not describe one.
    """
    json_object(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
        known = getattr(transformers, model_class or (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if isinstance(known, type) and issubclass(known, PreTrainedModel):
                return known(config)
            return AutoModelForCausalLM.from_config(config)
    # The file is anybody's, and a model's constructor looks at no types.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder / 'config.json'} describes no model of transformers: {reason:.300}") from error


def _checked(model: nn.Module) -> dict[str, Matrix]:
    """What is checked by default: the weights of linear layers and experts, without the output head and routers."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    left = {f"{name}.weight" for name in router_names(model)}
    left |= {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return {name: matrix for name, matrix in matrices_of(model).items() if name not in left}


def linear_names(model: nn.Module) -> list[str]:
    """The weights of a model's linear layers, by name, without that of its output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
