"""Who moves the logits: the trainer, its arguments, and one file an estimator."""

from .trainer import MaskProTrainer, MaskProTrainingArguments


__all__ = ["MaskProTrainer", "MaskProTrainingArguments"]
