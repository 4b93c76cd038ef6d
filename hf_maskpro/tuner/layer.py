"""The layer that applies a mask to a linear layer's weight, and lets gradients reach the mask's logits."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..subset import (
    Distribution,
    apply_packed,
    check_packed,
    codes_of,
    group_members,
    keep_of,
    mask_of,
    mode,
    mode_and_apply,
    mode_codes,
    pack_codes,
    packed_width,
    sample,
    sample_and_apply,
    sample_codes,
    score,
    score_and_update,
    store_logits,
    theta_gradient,
    uniform_bits,
    unpack_codes,
)
from ..subset.codec import word_layout
from ..subset.kernels import round_at_random
from .base import is_of_bitsandbytes, is_quantized, plain, weight_of
from .config import DATA_FREE, MaskProConfig


# The `C` of learning by backward, under a trainer of ours or a plain one.
PLAIN_LOGIT_SCALE = 6.0
# The types of logits in files.
LOGITS = (torch.float32, torch.bfloat16)

NO_MASK = "they say nothing of what to keep; load an earlier state, or train anew with a smaller learning rate"


@dataclass
class Groups:
    """
    Some groups of a layer, which alone are sampled.

    Attributes:
        rows (`torch.Tensor`): Their rows, int64 `[groups]`.
        places (`torch.Tensor`): Which of its row's groups each is, int64 `[groups]`.
        initial (`torch.Tensor`): Their starting masks, bool `[m, groups]`.
    """

    rows: torch.Tensor
    places: torch.Tensor
    initial: torch.Tensor


class _ApplyMask(torch.autograd.Function):
    """
    The weight with its dropped entries selected to +0; backward is SIMPLE.

    What keeping a weight is worth, to first order gradient times weight, goes to the logits through the exact
    marginals of the conditional Poisson distribution. The logits are rebuilt from the starting mask rather than kept.

    A slope at a kept weight makes less of it than it is worth, and at a dropped one more, by half the loss's curvature
    times the square of the weight. Where the layer is told how to estimate that, it is made up for.
    """

    @staticmethod
    def forward(ctx, weight, theta, layer, adapter_name, seed):
        ctx.layer, ctx.adapter_name, ctx.seed, ctx.curvature = layer, adapter_name, seed, layer.curvature
        masked = layer.masked(weight, adapter_name, seed)
        # The product that it goes into keeps it as well, unless it is cast for that.
        ctx.save_for_backward(weight, theta, *[masked] * (ctx.curvature > 0))
        return masked

    @staticmethod
    def backward(ctx, grad):
        weight, theta, *masked = ctx.saved_tensors
        layer, name = ctx.layer, ctx.adapter_name
        grad_weight = grad_theta = None
        if ctx.needs_input_grad[0]:
            # The mask is a function of logits and seed, so it is drawn again rather than kept.
            grad_weight = layer.masked(grad, name, ctx.seed)
        if ctx.needs_input_grad[1]:
            config, packed = layer.maskpro_config[name], layer.packed_initial_mask(name)
            rows, curvature = (layer.out_in(grad), layer.out_in(plain(weight))), None
            if masked:
                curvature = (layer.out_in(masked[0]), *second_derivatives(rows[0], ctx.curvature))
            grad_theta = theta_gradient(theta, packed, logit_scale(config), config.n, *rows, curvature)
        return grad_weight, grad_theta, None, None, None


def second_derivatives(gradient: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factors of an estimate of a loss's second derivative with respect to each weight: `scale` times the mean square of
    the gradient, by its row and its column, since a single square is mostly noise. That is the Fisher information if
    the loss is the mean of as many independent negative log-likelihoods, and not far from its minimum: the mean
    gradient's own square comes on top, `scale` times.

    Args:
        gradient (`torch.Tensor`): With respect to the masked weight, `[out_features, in_features]`. Experts in one
            parameter have columns in common.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: float32 `[out_features, 1]` and `[in_features]`.
    """
    squares = gradient.to(torch.float32, copy=True).square_()
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0)
    return scale * rows / columns.mean().clamp(min=torch.finfo(torch.float32).tiny), columns


