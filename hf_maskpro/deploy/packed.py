"""2:4 models with packed weights, for decoding. Importing this module registers them with transformers."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..subset.native import compiled
from .check import linear_names, sparse_weights, violation
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
    codes = (kept * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)
    positions = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int32)
    return weight[kept.flatten(1)].view(len(weight), -1), positions


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
    A linear layer with a packed 2:4 weight, for inference: in bfloat16 on a CPU, and in bfloat16 or float16 on a GPU.
    It has no gradients.

    Args:
        in_features (`int`): Inputs, a multiple of 32.
        out_features (`int`): Outputs.
        bias (`bool`): Whether it has a bias.
        dtype (`torch.dtype`): Of values, bias, inputs and outputs.

    Raises:
        `ValueError`: if the inputs are no multiple of 32.
    """

    values: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if in_features % _BLOCK:
            raise ValueError(f"a packed layer has a multiple of {_BLOCK} inputs, not {in_features}.")
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_buffer("values", torch.empty(out_features, in_features // 2, dtype=dtype))
        self.register_buffer("positions", torch.empty(out_features, in_features // _BLOCK, dtype=torch.int32))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)
        self.register_load_state_dict_post_hook(lambda layer, _: _check_packed("a packed layer", layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): `[..., in_features]`, of the layer's dtype and device.

        Returns:
            `torch.Tensor`: `[..., out_features]`.
        """
        dtype, device = self.values.dtype, self.values.device
        if x.dtype != dtype or x.device != device or x.shape[-1] != self.in_features:
            raise ValueError(
                f"this layer takes {self.in_features} inputs in {dtype} on {device}, not {x.shape[-1]} in {x.dtype} "
                f"on {x.device}."
            )
        if x.is_cuda:
            # Only here, since on a CPU there may be no Triton.
            from . import packed_triton

            # Triton launches on the current device, whatever that of its operands is.
            with torch.cuda.device(x.device):
                return packed_triton.linear(x, self.values, self.positions, self.bias)
        if dtype != torch.bfloat16:
            raise ValueError(f"on a CPU packed products are in bfloat16, and this layer's values are {dtype}.")
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

    Raises:
        `ValueError`: if they are no list of names.
    """

    def __init__(self, modules_to_not_convert: Any = None, **others: Any) -> None:
        dense = modules_to_not_convert
        if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
            raise ValueError(
                f"modules_to_not_convert of a packed model's quantization_config is {str(dense)[:50]!r}, which is no "
                "list of names."
            )
        self.quant_method = METHOD
        self.modules_to_not_convert = dense


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """By which `from_pretrained` loads a packed model."""

    requires_calibration = True
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **options: Any) -> None:
        if not torch.cuda.is_available():
            _library()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        dense = set(self.quantization_config.modules_to_not_convert)
        # Of a model without its head, layers are called without the prefix.
        dense |= {name.removeprefix(f"{model.base_model_prefix}.") for name in dense}
        for name in set(_linear_layers(model)) - dense:
            linear = model.get_submodule(name)
            try:
                with torch.device("meta"):
                    packed = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None)
            except ValueError as error:
                raise ValueError(f"{name} is not in modules_to_not_convert: {error}") from error
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLinear):
                if layer.values.is_cpu:
                    _library()
                for kind, tensor in layer.named_buffers():
                    # The mark that transformers gives to what it has loaded; anything else is memory as it was found.
                    if not hasattr(tensor, "_is_hf_initialized"):
                        raise ValueError(f"the packed model's file has no {name}.{kind}.")
                _check_packed(name, layer)


def _check_packed(name: str, layer: PackedLinear) -> None:
    """Refuse what a file must not hold: the compiled products trust their operands, and read beyond smaller ones."""
    out_features, in_features = layer.out_features, layer.in_features
    expected = {
        "values": (layer.dtype, (out_features, in_features // 2)),
        "positions": (torch.int32, (out_features, in_features // _BLOCK)),
        "bias": (layer.dtype, (out_features,)),
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
    bits = torch.arange(8, dtype=torch.uint8, device=layer.positions.device)
    kept = (layer.positions.view(torch.uint8).unsqueeze(-1) >> bits & 1 == 1).flatten(1)
    return torch.zeros_like(kept, dtype=layer.values.dtype).masked_scatter_(kept, layer.values)


def _packed(name: str, layer: nn.Linear) -> PackedLinear:
    """
    Raises:
        `ValueError`: if what is packed is not the layer's weight.
    """
    weight = layer.weight.detach()
    with torch.device("meta"):
        packed = PackedLinear(layer.in_features, layer.out_features, layer.bias is not None, weight.dtype)
    packed.values, packed.positions = pack(weight)
    if not torch.equal(_unpacked(packed), weight):
        raise ValueError(f"{name} is not what its packed values and positions say.")
    packed.bias = None if layer.bias is None else layer.bias.detach()
    return packed.train(layer.training)


@torch.no_grad()
def pack_layers(model: nn.Module) -> dict[str, str]:
    """
    Pack the 2:4 layers of a merged model in place, layer by layer, for decoding on the device that they are on.

    Args:
        model (`torch.nn.Module`): A merged model: bfloat16 on a CPU, bfloat16 or float16 on a GPU.

    Returns:
        `dict[str, str]`: By parameter, why a linear layer besides the output head was left dense.

    Raises:
        `ValueError`: if none of its layers qualifies.
    """
    left, names = {}, linear_names(model)
    for name in tqdm(names, desc="packing", disable=None):
        layer = name.removesuffix(".weight")
        module: Any = model.get_submodule(layer)
        if reason := _why_dense(module):
            left[name] = reason
        else:
            model.set_submodule(layer, _packed(name, module))
    if len(left) == len(names):
        raise ValueError(f"no layer can be packed; {names[0]}: {left[names[0]]}.")
    return left


def _why_dense(module: nn.Module) -> str | None:
    """Why a linear layer cannot be packed, or `None` if it can."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} has a forward of its own"
    weight = module.weight.detach()
    if weight.dtype != torch.bfloat16 and not (weight.is_cuda and weight.dtype == torch.float16):
        return f"it is {weight.dtype} on {weight.device}, not bfloat16 or on a GPU float16"
    if module.in_features % _BLOCK:
        return f"its {module.in_features:,} inputs are no multiple of {_BLOCK}"
    return violation(weight, 2, 4)


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
            model.set_submodule(name, _packed(f"{name}.weight", layer))
        model.config.quantization_config = PackedConfig(sorted(layers.keys() - packable.keys()))
        model.save_pretrained(folder)
        drop_sparsity_config(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return {"layers": len(packable), "dense_layers": len(layers) - len(packable)}
