"""
N:M sparsity masks as PEFT adapters. Importing this package registers the method with PEFT, and packed models with
transformers.
"""

import sys

from .version import __version__


# Registering loads torch, transformers and PEFT, which takes seconds. The command has to answer --help and typos at
# once, so its verbs import what they need when they run; whoever else imports the package gets all of it.
if "hf_maskpro_cli" not in sys.modules:
    from . import hub
    from .deploy import check_sparsity, packed
    from .evaluation import perplexity
    from .learning import MaskProTrainer, MaskProTrainingArguments, sparsify
    from .starts import initialize_masks
    from .tuner import MaskProConfig

__all__ = [
    "MaskProConfig",
    "MaskProTrainer",
    "MaskProTrainingArguments",
    "__version__",
    "check_sparsity",
    "hub",
    "initialize_masks",
    "packed",
    "perplexity",
    "sparsify",
]
