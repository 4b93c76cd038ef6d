"""2:4 models with packed weights, for decoding on a CPU. Importing this module registers them with transformers."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..subset.native import compiled
from .check import sparse_weights
from .folders import new_folder
from .merge import drop_sparsity_config


METHOD = "maskpro_2of4"
# Weights that share a word of positions.
_BLOCK = 32
# With more tokens than these, dense products on an unpacked weight are faster.
_FEW_TOKENS = 8
# Rows that are unpacked at a time: larger buffers come fresh from the system, which takes longer than to fill them.
_ROWS = 1024


@cache
def _library() -> ctypes.CDLL:
    library = compiled(Path(__file__).with_name("packed.cpp"), "packed products")
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.product.argtypes = [pointer, pointer, pointer, pointer, size, size, size, ctypes.c_int]
    library.unpack.argtypes = [pointer, pointer, pointer, size, size, ctypes.c_int]
    return library


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The non-zeros of a 2:4 weight and where they belong: 0.5625 of its bytes.

    Args:
        weight (`torch.Tensor`): Any dtype, `[out_features, in_features]`, with `in_features` a multiple of 32.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The values, two of each group of four in order, of the weight's dtype
            `[out_features, in_features / 2]`; and int32 `[out_features, in_features / 32]`, of which bit i is set if
            the value of input i of 32 is there.
    """
    kept = weight.unflatten(1, (-1, 4)) != 0
    # A group with fewer than two non-zeros keeps some of its zeros.
    kept |= (~kept).cumsum(-1, dtype=torch.int8) <= 2 - kept.sum(-1, keepdim=True, dtype=torch.int8)
    kept = kept.flatten(1)
    positions = torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little")).view(torch.int32)
    return weight[kept].view(len(weight), -1), positions


def unpack(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    The dense weight of what [`pack`] gives.

    Args:
        values (`torch.Tensor`): bfloat16 `[out_features, in_features / 2]`, on the CPU.
        positions (`torch.Tensor`): int32 `[out_features, in_features / 32]`, on the CPU.

    Returns:
        `torch.Tensor`: bfloat16 `[out_features, in_features]`.
    """
    weight = torch.empty(len(values), 2 * values.shape[1], dtype=torch.bfloat16)
    pointers = values.data_ptr(), positions.data_ptr(), weight.data_ptr()
    _library().unpack(*pointers, weight.shape[1], weight.shape[0], torch.get_num_threads())
    return weight


class PackedLinear(nn.Module):
    """
    A linear layer with a packed 2:4 weight, for inference in bfloat16 on a CPU. It has no gradients.

    Args:
        in_features (`int`): Inputs, a multiple of 32.
        out_features (`int`): Outputs.
        bias (`bool`): Whether it has a bias.
    """

    values: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("values", torch.empty(out_features, in_features // 2, dtype=torch.bfloat16))
        self.register_buffer("positions", torch.empty(out_features, in_features // _BLOCK, dtype=torch.int32))
        self.register_buffer("bias", torch.empty(out_features, dtype=torch.bfloat16) if bias else None)
        self.register_load_state_dict_post_hook(lambda layer, _: _check_packed("a packed layer", layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): bfloat16 `[..., in_features]`.

        Returns:
            `torch.Tensor`: bfloat16 `[..., out_features]`.
        """
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.shape[-1] != self.in_features:
            raise ValueError(
                f"this layer takes {self.in_features} inputs in bfloat16 on a CPU, not {x.shape[-1]} in {x.dtype} on "
                f"{x.device}."
            )
        tokens = x.numel() // self.in_features
        if 0 < tokens <= _FEW_TOKENS:
            x, y = x.contiguous(), torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
            pointers = x.data_ptr(), self.values.data_ptr(), self.positions.data_ptr(), y.data_ptr()
            _library().product(*pointers, tokens, self.in_features, self.out_features, torch.get_num_threads())
        else:
            blocks = zip(self.values.split(_ROWS), self.positions.split(_ROWS), strict=True)
            y = torch.cat([F.linear(x, unpack(*block)) for block in blocks], dim=-1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """
    What `config.json` says of a packed model.

    Args:
        modules_to_not_convert (`list[str]`): The linear layers that are dense.
    """

    def __init__(self, modules_to_not_convert: list[str], quant_method: str = METHOD) -> None:
        self.quant_method = quant_method
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """By which `from_pretrained` loads a packed model."""

    requires_calibration = True
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **options: Any) -> None:
        _library()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        dense = set(self.quantization_config.modules_to_not_convert)
        # Of a model without its head, layers are called without the prefix.
        dense |= {name.removeprefix(f"{model.base_model_prefix}.") for name in dense}
        for name in set(_linear_layers(model)) - dense:
            linear = model.get_submodule(name)
            with torch.device("meta"):
                packed = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None)
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLinear):
                for kind, tensor in layer.named_buffers():
                    # The mark that transformers gives to what it has loaded; anything else is memory as it was found.
                    if not hasattr(tensor, "_is_hf_initialized"):
                        raise ValueError(f"the packed model's file has no {name}.{kind}.")
                _check_packed(name, layer)


