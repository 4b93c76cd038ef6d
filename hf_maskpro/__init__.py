"""
N:M sparsity masks as PEFT adapters. Importing this package registers the method with PEFT, and packed models with
transformers.
"""

from importlib.metadata import version

from . import hub, packed
from .deploy import check_sparsity
from .evaluation import perplexity
from .initialization import initialize_masks
from .trainer import MaskProTrainer, MaskProTrainingArguments
from .tuner import MaskProConfig


__version__ = version("hf-maskpro")

__all__ = [
    "MaskProConfig",
    "MaskProTrainer",
    "MaskProTrainingArguments",
    "check_sparsity",
    "hub",
    "initialize_masks",
    "packed",
    "perplexity",
]
