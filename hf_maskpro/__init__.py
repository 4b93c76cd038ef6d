"""
N:M sparsity masks as PEFT adapters. Importing this package registers the method with PEFT, and packed models with
transformers.
"""

from importlib.metadata import version

from . import hub
from .deploy import check_sparsity, packed
from .evaluation import perplexity
from .learning import MaskProTrainer, MaskProTrainingArguments, sparsify
from .starts import initialize_masks
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
    "sparsify",
]