def has_memory(theta: torch.Tensor) -> bool:
    """Whether theta is more than one zero, expanded to its shape."""
    return 0 not in theta.stride()


def _content(*tensors: torch.Tensor) -> tuple[tuple[int, int], ...] | None:
    """What changes with the contents of tensors; `None` where torch does not say, as of inference tensors."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def members_first(theta: torch.Tensor) -> torch.Tensor:
    """A copy in which each member of all groups lies in memory from end to end, as the kernels read it."""
    return theta.transpose(0, 1).contiguous().transpose(0, 1)


def rows_here(theta: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of theta that are in this process, all of them unless FSDP has split it, and the index of the first."""
    if not isinstance(theta, DTensor):
        return theta, 0
    _, offsets = compute_local_shape_and_global_offset(theta.shape, theta.device_mesh, theta.placements)
    return theta.to_local(), offsets[0]


def logit_scale(config: MaskProConfig) -> float:
    """`C`, which matters only once theta has moved."""
    return PLAIN_LOGIT_SCALE if config.logit_scale is None else config.logit_scale


def _packed_by_rule(weight: torch.Tensor, config: MaskProConfig) -> torch.Tensor:
    """The packed mask of a rule without data, for a weight `[out_features, in_features]`."""
    size = group_members(weight.abs(), config.m)
    scores = size if config.init_mask == "magnitude" else torch.rand(size.shape).to(weight.device)
    return pack_codes(codes_of(mode(scores, config.n)), config.n, config.m)


def _placeholder(out_features: int, in_features: int, config: MaskProConfig, device: torch.device) -> torch.Tensor:
    """
    What stands for a mask that is not there yet, in a state dict too: digits out of range, or of patterns for which no
    byte is, as 1:4, noise that no mask is equal to.
    """
    shape = (out_features, packed_width(config.n, config.m, in_features))
    digits, size = word_layout(config.n, config.m)
    if comb(config.m, config.n) ** digits < 256**size:
        return torch.full(shape, 255, dtype=torch.uint8, device=device)
    return uniform_bits(shape, seed=0, device=device).to(torch.uint8)


