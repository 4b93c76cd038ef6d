"""How masks are learned: the trainer, its arguments, and one file an estimator."""

from .arguments import ESTIMATORS, MaskProTrainingArguments
from .trainer import MaskProTrainer


__all__ = ["ESTIMATORS", "MaskProTrainer", "MaskProTrainingArguments"]
