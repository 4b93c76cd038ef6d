import os
import re
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

from ..subset import Distribution
from .card import CARD_FILES, CONFIG_FILE, write_card
from .files import one_line, private_folder
from .registration import NAME, add_peft_type


FORMAT_VERSION = 1

# The one-shot rules of `hf_maskpro.starts`, and those of them whose masks are there at once.
RULES = ("magnitude", "random", "wanda", "ria", "sparsegpt", "gblm", "pruner-zero")
DATA_FREE = ("magnitude", "random")


REFINEMENTS = ("swaps", "blocks")


def split_init_mask(init_mask: str) -> tuple[str, list[str]]:
    """
    The rule or source of a starting mask, and what refines it, of `REFINEMENTS`.

    Raises:
        `ValueError`: if it is neither a rule nor looks like a path or Hub id.
    """
    # A folder may be called so itself; of a name that is longer than any folder's, `Path` would raise.
    rule, refined = init_mask, list[str]()
    for refinement in reversed(REFINEMENTS):
        if rule.endswith(f"+{refinement}") and not os.path.exists(rule):
            rule, refined = rule.removesuffix(f"+{refinement}"), [refinement, *refined]
    if rule not in RULES and "/" not in rule and not rule.endswith((".npz", ".safetensors")):
        raise ValueError(
            f"init_mask is {init_mask!r}; use one of {', '.join(map(repr, RULES))}, a folder or Hub id with a slash, "
            "or a .npz or .safetensors file; each may end in '+swaps', '+blocks' or "
            "'+swaps+blocks'."
        )
    return rule, refined


# What an entry of the lineage says of the mask at the end of the stage.
_OUTCOME = ("groups_changed", "changed", "evaluations")

# Of a configuration file. That of a model with 100 layers of 7 linear ones has a hundredth of it.
_MOST_BYTES = 2**24

_TYPES: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "auto_mapping": (dict,),
    "task_type": (str,),
    "peft_version": (str,),
    "target_modules": (list, set, str),
    "target_parameters": (list, set),
    "exclude_modules": (list, set, str),
    "layers_to_transform": (list, int),
    "init_mask": (str,),
    "logit_scale": (int, float),
    "save_logits": (bool,),
    "inference_mode": (bool,),
    "modules_to_save": (list,),
    "lineage": (list,),
    "target_weights": (int,),
    "base_fingerprint": (dict,),
    "masks_digest": (str,),
}
_OF_NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "base_fingerprint")


def _check_types(config: "MaskProConfig") -> None:
    """Refuse what is not of its type: a configuration may come from anybody's file."""
    for name, types in _TYPES.items():
        value, needed = getattr(config, name), config.__dataclass_fields__[name].default is not None
        if not isinstance(value, types) and (needed or value is not None):
            raise ValueError(f"{name} is {str(value)[:50]!r}, which is not {' or '.join(t.__name__ for t in types)}.")
    for name in _OF_NAMES:
        value = getattr(config, name)
        members = [*value, *value.values()] if isinstance(value, dict) else value or []
        # No name of a module has a line break in it, and no pattern that matches one.
        if wrong := [member for member in members if not isinstance(member, str) or not member.isprintable()]:
            raise ValueError(f"{name} holds {str(wrong[0])[:50]!r}, which is no name.")
    # PEFT makes regular expressions of them.
    if wrong := [module for module in config.modules_to_save or [] if not re.fullmatch(r"[\w.-]+", module)]:
        raise ValueError(f"modules_to_save holds {wrong[0][:50]!r}, which is not the name of a module.")
    base = (config.auto_mapping or {}).get("base_model_class")
    if base is not None and not (isinstance(base, str) and base.isidentifier()):
        raise ValueError(f"base_model_class of auto_mapping is {str(base)[:50]!r}, which is not the name of a class.")
    if config.target_weights is not None and config.target_weights < 1:
        raise ValueError(f"target_weights is {config.target_weights}, and a mask has at least one weight.")
    for stage in config.lineage or []:
        if not _is_stage(stage):
            raise ValueError(f"an entry of lineage is {str(stage)[:50]!r}, which is no stage of training.")


