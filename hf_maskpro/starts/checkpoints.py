"""Where the tensors of a checkpoint come to lie in a model's parameters as transformers loads them."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from ..tuner.experts import expert_parameters, is_transposed
from ..tuner.files import open_safetensors


Shape = tuple[int, ...]


@dataclass
class Matrix:
    """
    A parameter of a model that multiplies what a layer is given; or one for every expert, one below the other.

    Attributes:
        shape (`tuple[int, ...]`): Of the parameter: `[out_features, in_features]` or `[experts, out_features,
            in_features]`.
        transposed (`bool`): Whether the last two are the other way round.
    """

    shape: Shape
    transposed: bool

    @property
    def rows(self) -> int:
        """The rows of one matrix."""
        return self.shape[-1 if self.transposed else -2]

    @property
    def column(self) -> Shape:
        """The shape that the parameter would have with one column."""
        return (*self.shape[:-2], 1, self.rows) if self.transposed else (*self.shape[:-1], 1)


@dataclass
class Piece:
    """
    Rows of a checkpoint's tensor, and which rows of a parameter they become.

    Attributes:
        parameter (`str`): The parameter's name.
        rows (`slice`): Of the parameter as `[rows, in_features]`.
        matrix (`int`): Which matrix of the tensor they are in, if it has three dimensions.
        source (`slice`): Which of its rows they are.
        transposed (`bool`): Whether that matrix is stored as `[in_features, rows]`.
    """

    parameter: str
    rows: slice
    matrix: int
    source: slice
    transposed: bool

    def matrix_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix of a checkpoint's tensor, `[rows, in_features]`; a view."""
        matrix = tensor if tensor.ndim == 2 else tensor[self.matrix]
        return matrix.T if self.transposed else matrix


def matrices_of(model: nn.Module) -> dict[str, Matrix]:
    """The weights of a model's linear layers and experts, by name, whatever masks them."""
    found = {}
    for name, module in model.named_modules():
        name = name.replace(".base_layer", "")
        if isinstance(module, (nn.Linear, Conv1D)):
            found[f"{name}.weight"] = Matrix(tuple(module.weight.shape), isinstance(module, Conv1D))
        for parameter in expert_parameters(module):
            shape = tuple(module.get_parameter(parameter).shape)
            found[f"{name}.{parameter}"] = Matrix(shape, bool(is_transposed(module)))
    return found


def shapes_of(files: Iterable[Path]) -> dict[str, Shape]:
    """
    The shape of every tensor of some safetensors files.

    Raises:
        `ValueError`: if one is none.
    """
    shapes: dict[str, Shape] = {}
    for file in files:
        with open_safetensors(file) as tensors:
            shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return shapes


def pieces_of(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> dict[str, list[Piece]]:
    """
    What the tensors of a checkpoint hold of a model's linear layers and experts.

    Args:
        model (`PreTrainedModel`): The model, which need not have memory, and may be masked.
        shapes (`dict[str, tuple[int, ...]]`): Of the checkpoint's tensors.

    Returns:
        `dict[str, list[Piece]]`: By the key of a tensor that holds any.

    Raises:
        `ValueError`: if a tensor has another shape than the model says.
    """
    matrices = matrices_of(model)
    parameters = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    pieces: dict[str, list[Piece]] = {}
    converted: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    # In the order in which transformers puts experts one after the other.
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if pattern is not None:
            converter = next(entry for entry in converters if pattern in entry.source_patterns)
            _, sources = converted.setdefault(name, (converter, {}))
            sources.setdefault(pattern, []).append(key)
        elif name in matrices:
            matrix, rows = matrices[name], matrices[name].rows
            if shapes[key] != matrix.shape:
                raise ValueError(
                    f"{name}: the checkpoint has shape {list(shapes[key])}, the model {list(matrix.shape)}."
                )
            pieces[key] = [
                Piece(name, slice(i * rows, (i + 1) * rows, 1), i, slice(0, rows, 1), matrix.transposed)
                for i in range(matrix.shape[0] if len(matrix.shape) == 3 else 1)
            ]
    for name, (converter, sources) in converted.items():
        if not all(len(shapes[key]) in (2, 3) for keys in sources.values() for key in keys):
            continue
        for key, found in _converted(model, name, converter, sources, shapes, matrices).items():
            pieces.setdefault(key, []).extend(found)
    return pieces


def _converted(
    model: PreTrainedModel,
    name: str,
    converter: WeightConverter,
    sources: dict[str, list[str]],
    shapes: Mapping[str, Shape],
    matrices: Mapping[str, Matrix],
) -> dict[str, list[Piece]]:
    """
    What a converter makes of tensors, found out by letting it convert the numbers of their rows: a column stands for
    all of them.
    """
    # Some look at the shape that the parameter has.
    sized = SimpleNamespace(get_parameter=lambda key: torch.empty(matrices[key].column, device="meta"))
    # The columns may be the last dimension of the tensors, or the one before it.
    for transposed in (False, True):
        numbers, first, total = deepcopy(converter), {}, 0
        for pattern, keys in sources.items():
            for key in keys:
                shape = list(shapes[key])
                shape[-2 if transposed else -1] = 1
                first[key] = total
                total += prod(shape)
                numbers.collected_tensors[pattern].append(torch.arange(first[key], total).view(shape))
        try:
            results = numbers.convert(name, model=sized, config=model.config)
            pieces = _pieces(results, first, total, transposed, shapes, matrices)
        # What does not go by rows.
        except (RuntimeError, ValueError, KeyError, AttributeError, IndexError):
            continue
        if pieces:
            return pieces
    return {}


def _pieces(
    results: dict[str, torch.Tensor],
    first: dict[str, int],
    total: int,
    transposed: bool,
    shapes: Mapping[str, Shape],
    matrices: Mapping[str, Matrix],
) -> dict[str, list[Piece]]:
    """What became of the rows of tensors, by the numbers that they had; each tensor's first one is given."""
    pieces: dict[str, list[Piece]] = {}
    for parameter, result in results.items():
        if parameter not in matrices or result.shape != matrices[parameter].column:
            continue
        numbers = (result.transpose(-1, -2) if matrices[parameter].transposed else result).flatten()
        becomes = torch.full((total,), -1).scatter_(0, numbers, torch.arange(len(numbers)))
        for key, start in first.items():
            height = shapes[key][-1 if transposed else -2]
            for matrix in range(shapes[key][0] if len(shapes[key]) == 3 else 1):
                rows = becomes[start + matrix * height :][:height]
                held = (rows >= 0).nonzero().flatten()
                if len(held):
                    piece = Piece(parameter, _as_slice(rows[held]), matrix, _as_slice(held), transposed)
                    pieces.setdefault(key, []).append(piece)
    return pieces


def _as_slice(indices: torch.Tensor) -> slice:
    """
    Indices as a slice.

    Raises:
        `ValueError`: if they are none.
    """
    first, last = int(indices[0]), int(indices[-1])
    step = max(1, int(indices[1]) - first) if len(indices) > 1 else 1
    if not torch.equal(indices, torch.arange(first, last + 1, step)):
        raise ValueError("rows come in another order.")
    return slice(first, last + 1, step)
