"""Who moves the logits: the trainer, its arguments, and one file an estimator."""

from .arguments import MaskProTrainingArguments
from .trainer import MaskProTrainer


__all__ = ["MaskProTrainer", "MaskProTrainingArguments"]
