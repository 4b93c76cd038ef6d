import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    onload_layer,
)
from peft.utils.constants import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..subset import mode_codes, pack_codes, unpack_codes
from ..subset.native import multiplies_in
from .base import (
    cached_commit,
    check_base,
    check_masks,
    is_laid_out_for_cpus,
    is_quantized,
    listed,
    masks_digest,
    plain,
    weight_of,
)
from .calls import Findings, tiny_passes, watching, without_hooks
from .config import MaskProConfig
from .experts import OFFLOADED, MaskProExperts, expert_inputs, expert_parameters, router_names, why_not
from .layer import LOGITS, NO_MASK, MaskProLayer, has_memory, logit_scale, members_first
from .linear import PLAIN, is_ordinary, layer_class


logger = logging.get_logger(__name__)

# Of processor time, for all names of a model, which take milliseconds; PEFT does it again, in this process.
SECONDS_TO_MATCH = 0.25
# By the clock, of which a busy machine takes more for the start of Python alone.
_SECONDS_TO_CHECK = 10
_MATCH_ALL = """
import json, re, signal, sys
pattern, names, seconds = json.load(sys.stdin)
try:
    signal.setitimer(signal.ITIMER_PROF, seconds)
except AttributeError:
    pass  # Windows, where the clock alone decides.
for name in names:
    re.fullmatch(pattern, name)
"""


class _Configs(dict[str, PeftConfig]):
    """
    The configurations that PEFT finds at a model with masks when another method's adapter is put over them. It would
    save the masks with an adapter of the same name, in place of their own.
    """

    def update(self, added: dict[str, PeftConfig]) -> None:  # type: ignore[override]
        for name, config in added.items():
            if name in self and type(self[name]) is not type(config):
                raise ValueError(
                    f"{name!r} is the name of an adapter of masks; give the other one a name of its own, as in "
                    "get_peft_model(model, config, adapter_name='quality')."
                )
            # PEFT makes experts of them that it wraps, where a mask is already.
            experts = any(isinstance(known, MaskProConfig) and known.target_parameters for known in self.values())
            if experts and getattr(config, "target_modules", None) == INCLUDE_LINEAR_LAYERS_SHORTHAND:
                raise ValueError(
                    f"target_modules={config.target_modules!r} of {name!r} takes in experts that are masked; name the "
                    "layers of the attention, as in LoraConfig(target_modules=['q_proj', 'v_proj'])."
                )
        super().update(added)


