"""The masked form of experts that a layer keeps in 3-D parameters, as transformers does."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import MaskProConfig
from .layer import MaskProLayer, onloaded, over


# What transformers' kernels multiply by.
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
# What decides where tokens go, and how much of a shared expert joins, is a millionth of the weights and is left alone.
ROUTERS = {"router", "gate", "shared_expert_gate"}

OFFLOADED = "its weight is offloaded; add the adapter to the whole model, then offload that"


class MaskProExpertWeight(MaskProLayer):
    """
    A masked 3-D parameter of an experts module: as many matrices as there are experts, one below the other.

    Its name in the model is that of the parameter.
    """

    parameter_suffix = ""

    def __init__(self, experts: nn.Module, parameter_name: str, adapter_name: str, config: MaskProConfig) -> None:
        self.parameter_name = parameter_name
        self.experts, first, second = getattr(experts, parameter_name).shape
        self.is_transposed = bool(is_transposed(experts))
        self.rows_per_expert = second if self.is_transposed else first
        super().__init__(experts, adapter_name, config)
        # It is the module around this that has the experts; here it would give their parameters a second name.
        del self.base_layer
        object.__setattr__(self, "base_layer", experts)

    def out_in(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.ndim == 2:
            weight = weight.unflatten(0, (self.experts, self.rows_per_expert))
            return weight.transpose(1, 2) if self.is_transposed else weight
        return (weight.transpose(1, 2) if self.is_transposed else weight).flatten(0, 1)

    def matrix(self, number: int) -> torch.Tensor:
        weight = self.base_weight[number]
        return weight.T if self.is_transposed else weight

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """The parameter as the experts read it."""
        names = self._adapters_to_apply()
        return self._mask_weight(names) if names else self.base_weight

    def __repr__(self) -> str:
        return "maskpro." + super().__repr__()


class MaskProExperts(nn.Module):
    """
    An experts module, some of whose parameters are masked: its forward, by whatever kernel, finds the masked ones in
    their place.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = experts

    def mask(self, parameter_name: str, adapter_name: str, config: MaskProConfig) -> MaskProExpertWeight:
        """Add an adapter to a parameter."""
        if parameter_name in self._modules:
            layer = self.get_submodule(parameter_name)
            assert isinstance(layer, MaskProExpertWeight)
            layer.update_layer(adapter_name, config)
        else:
            layer = MaskProExpertWeight(self.base_layer, parameter_name, adapter_name, config)
            layer.train(self.training)
            self.add_module(parameter_name, layer)
        return layer

    def masked(self) -> list[MaskProExpertWeight]:
        """What masks the parameters."""
        return [child for child in self.children() if isinstance(child, MaskProExpertWeight)]

    def matrix(self, parameter_name: str, number: int) -> torch.Tensor:
        """What one expert's tokens are multiplied by, dense, `[out_features, in_features]`; a view."""
        weight = self.base_layer.get_parameter(parameter_name)[number]
        return weight.T if is_transposed(self.base_layer) else weight

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"a {type(self.base_layer).__name__} lies between masked experts and their mask, which would be lost; "
                "put the other adapter on other layers."
            )
        with (
            onloaded(self.masked()),
            over(self.base_layer, {layer.parameter_name: layer() for layer in self.masked()}),
        ):
            return self.base_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts, merged if asked for."""
        for layer in self.masked():
            layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.base_layer


def is_transposed(module: nn.Module) -> bool | None:
    """
    Whether the experts of a module are stored as `[experts, in_features, out_features]`, rather than `[experts,
    out_features, in_features]`; `None` if it has none, or does not tell.
    """
    # So transformers marks the classes whose forward is one of its kernels.
    if "is_transposed" in vars(module):
        return vars(module)["is_transposed"]
    shapes = {name: weight.shape[1:] for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
    if shapes.keys() != {"gate_up_proj", "down_proj"}:
        return None
    (rows, columns), (out_features, in_features) = shapes["gate_up_proj"], shapes["down_proj"]
    if (rows, columns) == (2 * in_features, out_features):
        return False
    return True if (columns, rows) == (2 * out_features, in_features) else None


def expert_parameters(module: nn.Module) -> list[str]:
    """The parameters of a module that are the weights of experts."""
    if is_transposed(module) is None:
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if name in WEIGHTS]


def has_kernels(module: nn.Module) -> bool:
    """Whether experts are called as transformers' kernels are: with tokens, and which experts each goes to."""
    return "is_transposed" in vars(module)


def why_not(module: nn.Module, parameter_name: str, config: MaskProConfig, places: dict[int, list[str]]) -> str | None:
    """Why a parameter cannot be masked, or `None` if it can; `places` has the layers that each parameter is in."""
    if parameter_name not in expert_parameters(module):
        return "it is not the weights of experts; name linear layers in target_modules, and change target_parameters"
    weight = module.get_parameter(parameter_name)
    if weight.is_meta and "_hf_hook" in vars(module):
        return OFFLOADED
    if weight.dtype.itemsize < 2:
        return f"it is {weight.dtype}, and quantized experts are not supported; leave it out of target_parameters"
    if len(shared := places[id(weight)]) > 1:
        return (
            f"{' and '.join(shared)} share one weight, and a mask is for one layer; exclude them by exclude_modules, "
            "or leave them out of target_parameters"
        )
    if config.on_indivisible == "error" and (in_features := expert_inputs(module, parameter_name)) % config.m:
        return (
            f"its experts' in_features {in_features} is not a multiple of m = {config.m}; take it out of "
            "target_parameters, or leave all such layers dense by on_indivisible='dense'"
        )
    return None


def expert_inputs(module: nn.Module, parameter_name: str) -> int:
    """The `in_features` of experts."""
    return module.get_parameter(parameter_name).shape[1 if is_transposed(module) else 2]


def router_names(model: nn.Module) -> set[str]:
    """The linear layers that decide where tokens go, beside experts."""
    names = set()
    for prefix, module in model.named_modules():
        if any(_are_experts(name, child) for name, child in module.named_children()):
            for name, inner in module.named_modules():
                # An expert's own gate is none.
                if isinstance(inner, nn.Linear) and not name.startswith("experts.") and ROUTERS & set(name.split(".")):
                    names.add(f"{prefix}.{name}".removeprefix("."))
    return names


def _are_experts(name: str, module: nn.Module) -> bool:
    """Whether a child is what routers send tokens to, as one module or as modules one by one."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return name == "experts"
    return isinstance(module, MaskProExperts) or bool(expert_parameters(module))
