"""The arguments of a run."""

from dataclasses import dataclass, field
from math import inf

from transformers import TrainingArguments

from .estimator import Estimator
from .maskllm import MaskLLM
from .objectives import objective_weights
from .proxsparse import ProxSparse
from .residual import Residual
from .simple import Simple


ESTIMATORS: dict[str, type[Estimator]] = {
    "residual": Residual,
    "simple": Simple,
    "proxsparse": ProxSparse,
    "maskllm": MaskLLM,
}


# Their own settings become fields of the arguments below.
_SETTINGS = dict.fromkeys(known.Arguments for known in ESTIMATORS.values() if known.Arguments is not None)


@dataclass
class MaskProTrainingArguments(*_SETTINGS, TrainingArguments):  # type: ignore[misc]
    """
    `TrainingArguments` with an estimator, and with defaults that suit masks rather than weights. The settings of each
    estimator are fields too: see [`ResidualArguments`], [`SimpleArguments`], [`ProxSparseArguments`] and
    [`MaskLLMArguments`].

    Args:
        estimator (`str`, defaults to `"simple"`):
            `"simple"`: a backward pass through the exact marginals (Ahmed et al., ICLR 2023). `"residual"`: the policy
            gradient of MaskPro (arXiv 2506.12876), by forward passes alone, which learn less. `"proxsparse"` (arXiv
            2502.00258) and `"maskllm"` (arXiv 2409.17481): those papers' learners, by backward, to compare with.
        per_device_train_batch_size (`int`, defaults to 2):
            Windows per micro-batch.
        objective (`str` or `dict[str, float]`, *optional*):
            What is minimised. `"language-modeling"`: the loss of the text, to whose kind it also adapts the mask.
            `"distillation"`: KL(dense || masked) of every next token, the dense model being the same one without its
            adapters. Or a weight for each, `{"distillation": 2, "language-modeling": 1}`. Default
            `"language-modeling"`.
        max_length (`int`, defaults to 512):
            Length of the windows that text is packed into, in tokens; see [`MaskProTrainer`].
        distillation_temperature (`float`, defaults to 1.0):
            Of both distributions of the divergence, which is multiplied by its square.
        modules_to_save_learning_rate (`float`, defaults to 5e-5):
            Learning rate of `MaskProConfig.modules_to_save`, a parameter group of their own.
        max_skipped (`int`, defaults to 5):
            An update that is not finite is skipped; so many in a row stop the run.
        learning_rate (`float`, *optional*):
            Default 0.2 logits for `simple` in a run of 120 steps, and 0.57 for `residual` in one of 100. In shorter
            ones more, in longer ones less, by the square root of the ratio. In few steps each must be larger for a
            logit to cross `logit_scale`, in many the noise of each adds up. `residual` has no more than in 50 steps.
            50 with `advantage="raw"` (the paper's), 1e-4 for `proxsparse`, 5e-4 for `maskllm`.
        lr_scheduler_type (`str`, *optional*):
            Default linear to 0 for `residual`, constant with `advantage="raw"`; for `simple` 10 warm-up steps and a
            linear decay to a tenth; linear to 0 for `proxsparse`, a cosine to a tenth for `maskllm`.
        warmup_steps (`float`, *optional*):
            Default 0 for `residual` and `maskllm`; for `simple` 10, or a fifth of `max_steps` below 50, or a tenth of
            a run that is measured in epochs; a tenth of the run for `proxsparse`.
        adam_beta2 (`float`, *optional*):
            Default 0.98 for `simple`, since gradients of logits change quickly; 0.999 for `proxsparse`, 0.95 for
            `maskllm`. `residual` has no optimizer state.
        adam_epsilon (`float`, *optional*):
            Default 1e-8, 1e-5 for `maskllm`.
        weight_decay (`float`, *optional*):
            Default 0, 0.1 for `maskllm`.
        max_grad_norm (`float`, *optional*):
            Default 0, no clipping, for `simple` and `residual`: Adam scales every logit's step by itself, and the
            other has no gradient. 1 for `proxsparse` and `maskllm`.
        gradient_checkpointing (`bool`, *optional*):
            Off unless given, but on with `optimizer_in_backward`.

    Raises:
        `ValueError`: if a value is none of those allowed.
    """

    estimator: str = field(default="simple", metadata={"help": "How the mask is learned."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Windows per micro-batch."})
    objective: dict[str, float] | str | None = field(default=None, metadata={"help": "What is minimised."})
    max_length: int = field(default=512, metadata={"help": "Length of the windows of text, in tokens."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Of the divergence's distributions."})
    modules_to_save_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of modules_to_save."})
    max_skipped: int = field(default=5, metadata={"help": "Updates in a row that are not finite before a run stops."})
    learning_rate: float | None = field(default=None, metadata={"help": "The estimator's own unless given."})
    lr_scheduler_type: str | None = field(default=None, metadata={"help": "The estimator's own unless given."})
    warmup_steps: float | None = field(default=None, metadata={"help": "The estimator's own unless given."})
    adam_beta2: float | None = field(default=None, metadata={"help": "The estimator's own unless given."})
    adam_epsilon: float | None = field(default=None, metadata={"help": "The estimator's own unless given."})
    weight_decay: float | None = field(default=None, metadata={"help": "The estimator's own unless given."})
    max_grad_norm: float | None = field(default=None, metadata={"help": "The estimator's own unless given."})
    # On the command line it may stand alone.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "The estimator's own unless given.", "nargs": "?", "const": True}
    )

    def __post_init__(self):
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator is {self.estimator!r}; use one of {', '.join(map(repr, ESTIMATORS))}.")
        if self.optimizer_in_backward and self.estimator != "simple":
            raise ValueError(f"optimizer_in_backward=True is for estimator='simple', not {self.estimator!r}; drop it.")
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; a window needs at least 2 tokens.")
        if self.max_skipped < 1:
            raise ValueError(f"max_skipped is {self.max_skipped}; the run would not begin. 5 is usual.")
        if not self.distillation_temperature > 0:
            raise ValueError(f"distillation_temperature is {self.distillation_temperature}; it has to be positive.")
        common = {
            "objective": "language-modeling",
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            # The buffers are starting masks, which stay as they are.
            "ddp_broadcast_buffers": False,
        }
        for name, value in (common | ESTIMATORS[self.estimator].defaults(self)).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        objective_weights(self.objective)
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative or infinite.")
        if self.fp16:
            raise ValueError("fp16 scales gradients, which moves the logits by the scale; use bf16.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, outside 0 to 1; 0.9 to 0.999 is usual.")
        super().__post_init__()
        if (self.gradient_checkpointing_kwargs or {}).get("preserve_rng_state") is False:
            raise ValueError(
                "preserve_rng_state=False would draw other masks where activations are computed again; drop it."
            )
