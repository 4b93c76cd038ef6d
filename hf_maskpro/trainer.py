"""The name that `hf_maskpro.learning` had before 0.2; it goes with 0.3."""

import warnings

from .learning import MaskProTrainer, MaskProTrainingArguments  # noqa: F401


warnings.warn(
    "hf_maskpro.trainer is now hf_maskpro.learning; the old name goes with 0.3.", FutureWarning, stacklevel=2
)