class MaskProModel(BaseTuner):
    """
    Learnable N:M masks over the linear layers of a pretrained model, whose weights never change.

    MaskPro: https://huggingface.co/papers/2506.12876. Made by `get_peft_model(model, MaskProConfig(...))`.

    Args:
        model (`torch.nn.Module`): The model whose layers are masked.
        peft_config ([`MaskProConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter.
        options: As for PEFT's `BaseTuner`.
    """

    prefix = "maskpro_"
    tuner_layer_cls = MaskProLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **options: Any) -> None:
        # Not from PeftModel but injected, as transformers' load_adapter does, which goes on without what a file lacks.
        if isinstance(peft_config, MaskProConfig):
            peft_config.await_file_if_read()
        super().__init__(model, peft_config, adapter_name, **options)
        self.model.peft_config = _Configs(self.peft_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        names = [*EMBEDDING_LAYER_NAMES, *(name for name, _ in model.named_modules())]
        experts = [f"{name}.{key}" for name, module in _modules(model) for key in expert_parameters(module)]
        _check_patterns(self.peft_config[adapter_name], names + experts)
        super().inject_adapter(model, adapter_name, *args, **options)
        with without_hooks(model), evaluating(model), watching(model) as findings:
            error = tiny_passes(model, findings)
        try:
            _check_findings(findings)
        except ValueError:
            if len(self.peft_config) > 1:
                self.delete_adapter(adapter_name)
            else:
                self._unload_and_optionally_merge(merge=False, progressbar=False)
            raise
        if error or findings.unseen:
            tell = logger.info if next(model.parameters()).is_meta else logger.warning_once
            tell(
                f"whether {type(model).__name__} calls {listed(findings.unseen) or 'every masked layer'} was not seen"
                f"{f' ({error})' if error else ''}; the first batch of initialize_masks or of a trainer tells."
            )

    def _prepare_adapter_config(self, peft_config: MaskProConfig, model_config: dict) -> MaskProConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        return peft_config

    def _prepare_model(self, peft_config: MaskProConfig, model: nn.Module) -> None:
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _include_all_linear(peft_config, model)
            _keep_layers_to_transform(peft_config)
        named = [name for name, *_ in _targeted_parameters(peft_config, model)]
        for target in peft_config.target_parameters or ():
            if not any(f".{name}".endswith(f".{target}") for name in named):
                raise ValueError(
                    f"target_parameters {target} is no parameter of the model; give the ends of names of "
                    "experts' weights."
                )
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        places = _places(model)
        problems: dict[str, list[str]] = {}
        weights: dict[str, torch.Tensor] = {}
        indivisible: dict[str, int] = {}
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and check_target_module_exists(peft_config, name):
                problem = _why_not(module, peft_config, embeddings, places)
                base = module.get_base_layer() if isinstance(module, MaskProLayer) else module
                if problem:
                    problems.setdefault(problem, []).append(name)
                elif _in_features(base) % peft_config.m:
                    indivisible[name] = base.weight.numel()
                else:
                    weights[name] = weight_of(base)
        for name, module, parameter in _targeted_parameters(peft_config, model):
            problem = why_not(module, parameter, peft_config, places)
            weight = module.get_parameter(parameter).detach()
            if problem:
                problems.setdefault(problem, []).append(name)
            elif expert_inputs(module, parameter) % peft_config.m:
                indivisible[name] = weight.numel()
            else:
                weights[name] = weight
        for problem, names in problems.items():
            raise ValueError(f"cannot mask {listed(names)}: {problem}.")
        if indivisible:
            peft_config.target_parameters = {
                name for name, *_ in _targeted_parameters(peft_config, model) if name not in indivisible
            } or None
            _leave_dense(peft_config, indivisible, sum(weight.numel() for weight in weights.values()))
        if isinstance(model, PreTrainedModel) and peft_config.revision is None and not peft_config.awaits_file:
            peft_config.revision = cached_commit(model.name_or_path)
        check_base(peft_config, weights)

    def _create_and_replace(
        self,
        peft_config: MaskProConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            # PEFT finds the experts inside of what masks them if another adapter does, and that if another parameter.
            experts = parent if isinstance(parent, MaskProExperts) else target
            if not isinstance(experts, MaskProExperts):
                experts = MaskProExperts(target)
                experts.train(target.training)
                setattr(parent, target_name, experts)
            layer = experts.mask(parameter_name, adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                layer.maskpro_theta[adapter_name].requires_grad_(False)
            return
        if isinstance(target, MaskProLayer):
            target.update_layer(adapter_name, peft_config)
            return
        cls = layer_class(target)
        if cls is None:
            raise ValueError(f"cannot mask {current_key}: {_unsupported(target)}.")
        new_module = cls(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        new_module.train(target.training)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """`MaskProConfig.logits_dtype` alone decides, and the layers already follow it."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the masks; PEFT's own would first merge another method's adapter that lies over them."""
        for module in self.model.modules():
            if isinstance(module, MaskProLayer):
                with onload_layer(module):
                    module.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "masks cannot be averaged; activate several with set_adapter([...]) to keep what all of them keep."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("mask adapters cannot be mixed within a batch; drop adapter_names and call set_adapter.")
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The packed mode of every layer, or with `save_logits` the starting mask and theta."""
        assert isinstance(config, MaskProConfig)
        # Of a head that is targeted PEFT saves the base weight, which it takes from here; a resized one needs it.
        head = {f"{name}.base_layer.weight" for name, _ in _layers(model, adapter_name)} & _embedding_names(model)
        if head and not _is_resized(model):
            for key in head:
                state_dict.pop(key, None)
        state_dict = {_without_place(key): value for key, value in state_dict.items()}
        result: dict[str, torch.Tensor] = {}
        changed = {}
        thetas = []
        weights = moved = 0
        for name, layer in _layers(model, adapter_name):
            mask_key = f"{name}.maskpro_mask.{adapter_name}"
            theta_key = f"{name}.maskpro_theta.{adapter_name}"
            layer.packed_initial_mask(adapter_name)
            packed, theta = state_dict[mask_key], state_dict[theta_key]
            if theta.is_meta or packed.is_meta:
                raise ValueError(
                    f"the logits of {_bare(name)} are offloaded, so there is nothing to save; bring them back by "
                    "accelerate's remove_hook_from_submodules(model)."
                )
            thetas.append(theta)
            _check_finite(_bare(name), theta)
            initial = unpack_codes(packed, config.n, config.m, theta.shape[1] * theta.shape[2])
            # Of logits that were never trained it is the start, for which no kernel need be compiled.
            learned = mode_codes(theta, packed, logit_scale(config), config.n) if has_memory(theta) else initial
            weights += theta.numel()
            moved += (differ := int((learned != initial).sum()))
            changed[_bare(name)] = round(differ / learned.numel(), 6)
            if config.save_logits:
                result |= {mask_key: packed, theta_key: theta.contiguous()}
            else:
                result[mask_key] = pack_codes(learned, config.n, config.m)
        if any(has_memory(theta) and theta.any() for theta in thetas):
            # Moved by a trainer that has no default of its own.
            config.logit_scale = logit_scale(config)
        size = sum(tensor.nbytes for tensor in result.values())
        digest = masks_digest(result, result.__getitem__)
        config.record_stage(changed, moved * config.m / weights, weights, digest, size)
        return result

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Besides renaming, refuse a file that does not fit, and start from theta = 0 where it has none."""
        assert isinstance(config, MaskProConfig)
        # PEFT would put the one of two names for the same tensor in the place of the other.
        if named := [key for key in state_dict if re.search(r"\.maskpro_(mask|theta)\.", key)]:
            raise ValueError(f"the adapter file has names that are none of a mask's: {listed(named)}.")
        beneath = _beneath(model)
        placed = {_with_place(key, beneath): value for key, value in state_dict.items()}
        result = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, placed)
        result = {_without_place(key): value for key, value in result.items()}
        layers = dict(_layers(model, adapter_name))
        known = {f"{name}.maskpro_{part}.{adapter_name}" for name in layers for part in ("mask", "theta")}
        surplus = [key for key in result if re.search(r"\.maskpro_(mask|theta)(\.|$)", key) and key not in known]
        if surplus:
            raise ValueError(f"the adapter file has masks for layers that the model has not: {listed(surplus)}.")
        # PEFT would load them into the base model.
        weights = [key for key in result if key not in known and ".modules_to_save." not in key]
        if weights and not (set(weights) <= _embedding_names(model) and _is_resized(model)):
            raise ValueError(
                f"the adapter file has weights besides its masks: {listed(weights)}. Those that belong to it come by "
                "modules_to_save, or with tokens that were added to the model, if they have been to this one; save it "
                "without others (save_embedding_layers=False)."
            )
        for name, layer in layers.items():
            mask_key, theta_key = f"{name}.maskpro_mask.{adapter_name}", f"{name}.maskpro_theta.{adapter_name}"
            if mask_key not in result:
                raise ValueError(f"the adapter file has no mask for {_bare(name)}.")
            theta = layer.maskpro_theta[adapter_name]
            try:
                codes = unpack_codes(result[mask_key], config.n, config.m, theta.shape[1] * theta.shape[2])
            except ValueError as error:
                raise ValueError(f"{_bare(name)}: {error}") from error
            if codes.shape != (theta.shape[0], theta.shape[2]):
                raise ValueError(f"{_bare(name)}: the adapter file has {len(codes)} rows, the model {len(theta)}.")
            if theta_key in result:
                if (shape := result[theta_key].shape) != theta.shape:
                    raise ValueError(
                        f"{_bare(name)}: the adapter file has logits {list(shape)}, the model {list(theta.shape)}."
                    )
                if result[theta_key].dtype not in LOGITS:
                    raise ValueError(
                        f"{_bare(name)} has logits in {result[theta_key].dtype}, not float32 or bfloat16."
                    )
                _check_finite(_bare(name), result[theta_key])
                result[theta_key] = members_first(result[theta_key])
                layer.materialize(adapter_name)
            elif theta.is_meta:
                zeros = torch.zeros((), dtype=theta.dtype, device=layer.base_weight.device)
                zeros = zeros.expand(theta.shape)
                result[theta_key] = zeros if config.inference_mode else members_first(zeros)
            elif has_memory(theta):
                with torch.no_grad():
                    theta.zero_()
        check_masks(config, state_dict, state_dict.__getitem__)
        # Another file that is loaded into this adapter has a configuration of its own.
        config.masks_digest = None
        return {_with_place(key, beneath): value for key, value in result.items()}


# The end of a masked layer's name once another method's adapter lies over it.
_BENEATH = ".base_layer"


def _beneath(model: nn.Module) -> set[str]:
    """The names, as files have them, of the masked layers that lie beneath another adapter."""
    layers = [name for name, module in model.named_modules() if isinstance(module, MaskProLayer)]
    return {name.removesuffix(_BENEATH) for name in layers if name.endswith(_BENEATH)}


def _with_place(key: str, beneath: set[str]) -> str:
    name, mark, part = key.partition(".maskpro_")
    return f"{name}{_BENEATH}{mark}{part}" if name in beneath else key


def _without_place(key: str) -> str:
    return key.replace(f"{_BENEATH}.maskpro_", ".maskpro_")


_peft_checks_merge = BaseTuner._check_merge_allowed


def _check_merge_over_masks(tuner: BaseTuner) -> None:
    """
    PEFT merges what lies over a mask into the weight beneath it, and drops the mask. Once the mask is merged itself,
    the dense weights that come of it are asked for.
    """
    over = [
        name
        for name, module in tuner.model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and isinstance(module.base_layer, MaskProLayer)
        and not module.base_layer.merged
    ]
    if over:
        raise ValueError(
            f"cannot merge {listed(over)}: a mask lies beneath, whose zeros it would fill. Keep it unmerged beside "
            "the merged mask (hf_maskpro.deploy.merge), or call merge_adapter of the mask first for a dense model."
        )
    _peft_checks_merge(tuner)


BaseTuner._check_merge_allowed = _check_merge_over_masks


def _layers(model: nn.Module, adapter_name: str) -> list[tuple[str, MaskProLayer]]:
    return [
        # A state dict of a wrapped model has no trace of the wrappers.
        (
            name.replace("_fsdp_wrapped_module.", "")
            .replace("_checkpoint_wrapped_module.", "")
            .removesuffix(_BENEATH),
            module,
        )
        for name, module in model.named_modules()
        if isinstance(module, MaskProLayer) and adapter_name in module.maskpro_theta
    ]


def masked_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, MaskProLayer]:
    """
    The masked layers of a model, by the names that they have in the base model.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter, wrapped in a `PeftModel` or not.
        adapter_name (`str`): The adapter.

    Raises:
        `ValueError`: if the model has no such adapter.
    """
    layers = {_bare(name): layer for name, layer in _layers(model, adapter_name)}
    if not layers:
        raise ValueError(f"the model has no mask adapter named {adapter_name!r}; add one with get_peft_model.")
    return layers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
            if isinstance(module, MaskProLayer):
                module.forget_masked_weight()


def check_calls(model: nn.Module, run: Callable[[], Any]) -> None:
    """
    Look at one forward pass, in the mode that the model is in, whether every masked layer sees its mask. Those that it
    does not reach are named in a warning, and so is a dtype that this CPU has no instructions for.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        run (`Callable`): The forward pass.

    Raises:
        `ValueError`: if the weight of a layer is used without calling the layer, or its outputs under a mask are not
            those of the merged weight.
    """
    weight = next(module for module in model.modules() if isinstance(module, MaskProLayer)).base_weight
    if weight.device.type == "cpu" and not (is_quantized(weight) or multiplies_in(weight.dtype)):
        logger.warning_once(
            f"this CPU has no instructions for {weight.dtype}; load the model with dtype='float32', which runs many "
            "times faster here."
        )
    with watching(model) as findings:
        run()
    _check_findings(findings)
    if findings.unseen:
        logger.warning(
            f"the first batch does not reach {listed(list(map(_bare, findings.unseen)))}: whether masks apply there "
            "was not seen, and such data does not move them."
        )


def _check_findings(findings: Findings) -> None:
    for names, why in (
        (findings.uncalled, "the model uses the weight without calling the layer, so no mask would apply"),
        (findings.unlike, "its forward does not go by its weight, so merging would give other outputs than the mask"),
    ):
        if names:
            raise ValueError(f"cannot mask {listed(list(map(_bare, names)))}: {why}; take it out by exclude_modules.")


@contextmanager
def one_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Let no other mask adapter be active, without touching what is trained."""
    layers = [module for module in model.modules() if isinstance(module, MaskProLayer)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [adapter_name]
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """
    Let a model be the dense one that its adapters are for. `PeftModel.disable_adapter` would leave a mask that was
    merged unmerged, and train adapters over it, and modules beside it, that were loaded for inference.

    Raises:
        `ValueError`: if the model has no mask adapter.
    """
    wrappers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not any(isinstance(module, MaskProLayer) for module in wrappers):
        raise ValueError("the model has no mask adapter, so there is no dense model to compare it with.")
    before = [module._disable_adapters for module in wrappers]
    merged = [
        (layer, list(layer.merged_adapters))
        for layer in wrappers
        if isinstance(layer, BaseTunerLayer) and layer.merged
    ]
    # What lies over a mask was merged after it, into the weight beneath.
    for layer, _ in merged:
        layer.unmerge()
    for module in wrappers:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, disabled in zip(wrappers, before, strict=True):
            module._disable_adapters = disabled
        for layer, names in reversed(merged):
            layer.merge(adapter_names=names)


def _bare(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _embedding_names(model: nn.Module) -> set[str]:
    """The parameters of a model's embeddings and of its head, which PEFT saves too if tokens were added."""
    base = _pretrained(model)
    if base is None:
        return set()
    try:
        embeddings = {base.get_input_embeddings(), base.get_output_embeddings()} - {None}
    # What transformers says of a model that has several, as of texts and of images.
    except NotImplementedError:
        return set()
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if module in embeddings
        for name in module.state_dict()
    }


def _is_resized(model: nn.Module) -> bool:
    """Whether tokens were added to a model after it was loaded."""
    base = _pretrained(model)
    if base is None:
        return False
    try:
        loaded = type(base.config).from_pretrained(base.name_or_path)
    # It was not loaded from anywhere, or what it was loaded from is gone.
    except (OSError, ValueError):
        return False
    return loaded.get_text_config().vocab_size != base.config.get_text_config().vocab_size


def _pretrained(model: nn.Module) -> PreTrainedModel | None:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _check_finite(name: str, theta: torch.Tensor) -> None:
    if has_memory(theta) and not theta.is_meta and not theta.isfinite().all():
        raise ValueError(f"{name} has logits that are not finite: {NO_MASK}.")


def _check_patterns(config: MaskProConfig, names: list[str]) -> None:
    """
    Refuse regular expressions of a file that would take for ever on a model's names. Which ones do, only trying tells;
    and `re` stops for nothing, so it is tried in another process.
    """
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if not config.from_file or not isinstance(pattern, str) or pattern == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            continue
        try:
            subprocess.run(
                # Python as it comes, whatever the user's modules and variables make of it.
                [sys.executable, "-I", "-S", "-c", _MATCH_ALL],
                input=json.dumps([pattern, names, SECONDS_TO_MATCH]),
                capture_output=True,
                check=True,
                text=True,
                timeout=_SECONDS_TO_CHECK,
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            of_file = f"{field} of the adapter's configuration is the pattern {pattern!r:.99}, which"
            # What ran out of time was killed.
            if isinstance(error, subprocess.TimeoutExpired) or error.returncode < 0:
                raise ValueError(
                    f"{of_file} takes more than {SECONDS_TO_MATCH} s to match; put the layers' names into it."
                ) from error
            reason = (error.stderr.strip().splitlines() or [f"the check ended with {error.returncode}"])[-1]
            raise ValueError(f"{of_file} is none: {reason:.200}.") from error


def _unsupported(module: nn.Module) -> str:
    if isinstance(module, BaseTunerLayer):
        return (
            "another adapter is on it already; merge that one, or mask the base model first and add it over the mask"
        )
    if isinstance(module, nn.Linear) and not is_ordinary(module.weight):
        kind = module.weight.dtype if type(module.weight) in PLAIN else type(module.weight).__name__
        return f"its weight is {kind}; of quantized layers, torchao's and bitsandbytes' can be masked"
    return f"{type(module).__name__} is not nn.Linear or Conv1D; change target_modules"


def _places(model: nn.Module) -> dict[int, list[str]]:
    """The layers that each parameter is in, by the names that they have in the modules that hold them."""
    places: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            for parameter in child._parameters.values() if child is not None else ():
                places.setdefault(id(parameter), []).append(f"{prefix}.{name}".removeprefix("."))
    return places


def _why_not(
    module: nn.Module, config: MaskProConfig, embeddings: set[int], places: dict[int, list[str]]
) -> str | None:
    """Why a module cannot be masked, or `None` if it can."""
    if isinstance(module, MaskProLayer):
        module = module.get_base_layer()
    if isinstance(module, nn.Embedding):
        return "embeddings are not masked; take them out of target_modules"
    if isinstance(module, (nn.Linear, Conv1D)) and "weight" not in module._parameters:
        return (
            "its weight is computed from others, as by pruning or weight_norm; make it a parameter first "
            "(prune.remove, remove_parametrizations)"
        )
    cls = layer_class(module)
    if cls is None:
        return _unsupported(module)
    assert isinstance(module.weight, torch.Tensor)
    if module.weight.is_meta and "_hf_hook" in vars(module):
        return OFFLOADED
    if is_laid_out_for_cpus(module.weight):
        return "bitsandbytes has laid its weight out for CPUs; load the model anew, and add the adapter before it runs"
    if id(module.weight) in embeddings:
        return "its weight is that of an embedding, which merging would destroy; take it out of target_modules"
    if len(shared := places[id(module.weight)]) > 1:
        return f"{' and '.join(shared)} share one weight, and a mask is for one layer; exclude them by exclude_modules"
    if config.on_indivisible == "error" and (in_features := _in_features(module)) % config.m:
        return (
            f"in_features {in_features} is not a multiple of m = {config.m}; exclude it with exclude_modules, or all "
            "such layers by on_indivisible='dense'"
        )
    return None


def _in_features(module: nn.Module) -> int:
    assert isinstance(module.weight, torch.Tensor)
    return plain(weight_of(module)).shape[1 if isinstance(module, nn.Linear) else 0]


def _leave_dense(config: MaskProConfig, indivisible: dict[str, int], masked: int) -> None:
    """Leave layers out by name, so that what is saved says which."""
    # A pattern, since PEFT takes names of a list for ends of names: those of inner layers too.
    left = config.exclude_modules or []
    known = [left] if isinstance(left, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(left)]
    config.exclude_modules = "|".join([*known, *map(re.escape, indivisible)])
    dense = sum(indivisible.values())
    warnings.warn(
        f"{listed(list(indivisible))} stay dense, {dense:,} of {dense + masked:,} weights: m = {config.m} does not "
        "divide their in_features.",
        stacklevel=2,
    )


def _keep_layers_to_transform(config: MaskProConfig) -> None:
    """Of all linear layers and experts those of some decoder layers: PEFT goes by the ends of names alone."""
    if config.layers_to_transform is None:
        return
    layers = (
        config.layers_to_transform if isinstance(config.layers_to_transform, list) else [config.layers_to_transform]
    )

    def is_inside(name: str) -> bool:
        number = re.match(r"(?:.*?\.)?[^.]*\.(\d+)\.", name)
        return number is not None and int(number[1]) in layers

    config.target_modules = set(filter(is_inside, config.target_modules or ()))
    config.target_parameters = set(filter(is_inside, config.target_parameters or ())) or None


def _include_all_linear(config: MaskProConfig, model: nn.Module) -> None:
    """Name every linear layer, and every expert's weights unless they are named already."""
    _maybe_include_all_linear_layers(config, model)
    assert isinstance(config.target_modules, set)
    config.target_modules -= router_names(model)
    if config.target_parameters is None:
        _refuse_other_matrices(model)
        config.target_parameters = {
            f"{name}.{parameter}"
            for name, module in _modules(model)
            for parameter in expert_parameters(module)
            if not any(
                isinstance(check_target_module_exists(config, excluded), _ExcludedModule)
                for excluded in (name, f"{name}.{parameter}")
            )
        } or None


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model, by the names that they have without what masks them."""
    return ((name.replace(".base_layer", ""), module) for name, module in model.named_modules())


def _targeted_parameters(config: MaskProConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The parameters that `target_parameters` names: full name, module and own name."""
    for prefix, module in _modules(model):
        for parameter, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{parameter}"
            if any(f".{name}".endswith(f".{target}") for target in config.target_parameters or ()):
                yield name, module, parameter


def _refuse_other_matrices(model: nn.Module) -> None:
    """Matrices that are no layers, as experts that are kept in a way of their own, would stay dense."""
    layers = (nn.Linear, Conv1D, nn.Embedding, _ConvNd, BaseTunerLayer, MaskProExperts)
    inside = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, layers) or expert_parameters(module)
    )
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    others = {name: parameter for name, parameter in parameters if not name.startswith(inside)}
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)))
    fused = [name for name, parameter in others.items() if parameter.ndim == 3 and parameter.shape[0] > 1]
    if not fused and sum(parameter.numel() for parameter in others.values()) > linear:
        fused = sorted(others, key=lambda name: -others[name].numel())
    if fused:
        raise ValueError(
            f"cannot mask {listed(fused)}: what is no linear layer would stay dense, as experts fused in an unknown "
            "way; name target_modules to mask the linear layers alone."
        )