def _check_packed(name: str, layer: PackedLinear) -> None:
    """Refuse what a file must not hold: the compiled products trust their operands, and read beyond smaller ones."""
    out_features, in_features = layer.out_features, layer.in_features
    expected = {
        "values": (torch.bfloat16, (out_features, in_features // 2)),
        "positions": (torch.int32, (out_features, in_features // _BLOCK)),
        "bias": (torch.bfloat16, (out_features,)),
    }
    for kind, tensor in layer.named_buffers():
        dtype, shape = expected[kind]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name}.{kind} is {tensor.dtype} of shape {list(tensor.shape)}; in a packed layer of this size it is "
                f"{dtype} of shape {list(shape)}."
            )
    bits = layer.positions - (layer.positions >> 1 & 0x55555555)
    bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333)
    if not (bits == 0x22222222).all():
        raise ValueError(f"{name}.positions is not 2:4: there are groups of four without exactly two bits set.")


def _unpacked(layer: PackedLinear) -> torch.Tensor:
    """The dense weight without the compiled [`unpack`], which the machine that exports may not have."""
    positions = layer.positions.view(torch.uint8).numpy()
    kept = torch.from_numpy(np.unpackbits(positions, axis=1, bitorder="little")).bool()
    return torch.zeros(kept.shape, dtype=layer.values.dtype).masked_scatter_(kept, layer.values)


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


@torch.no_grad()
def to_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: str | Path,
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Write a merged 2:4 model with its weights packed. `from_pretrained` loads it wherever this package is imported.

    Args:
        model (`PreTrainedModel`): The merged model. Its layers are packed in place.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Saved beside the weights.
        output (`str` or `Path`): The folder to write.
        overwrite (`bool`): Replace a folder that is in use.

    Returns:
        `dict[str, Any]`: The number of `layers` that are packed, and of `dense_layers`, the output head among them.

    Raises:
        `ValueError`: if no layer can be packed.
    """
    layers, sparse = _linear_layers(model.cpu()), set(sparse_weights(model, 2, 4))
    packable = {
        name: layer
        for name, layer in layers.items()
        if f"{name}.weight" in sparse and layer.weight.dtype == torch.bfloat16 and layer.in_features % _BLOCK == 0
    }
    if not packable:
        raise ValueError(
            f"no layer can be packed: none is a linear layer that is 2:4, in bfloat16 and with a multiple of {_BLOCK} "
            f"inputs; the model is {model.dtype}, and {len(sparse)} of its layers are 2:4."
        )
    with new_folder(output, overwrite) as folder:
        for name, layer in tqdm(packable.items(), desc="packing", disable=None):
            packed = PackedLinear(layer.in_features, layer.out_features, layer.bias is not None)
            packed.values, packed.positions = pack(layer.weight)
            if not torch.equal(_unpacked(packed), layer.weight):
                raise ValueError(f"{name}.weight is not what its packed values and positions say.")
            packed.bias = None if layer.bias is None else layer.bias.detach()
            model.set_submodule(name, packed)
        model.config.quantization_config = PackedConfig(sorted(layers.keys() - packable.keys()))
        model.save_pretrained(folder)
        drop_sparsity_config(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return {"layers": len(packable), "dense_layers": len(layers) - len(packable)}