def _is_stage(stage: Any) -> bool:
    if not isinstance(stage, dict):
        return False
    changed, results = stage.get("groups_changed"), stage.get("evaluations", [])
    calibration = stage.get("calibration", {"tokens": 0})
    return (
        isinstance(stage.get("init_mask"), str)
        and isinstance(changed, dict)
        and all(map(_is_share, [*changed.values(), stage.get("changed", 0)]))
        and isinstance(calibration, dict)
        and isinstance(calibration.get("tokens"), int)
        and isinstance(stage.get("training", {}), dict)
        and isinstance(results, list)
        and all(map(_is_result, results))
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _is_result(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(value := entry.get("value"), (int, float)):
        return False
    # A whole number may be beyond every float, for which isfinite raises.
    if not abs(value) < inf:
        return False
    return all(isinstance(entry.get(name), str) for name in ("dataset", "metric", "protocol"))


@dataclass
class MaskProConfig(PeftConfig):
    """
    Configuration of a mask adapter: which `n` of every `m` consecutive input weights of a linear layer are kept.

    Args:
        n (`int`, defaults to 2):
            Weights kept in every group; at least 1.
        m (`int`, defaults to 4):
            Size of a group, along the input dimension of the layer: more than `n`, at most 16, and a divisor of
            every target's `in_features`, see `on_indivisible`. 2:4 is the pattern that sparse tensor cores accelerate.
        target_modules (`list[str]` or `str`, *optional*):
            Layers to mask: name endings, a regular expression, or `"all-linear"`. `None` means the latter: every
            `nn.Linear` and `Conv1D` except the output head and routers.
        target_parameters (`list[str]`, *optional*):
            Experts to mask, that a model keeps in 3-D parameters: name endings, as `"experts.gate_up_proj"`. `None`
            means all of them under `"all-linear"`, and none beside other `target_modules`.
        exclude_modules (`list[str]` or `str`, *optional*):
            Layers to leave dense, given in the same way.
        layers_to_transform (`list[int]` or `int`, *optional*):
            The decoder layers to mask, by number; `None` for all. Not with a regular expression.
        on_indivisible (`str`, defaults to `"error"`):
            What becomes of a layer whose `in_features` `m` does not divide: `"error"` refuses it, `"dense"` adds it to
            `exclude_modules` and says how many weights stay dense.
        init_mask (`str`, defaults to `"magnitude"`):
            The starting mask. `"magnitude"` (largest absolute weights) is the one to take without data; it and
            `"random"`, which is for experiments, are there at once. All others wait for [`initialize_masks`], and are
            better: the rules `"wanda"`, `"ria"`, `"sparsegpt"`, `"gblm"` and `"pruner-zero"`, or where a mask comes
            from. That has a slash or a suffix in its name: an adapter or pruned checkpoint (folder or Hub id), or a
            `.npz` or `.safetensors` file of masks. With `"+swaps"` at the end, as in `"wanda+swaps"`, swaps within
            the groups then lower every layer's reconstruction error. With `"+blocks"` after that, the masks of one
            decoder layer after another are learned against the dense model's outputs.
        logit_scale (`float`, *optional*):
            `C`: a kept member of the starting mask has the logit `C` more than a dropped one. The larger, the fewer
            groups change in a sample, about `(m - n) * exp(-C)` times 1 to `n`. `None` is the estimator's own default,
            filled in when training starts: 6, also by a plain `Trainer`, and for `residual` 3, or 10 with the raw
            advantage.
        distribution (`str`, *optional*):
            What the `residual` estimator samples from: `"plackett_luce"` (as in arXiv 2506.12876) or
            `"conditional_poisson"`. `None` is the former up to n = 2, and the latter beyond, where Plackett-Luce's
            score is a sum over 2**n subsets. `simple` is unbiased for conditional Poisson alone and always uses that.
        logits_dtype (`str`, defaults to `"float32"`):
            Data type of the trained offset `theta` of the logits: `"float32"` or `"bfloat16"`.
        save_logits (`bool`, defaults to `False`):
            Save `theta` beside the starting mask, exactly, instead of the learned mask alone. Needed to continue
            training as if it had never stopped. The file grows from 0.67 to 33 bits per weight.
        modules_to_save (`list[str]`, *optional*):
            Other modules to train and save. Needs a backward pass, so the `residual` estimator refuses it.
        lineage (`list[dict]`, *optional*):
            Written when saving: for every stage of training the starting mask and the share of groups that the
            learned mask changed, of all and per layer.
        target_weights (`int`, *optional*):
            Written when saving: how many weights are masked or kept, over all layers.
        base_fingerprint (`dict[str, str]`, *optional*):
            Written when the adapter is added: a short hash of every masked layer's weights.
        masks_digest (`str`, *optional*):
            Written when saving: a short hash of the masks in the file beside it.
        format_version (`int`, *optional*):
            Written when saving. A configuration that has it expects its mask from a file.

    Attributes:
        check_base (`bool`, defaults to `True`):
            Refuse to attach a loaded mask to other weights than those that it was learned for. Never saved: to go on
            nevertheless, load the configuration, set it to `False`, and pass `config=` to `from_pretrained`.

    Raises:
        `ValueError`: if a value is out of range.
    """

    n: int = field(default=2, metadata={"help": "Weights kept in every group."})
    m: int = field(default=4, metadata={"help": "Size of a group of consecutive input weights."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Layers to mask."})
    target_parameters: list[str] | set[str] | None = field(default=None, metadata={"help": "Experts to mask."})
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave dense."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Decoder layers to mask."})
    on_indivisible: Literal["error", "dense"] = field(
        default="error", metadata={"help": "What becomes of layers whose in_features m does not divide."}
    )
    init_mask: str = field(default="magnitude", metadata={"help": "The starting mask."})
    logit_scale: float | None = field(default=None, metadata={"help": "Logit of the starting mask's members."})
    distribution: Distribution = field(
        default=None,  # type: ignore[arg-type]
        metadata={"help": "What `residual` samples from."},
    )
    logits_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Data type of theta."})
    save_logits: bool = field(default=False, metadata={"help": "Save theta exactly, not the learned mask alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    lineage: list[dict[str, Any]] | None = field(default=None, metadata={"help": "Written when saving."})
    target_weights: int | None = field(default=None, metadata={"help": "Written when saving."})
    base_fingerprint: dict[str, str] | None = field(default=None, metadata={"help": "Written by adding the adapter."})
    masks_digest: str | None = field(default=None, metadata={"help": "Written when saving."})
    # A file has no say in whether it is checked.
    check_base: bool = field(
        default=True, init=False, metadata={"help": "Refuse weights that the mask was not learned for."}
    )
    format_version: int | None = field(default=None, metadata={"help": "Written when saving."})

    def __post_init__(self):
        # In a file the method's name is plain text.
        self.from_file = type(self.peft_type) is str  # type: ignore[has-type]
        self.peft_type = add_peft_type()
        try:
            super().__post_init__()
            self._check()
        except ValueError as error:
            if not self.from_file:
                raise
            raise ValueError(f"{CONFIG_FILE}: {one_line(error)}") from error
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))

        # A file with theta continues its last stage; one without it starts a stage from the mask that it holds.
        self._earlier = list(self.lineage or [])
        self._groups_changed: dict[str, float] | None = None
        self._changed = 0.0
        self._masks_digest = ""
        self._file_bytes = 0
        self.start: dict[str, Any] = {"init_mask": "adapter" if self.awaits_file else self.init_mask}
        if self.awaits_file and self.save_logits and self._earlier:
            last = self._earlier.pop()
            self.start = {key: value for key, value in last.items() if key not in _OUTCOME}

    def _check(self) -> None:
        _check_types(self)
        for name in ("n", "m"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, which is not a whole number; for 2:4 use n=2, m=4.")
        if not 2 <= self.m <= 16:
            raise ValueError(f"m is {self.m}, outside 2 to 16; choose a group size in that range.")
        if not 1 <= self.n < self.m:
            raise ValueError(f"n is {self.n}, outside 1 to m - 1 = {self.m - 1}; keep fewer weights than a group has.")
        if self.distribution is None:
            self.distribution = "plackett_luce" if self.n <= 2 else "conditional_poisson"
        for name, allowed in {
            "distribution": ("plackett_luce", "conditional_poisson"),
            "logits_dtype": ("float32", "bfloat16"),
            "on_indivisible": ("error", "dense"),
            "format_version": (None, FORMAT_VERSION),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, allowed))}.")
        split_init_mask(self.init_mask)
        layers = self.layers_to_transform if isinstance(self.layers_to_transform, list) else []
        if wrong := [layer for layer in layers if type(layer) is not int]:
            raise ValueError(f"layers_to_transform holds {str(wrong[0])[:50]!r}, which is no number of a layer.")
        if (
            self.layers_to_transform is not None
            and isinstance(self.target_modules, str)
            and self.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND
        ):
            raise ValueError("layers_to_transform goes with ends of names; put the numbers into target_modules.")
        if self.logit_scale is not None and not 0 < self.logit_scale <= 40:
            raise ValueError(f"logit_scale is {self.logit_scale}, outside 0 to 40; 6 to 10 is usual.")

    @property
    def pattern(self) -> str:
        """The pattern as it is usually written, `"2:4"`."""
        return f"{self.n}:{self.m}"

    @property
    def awaits_file(self) -> bool:
        """Whether the mask of an adapter with this configuration comes from a file."""
        return self.format_version is not None

    def resume(self, saved: "MaskProConfig") -> None:
        """Go on with the stage of training that a checkpoint's configuration is in."""
        self.logit_scale, self.start, self._earlier = saved.logit_scale, saved.start, saved._earlier

    def await_file_if_read(self) -> None:
        """
        Expect the mask from a file if this configuration comes from one, even if that one says nothing of a version:
        a mask that the file lacks must not become a starting mask in silence.
        """
        if self.from_file and not self.awaits_file:
            self.format_version = FORMAT_VERSION
            self.start = {"init_mask": "adapter"}

    def record_stage(
        self, groups_changed: dict[str, float], changed: float, target_weights: int, digest: str, file_bytes: int
    ) -> None:
        """
        Note how far the mask is from where this stage of its training started, for [`save_pretrained`].

        Args:
            groups_changed (`dict[str, float]`): Share of the groups whose mask changed, by layer.
            changed (`float`): Share of all groups, of whatever layer.
            target_weights (`int`): Weights of those layers together.
            digest (`str`): The [`masks_digest`] of the tensors that are saved.
            file_bytes (`int`): Their bytes.
        """
        self._groups_changed, self._changed = groups_changed, changed
        self._masks_digest, self._file_bytes = digest, file_bytes
        self.target_weights = target_weights

    def to_dict(self) -> dict[str, Any]:
        known = super().to_dict()
        del known["check_base"]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in known.items()}

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        if (size := Path(path_json_file).stat().st_size) > _MOST_BYTES:
            raise ValueError(f"{path_json_file} has {size:,} bytes, and a configuration at most {_MOST_BYTES:,}.")
        return super().from_json_file(path_json_file, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        version, lineage, digest = self.format_version, self.lineage, self.masks_digest
        if self._groups_changed is not None:
            self.format_version, self.masks_digest = FORMAT_VERSION, self._masks_digest
            # An adapter that was loaded and is saved again as it was has no further stage.
            passed = self.start != {"init_mask": "adapter"} or self._changed > 0
            outcome = {"groups_changed": self._groups_changed, "changed": self._changed}
            self.lineage = self._earlier + [{**self.start, **outcome}] * passed
        try:
            with private_folder(save_directory, *CARD_FILES) as folder:
                super().save_pretrained(str(folder), **kwargs)
                if self._groups_changed is not None:
                    mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping
                    write_card(folder, self.to_dict() | {"auto_mapping": mapping}, self._file_bytes)
        finally:
            self.format_version, self.lineage, self.masks_digest = version, lineage, digest


def saved_config(folder: Path) -> MaskProConfig:
    """
    The configuration of a saved mask adapter.

    Raises:
        `ValueError`: if it is not one.
    """
    path = folder / "adapter_config.json"
    try:
        kind = MaskProConfig.from_json_file(str(path)).get("peft_type")
        if kind is None:
            raise ValueError("it has no peft_type")
        if kind == NAME:
            return MaskProConfig.from_pretrained(str(folder))
    # The file is anybody's, and PEFT builds the configuration without looking at types.
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(f"{path} is not the configuration of a mask adapter: {reason}.") from error
    raise ValueError(
        f"{folder} is a {kind} adapter, not a mask adapter: merged into a sparse model it would make it dense again. "
        "Merge it into the dense model, then mask the result (hf-maskpro merge --allow-dense merges it all the same)."
    )