def _before_load(layer: "MaskProLayer", state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    layer._brought = [name for name in layer.maskpro_mask if f"{prefix}maskpro_mask.{name}" in state_dict]
    for name in layer.maskpro_theta:
        if f"{prefix}maskpro_theta.{name}" in state_dict:
            layer.materialize(name)


def _after_load(layer: "MaskProLayer", incompatible_keys: Any) -> None:
    """A file without theta holds a finished mask, which theta = 0 means; a mask that is not missing was filled."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if ".maskpro_theta." not in key]
    layer._finite.clear()
    layer._trained.clear()
    for name in layer._brought:
        layer._unfilled.pop(name, None)
        # The state dict of a model whose masks were not there yet.
        config, mask = layer.maskpro_config[name], layer.maskpro_mask[name]
        if mask.equal(_placeholder(layer.out_features, layer.in_features, config, mask.device)):
            layer._unfilled[name] = mask


@contextmanager
def onloaded(layers: Sequence["MaskProLayer"]) -> Iterator[None]:
    """
    Have the tensors of masked layers where accelerate computes, if it offloads them: it brings those of a module as
    that is called, and neither masks nor logits are, nor the base layer before its weight is masked.
    """
    parts = [part for layer in layers for part in (layer.base_layer, layer.maskpro_theta, layer.maskpro_mask)]
    hooked = [(part, vars(part)["_hf_hook"]) for part in dict.fromkeys(parts) if "_hf_hook" in vars(part)]
    thetas = [(layer, theta) for layer in layers for theta in layer.maskpro_theta.values() if theta.is_meta]
    if torch.is_grad_enabled() and any(layer.training and theta.requires_grad for layer, theta in thetas):
        raise ValueError(
            "the logits are offloaded, where no gradient reaches them; train without offloading (accelerate's "
            "remove_hook_from_submodules(model))."
        )
    flags = [(part, name, each.requires_grad) for part, _ in hooked for name, each in part.named_parameters("", False)]
    for part, hook in hooked:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in hooked:
            hook.post_forward(part, None)
        # accelerate takes it from the masked weight, which has been in the base weight's place.
        for part, name, flag in flags:
            part.get_parameter(name).requires_grad_(flag)
        if hooked:
            for layer in layers:
                layer.forget_masked_weight()


@contextmanager
def over(module: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put tensors over the parameters of a module: it finds these, and hooks may exchange those."""
    own = vars(module)
    own |= weights
    try:
        yield
    finally:
        for name in weights:
            own.pop(name, None)


class MaskProLayer(nn.Module, BaseTunerLayer):
    """
    What every masked layer has, per adapter: `maskpro_theta`, the trained offset of the logits, and `maskpro_mask`,
    the packed starting mask.
    """

    adapter_layer_names = ("maskpro_theta",)
    other_param_names = ("maskpro_mask", "maskpro_config")
    # The base layer's parameter that is masked, and what follows this layer's name in its full name.
    parameter_name = "weight"
    parameter_suffix = ".weight"
    # How many matrices the weight has, one below the other.
    experts = 1

    # What BaseTunerLayer brings; the type checker does not look into PEFT.
    active_adapters: list[str]
    merged_adapters: list[str]
    get_base_layer: Callable[[], Any]
    _active_adapter: str | list[str]
    _disable_adapters: bool

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskProConfig) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        if type(base_layer).__name__ == "Linear4bit":
            # On a CPU its first call would lay the weight out as nothing else can read it.
            vars(base_layer)["support_avx512bf16_for_cpu"] = False
        self.out_features, self.in_features = self.out_in(plain(self.base_weight)).shape
        self.maskpro_theta = nn.ParameterDict()
        self.maskpro_mask = BufferDict(persistent=True)
        self.maskpro_config: dict[str, MaskProConfig] = {}
        self.merged_adapters = []
        # While set, masks the weight in train mode, by what it chooses; otherwise by a sample.
        self.choose_mask: Callable[[torch.Tensor], torch.Tensor] | None = None
        # Times a weight's mean squared gradient it is the loss's second derivative; 0 leaves that out.
        self.curvature = 0.0
        # While set, the layer applies no mask: calibration looks at what the dense layer sees.
        self.dense = False
        self._dropped: list[tuple[torch.Tensor, torch.Tensor]] = []
        # The masks that wait for data or a file. The digits alone cannot tell, since of 1:4 every byte is a valid
        # word; transformers replaces the tensor without telling, load_state_dict fills it and calls a hook.
        self._unfilled: dict[str, torch.Tensor] = {}
        self._checked: dict[str, tuple[tuple[int, int], ...]] = {}
        self._finite: dict[str, tuple[tuple[int, int], ...]] = {}
        # Where logits lie that were finite when training began.
        self._trained: dict[str, int] = {}
        self._masked_weight: tuple[tuple[tuple[int, int], ...], torch.Tensor, list[torch.Tensor]] | None = None
        # The masks that a state dict has for this layer, while it is loaded.
        self._brought: list[str] = []
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def base_weight(self) -> torch.Tensor:
        """
        The weight that is masked, in the base layer's own layout.

        Raises:
            `ValueError`: if it is no parameter, but computed from others.
        """
        weight = weight_of(self.base_layer, self.parameter_name)
        if weight is None:
            raise ValueError(
                "the weight of a masked layer is computed from others, as by pruning or weight_norm, so a mask "
                "over it would be lost; make it a parameter again (prune.remove, remove_parametrizations)."
            )
        return weight

    def out_in(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as `[out_features, in_features]`, or back; a view where there is one."""
        raise NotImplementedError

    def is_plain(self) -> bool:
        """Whether calling the base layer comes to [`linear`]: no other forward, and nothing that hangs on the call."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A plain base layer's computation with another weight."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: MaskProConfig) -> None:
        """Add an adapter, with its starting mask if that needs neither data nor a file."""
        weight = self.base_weight
        shape = (self.out_features, config.m, self.in_features // config.m)
        data_free = not config.awaits_file and config.init_mask in DATA_FREE and not weight.is_meta
        # The configuration of an adapter that is here already, as TRL's trainers give it to their reference.
        twin = next((name for name, known in self.maskpro_config.items() if known is config), None)
        if twin is not None:
            packed = self.maskpro_mask[twin].clone()
        elif data_free:
            # One after the other, since scores take as much memory as weights.
            packed = torch.cat([_packed_by_rule(self.matrix(i).detach(), config) for i in range(self.experts)])
        else:
            packed = _placeholder(self.out_features, self.in_features, config, weight.device)
        # An adapter for inference has no logits to move: one zero, expanded, stands for all of them.
        dtype = getattr(torch, config.logits_dtype)
        theta = torch.zeros((), dtype=dtype, device=weight.device).expand(shape)
        self.maskpro_theta[adapter_name] = nn.Parameter(theta, requires_grad=False)
        self.maskpro_mask[adapter_name] = packed
        self.maskpro_config[adapter_name] = config
        if not data_free if twin is None else self._is_unfilled(twin):
            self._unfilled[adapter_name] = packed
        if config.save_logits or not config.inference_mode:
            self.materialize(adapter_name)
        if twin is not None and has_memory(self.maskpro_theta[twin]):
            # Its mask is the one that was learned.
            self.materialize(adapter_name)
            self.maskpro_theta[adapter_name].data.copy_(self.maskpro_theta[twin].data)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def materialize(self, adapter_name: str) -> None:
        """Give `theta` memory of its own, which an adapter for inference does without."""
        theta = self.maskpro_theta[adapter_name]
        if not has_memory(theta) and not theta.is_meta:
            # The same Parameter, since PEFT restores `requires_grad` on those that it has seen.
            theta.data = members_first(theta.data)

    def enable_adapters(self, enabled: bool) -> None:
        """
        Mask the weight or not. What is trained stays what it is: PEFT's own would train every active adapter from then
        on, also one that was loaded for inference.
        """
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name in self.maskpro_theta and not inference_mode:
                self.materialize(name)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name in self.maskpro_theta and requires_grad:
                self.materialize(name)
        super().set_requires_grad(adapter_names, requires_grad)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.maskpro_theta:
            return
        device = device or self.base_weight.device
        theta = self.maskpro_theta[adapter_name]
        if theta.device not in (device, torch.device("meta")):
            moved = theta.detach()
            moved = moved.to(device) if has_memory(moved) else moved[:1, :1, :1].to(device).expand(moved.shape)
            self.maskpro_theta[adapter_name] = nn.Parameter(moved, theta.requires_grad)
        mask = self.maskpro_mask[adapter_name]
        if mask.device != device:
            unfilled = self._is_unfilled(adapter_name)
            self.maskpro_mask[adapter_name] = mask = mask.to(device)
            if unfilled:
                self._unfilled[adapter_name] = mask

    def _is_unfilled(self, adapter_name: str) -> bool:
        return self._unfilled.get(adapter_name) is self.maskpro_mask[adapter_name]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        unfilled = [name for name in self._unfilled if self._is_unfilled(name)]
        # Moved as it is, a zero that is expanded would be written out.
        shapes = {name: theta.shape for name, theta in self.maskpro_theta.items() if not has_memory(theta)}
        for name in shapes:
            self.maskpro_theta[name].data = self.maskpro_theta[name].data[:1, :1, :1]
        try:
            super()._apply(fn, recurse)
        finally:
            for name, shape in shapes.items():
                theta = self.maskpro_theta[name]
                theta.data = torch.zeros_like(theta.data).expand(shape)
                # DistributedDataParallel writes into parameters that nobody trains, too.
                if theta.requires_grad or (dist.is_available() and dist.is_initialized()):
                    self.materialize(name)
        self._unfilled = {name: self.maskpro_mask[name] for name in unfilled}
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._unfilled.pop(adapter_name, None)
        self._checked.pop(adapter_name, None)
        self._finite.pop(adapter_name, None)
        self._trained.pop(adapter_name, None)
        self._masked_weight = None

    def packed_initial_mask(self, adapter_name: str) -> torch.Tensor:
        """
        The packed starting mask, uint8.

        Raises:
            `ValueError`: if it was never filled.
        """
        packed = self.maskpro_mask[adapter_name]
        if self._is_unfilled(adapter_name):
            config = self.maskpro_config[adapter_name]
            if config.awaits_file:
                raise ValueError(f"adapter {adapter_name!r} has no mask for a layer: its file is missing a tensor.")
            if config.init_mask in DATA_FREE:
                raise ValueError(
                    f"init_mask={config.init_mask!r} is not there yet, for the weights were not when the adapter was "
                    "added: they are offloaded or on the meta device; load the base model whole, then add the adapter."
                )
            raise ValueError(
                f"init_mask={config.init_mask!r} is not there yet: "
                "call initialize_masks(model, dataloader) before using the model, or start from 'magnitude'."
            )
        # Once for every content, since looking at the digits waits for the device.
        state = _content(packed)
        if state is None or self._checked.get(adapter_name) != state:
            config = self.maskpro_config[adapter_name]
            try:
                check_packed(packed, config.n, config.m, self.in_features)
            except ValueError as error:
                raise ValueError(f"adapter {adapter_name!r}: {error}") from error
            if state is not None:
                self._checked[adapter_name] = state
        return packed

    def initial_codes(self, adapter_name: str) -> torch.Tensor:
        """The starting mask as codes, int32 `[out_features, in_features // m]`."""
        config = self.maskpro_config[adapter_name]
        return unpack_codes(self.packed_initial_mask(adapter_name), config.n, config.m, self.in_features)

    def initial_mask(self, adapter_name: str) -> torch.Tensor:
        """The starting mask, bool `[out_features, m, in_features // m]`."""
        return mask_of(self.initial_codes(adapter_name), self.maskpro_config[adapter_name].m)

    def learned_mask(self, adapter_name: str) -> torch.Tensor:
        """The learned mask, bool `[out_features, m, in_features // m]`."""
        return mask_of(self.mode_codes(adapter_name), self.maskpro_config[adapter_name].m)

    def set_learned_mask(self, adapter_name: str, mask: torch.Tensor) -> None:
        """Put the logits where they would be if this were the starting mask, `[out_features, m, in_features // m]`."""
        moved = mask.float() - self.initial_mask(adapter_name).float()
        self.maskpro_theta[adapter_name].copy_(logit_scale(self.maskpro_config[adapter_name]) * moved)

    def matrix(self, number: int) -> torch.Tensor:
        """The weight as `[out_features, in_features]`, or that of one of the `experts`; a view."""
        return self.out_in(plain(self.base_weight))

    def rows_of(self, matrix: int) -> slice:
        """The rows of one [`matrix`] among those of all."""
        height = self.out_features // self.experts
        return slice(matrix * height, (matrix + 1) * height)

    def set_initial_mask(self, adapter_name: str, mask: torch.Tensor, rows: slice = slice(None)) -> None:
        """
        Fill the starting mask, bool `[out_features, m, in_features // m]`, or some rows of it; it is there once the
        last ones are.
        """
        config, packed = self.maskpro_config[adapter_name], self.maskpro_mask[adapter_name]
        packed[rows].copy_(pack_codes(codes_of(mask), config.n, config.m))
        if rows.stop in (None, len(packed)):
            self._unfilled.pop(adapter_name, None)

    def _theta(self, adapter_name: str, sampled: bool = False) -> torch.Tensor:
        """
        The trained offset of the logits, `[out_features, m, in_features // m]`, outside of any graph.

        Raises:
            `ValueError`: if it is not finite: what is compared with NaN keeps any number of members.
        """
        theta = self.maskpro_theta[adapter_name].detach()
        if isinstance(theta, DTensor):
            # Within a forward pass FSDP has it whole.
            theta = theta.full_tensor()
        if not has_memory(theta):
            return theta
        # Once for every content, since looking waits for the device; while it is trained, once for all.
        state = _content(theta)
        trained = sampled and state is not None and self._trained.get(adapter_name) == state[0][0]
        if not trained and (state is None or self._finite.get(adapter_name) != state):
            if not theta.isfinite().all():
                raise ValueError(f"adapter {adapter_name!r} has logits that are not finite: {NO_MASK}.")
            if state is not None:
                self._finite[adapter_name], self._trained[adapter_name] = state, state[0][0]
        return theta

    def mode_codes(self, adapter_name: str) -> torch.Tensor:
        """The learned mask, the n largest logits, as codes."""
        config, theta = self.maskpro_config[adapter_name], self._theta(adapter_name)
        # A theta that was never given memory is zero: the mode is the starting mask.
        if not has_memory(theta):
            return self.initial_codes(adapter_name)
        return mode_codes(theta, self.packed_initial_mask(adapter_name), logit_scale(config), config.n)

    def groups_at(self, adapter_name: str, rows: torch.Tensor, places: torch.Tensor) -> Groups:
        """The groups at these rows and places, int64 `[groups]` each."""
        codes = self.initial_codes(adapter_name)[rows, places]
        return Groups(rows, places, mask_of(codes, self.maskpro_config[adapter_name].m))

    def _sampled_groups(
        self, adapter_name: str, theta: torch.Tensor, groups: Groups, seed: int, layer: int, distribution: Distribution
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of some groups, float32 `[m, groups]`, and masks drawn from them."""
        config = self.maskpro_config[adapter_name]
        logits = logit_scale(config) * groups.initial + theta[groups.rows, :, groups.places].float().T
        return logits, sample(logits, config.n, seed, layer, distribution)

    def sampled_codes(
        self,
        adapter_name: str,
        seed: int,
        layer: int = 0,
        distribution: Distribution = "conditional_poisson",
        groups: Groups | None = None,
    ) -> torch.Tensor:
        """
        A mask drawn from the logits, as codes: a pure function of logits, seed and layer. With `groups` all others
        have the mode.
        """
        config, theta = self.maskpro_config[adapter_name], self._theta(adapter_name, sampled=True)
        packed = self.packed_initial_mask(adapter_name)
        if groups is None:
            return sample_codes(theta, packed, logit_scale(config), config.n, seed, layer, distribution)
        codes = mode_codes(theta, packed, logit_scale(config), config.n)
        _, kept = self._sampled_groups(adapter_name, theta, groups, seed, layer, distribution)
        codes[groups.rows, groups.places] = codes_of(kept)
        return codes

    def masked(
        self,
        weight: torch.Tensor,
        adapter_name: str,
        seed: int | None = None,
        layer: int = 0,
        distribution: Distribution = "conditional_poisson",
        groups: Groups | None = None,
    ) -> torch.Tensor:
        """
        A weight of the base layer's layout with its dropped entries selected to +0.

        Args:
            weight (`torch.Tensor`): The base weight, or its gradient.
            adapter_name (`str`): The adapter.
            seed (`int`, *optional*): Draws the mask of [`sampled_codes`]; `None` takes the mode.
            groups ([`Groups`], *optional*): As for [`sampled_codes`].
        """
        config, theta = self.maskpro_config[adapter_name], self._theta(adapter_name, sampled=seed is not None)
        if seed is None and not has_memory(theta):
            return self.initially_masked(weight, adapter_name)
        rows, packed, n = self.out_in(plain(weight)), self.packed_initial_mask(adapter_name), config.n
        if seed is None or groups is not None:
            masked = mode_and_apply(rows, theta, packed, logit_scale(config), n)
            if seed is not None and groups is not None and len(groups.rows):
                _, kept = self._sampled_groups(adapter_name, theta, groups, seed, layer, distribution)
                at = (groups.rows, groups.places)
                # A weight that is dropped may be no number.
                some = rows.unflatten(1, (-1, config.m))[at].where(kept.T, 0)
                masked.unflatten(1, (-1, config.m))[at] = some
            return self.out_in(masked)
        masked = sample_and_apply(rows, theta, packed, logit_scale(config), n, seed, layer, distribution)
        return self.out_in(masked)

    def initially_masked(self, weight: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """[`masked`] by the starting mask."""
        config, packed = self.maskpro_config[adapter_name], self.packed_initial_mask(adapter_name)
        return self.out_in(apply_packed(self.out_in(plain(weight)), packed, config.n, config.m))

    def magnitude_gradient(self, adapter_name: str) -> torch.Tensor:
        """The gradient of the expected sum of squares of the kept weights, of theta's rows in this process."""
        config, whole = self.maskpro_config[adapter_name], self.base_weight
        theta, start = rows_here(self.maskpro_theta[adapter_name].detach())
        here = slice(start, start + len(theta))
        # What is quantized knows how to dequantize itself until it is detached.
        values = plain(whole.full_tensor() if isinstance(whole, DTensor) else whole).detach()
        rows, packed = self.out_in(values)[here], self.packed_initial_mask(adapter_name)[here]
        return theta_gradient(theta, packed, logit_scale(config), config.n, rows, rows)

    def move_logits(
        self,
        adapter_name: str,
        moves: list[tuple[int, float]],
        layer: int,
        distribution: Distribution,
        groups: Groups | None = None,
    ) -> None:
        """
        `theta += step * score` of several masks of [`sampled_codes`], in place, each as the logits are at first.

        Args:
            moves (`list[tuple[int, float]]`): The seed of every mask, and its step.
            groups ([`Groups`], *optional*): Those that were sampled, which alone move.
        """
        config, whole = self.maskpro_config[adapter_name], self.maskpro_theta[adapter_name].detach()
        theta, start = rows_here(whole)
        if groups is not None:
            if len(groups.rows):
                self._move_groups(adapter_name, moves, layer, distribution, groups)
            return
        packed = self.packed_initial_mask(adapter_name)[start : start + len(theta)]
        scale, rows = logit_scale(config), None if theta is whole else (start, len(whole))
        # One mask moves each logit when it has read it; several read what none of them has moved.
        into = None if len(moves) == 1 else theta.to(torch.float32, copy=True)
        for seed, step in moves:
            score_and_update(theta, packed, scale, config.n, step, seed, layer, distribution, into, rows)
        if into is not None:
            store_logits(theta, into, moves[0][0], layer)

    def _move_groups(
        self,
        adapter_name: str,
        moves: list[tuple[int, float]],
        layer: int,
        distribution: Distribution,
        groups: Groups,
    ) -> None:
        whole = self.maskpro_theta[adapter_name].detach()
        theta, start = rows_here(whole)
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        moved = whole[groups.rows, :, groups.places].float().T
        for seed, step in moves:
            logits, kept = self._sampled_groups(adapter_name, whole, groups, seed, layer, distribution)
            moved = moved + step * score(logits, kept, distribution)
        if theta.dtype == torch.bfloat16:
            words = uniform_bits(moved.shape[1:], moves[0][0], layer, moved.device)
            moved = torch.stack(round_at_random(list(moved.unbind()), words))
        here = (groups.rows >= start) & (groups.rows < start + len(theta))
        theta[groups.rows[here] - start, :, groups.places[here]] = moved.T[here].to(theta.dtype)

    def _seed(self) -> int:
        # torch's own generator, so that manual_seed and the replay of gradient checkpointing hold. Ranks that were
        # seeded alike draw masks of their own all the same.
        return int(torch.randint(2**63 - 1, ())) ^ (dist.get_rank() if dist.is_initialized() else 0)

    def _masking_adapters(self) -> list[str]:
        thetas = self.maskpro_theta
        return [name for name in self.active_adapters if name in thetas]

    def _adapters_to_apply(self) -> list[str]:
        """The adapters whose masks a forward applies."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        return [] if self._disable_adapters or self.merged_adapters or self.dense else self._masking_adapters()

    def masked_weight(self) -> torch.Tensor:
        """
        The base weight with the dropped entries of every active adapter at zero, in the base layer's own layout.

        Sampled where the layer is in train mode and the adapter's `theta` requires grad, else the mode.
        """
        return self._mask_weight(self._masking_adapters())

    def _mask_weight(self, names: list[str]) -> torch.Tensor:
        weight = self.base_weight
        if self.training or torch.is_grad_enabled():
            trained = [name for name in names if self.maskpro_theta[name].requires_grad]
            if (self.training and trained) or (torch.is_grad_enabled() and (trained or weight.requires_grad)):
                for name in names:
                    sampled = self.training and name in trained
                    if sampled and self.choose_mask is not None:
                        weight = self.choose_mask(plain(weight))
                    else:
                        seed = self._seed() if sampled else None
                        weight = _ApplyMask.apply(weight, self.maskpro_theta[name], self, name, seed)
                return weight
        return self._cached_masked_weight(weight, names)

    def _cached_masked_weight(self, weight: torch.Tensor, names: list[str]) -> torch.Tensor:
        """
        The masked weight, computed again only when something it depends on has changed: `generate` asks for it at
        every token. Of a change through `.data` torch says nothing, so `train()` and `eval()` forget it.
        """
        tensors, thetas, masks = [weight], self.maskpro_theta, self.maskpro_mask
        for name in names:
            tensors += (thetas[name], masks[name])
        state = _content(*tensors)
        if state is None or self._masked_weight is None or self._masked_weight[0] != state:
            self._masked_weight = None
            with torch.inference_mode(False), torch.no_grad():
                masked = weight
                for name in names:
                    masked = self.masked(masked, name)
            # What is quantized is so that no copy in full size stays.
            if state is None or is_quantized(weight):
                return masked
            # Their memory is held so that no other can come to lie at its address.
            self._masked_weight = (state, masked, [tensor.detach() for tensor in tensors])
        return self._masked_weight[1]

    def forget_masked_weight(self) -> None:
        """Free the masked weight that eval mode keeps."""
        self._masked_weight = None

    def train(self, mode: bool = True):
        self.forget_masked_weight()
        # An optimizer may write through `.data`, of which torch says nothing.
        self._finite.clear()
        return super().train(mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = self._adapters_to_apply()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if self.is_plain() and not args and not kwargs:
            weight = self._mask_weight(names)
            # bitsandbytes puts out what it is given, whatever it computes with.
            return self.linear(x, weight.to(x.dtype) if is_quantized(self.base_weight) else weight)
        if is_of_bitsandbytes(self.base_weight):
            raise ValueError(
                f"cannot mask {self.base_layer}: bitsandbytes has quantized its weight, and its forward has hooks or "
                "was replaced, which the mask would pass over; remove them, or exclude the layer by exclude_modules."
            )
        with onloaded([self]), over(self.base_layer, {"weight": self._mask_weight(names)}):
            return self.base_layer(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep: bool = True) -> None:
        """
        Set the dropped weights of the base layer to zero.

        Args:
            safe_merge (`bool`): Raise if a kept weight is not finite, before anything is changed.
            adapter_names (`list[str]`, *optional*): Adapters to merge; `None` for the active ones.
            keep (`bool`): Keep the dropped weights for [`unmerge`], bit for bit.

        Raises:
            `ValueError`: if a logit is not finite or the base is quantized; with `safe_merge`, if a kept weight is
                not finite.
        """
        self._masked_weight = None
        self._finite.clear()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.maskpro_theta:
                continue
            weight = self.base_weight
            if is_quantized(weight):
                raise ValueError(
                    f"the base weights are quantized ({type(weight).__name__}), and a mask is merged into those that "
                    "they were made from: load the base model without quantization, or use hf-maskpro merge."
                )
            masked = self.masked(weight.detach(), name)
            if safe_merge and not masked.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if keep:
                codes = self.mode_codes(name)
                self._dropped.append((codes, weight.detach()[self._dropped_by(codes, name)]))
            weight.data = masked.contiguous()
            self.merged_adapters.append(name)

    def _dropped_by(self, codes: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return self.out_in(~keep_of(codes, self.maskpro_config[adapter_name].m))

    def unmerge(self) -> None:
        """Put the dropped weights back."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        weight = self.base_weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            codes, dropped = self._dropped.pop()
            weight.data[self._dropped_by(codes, name).to(weight.device)] = dropped.to(weight.device, weight.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, merged if asked for; nothing is kept for an [`unmerge`] that can no longer come."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names, keep=False)
        return self.get_base_layer()
