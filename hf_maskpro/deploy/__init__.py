"""From an adapter to what runs: merged checkpoints, their check, and the forms that other runtimes take."""

from .check import check_sparsity
from .flat import flatten_inputs
from .folders import check_free, new_folder
from .merge import merge
from .onnx import to_onnx
from .packed import PackedLinear, pack_layers, to_packed
from .semi_structured import to_semi_structured
from .torchao import to_torchao_fp8


__all__ = [
    "PackedLinear",
    "check_free",
    "check_sparsity",
    "flatten_inputs",
    "merge",
    "new_folder",
    "pack_layers",
    "to_onnx",
    "to_packed",
    "to_semi_structured",
    "to_torchao_fp8",
]
