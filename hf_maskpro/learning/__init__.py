"""How masks are learned: the trainer, its arguments, one file an estimator, and the whole way in one call."""

from .arguments import ESTIMATORS, MaskProTrainingArguments
from .one_call import sparsify
from .trainer import MaskProTrainer


__all__ = ["ESTIMATORS", "MaskProTrainer", "MaskProTrainingArguments", "sparsify"]
