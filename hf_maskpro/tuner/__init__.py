"""The PEFT method: configuration, layer, model and registration. The only room that touches PEFT's internals."""

from .config import DATA_FREE, RULES, MaskProConfig, saved_config, split_init_mask
from .experts import MaskProExperts, MaskProExpertWeight
from .layer import PLAIN_LOGIT_SCALE, MaskProLayer, logit_scale
from .model import MaskProModel, check_calls, evaluating, masked_layers, one_adapter, unmasked
from .registration import register


register(MaskProConfig, MaskProModel)

__all__ = [
    "DATA_FREE",
    "PLAIN_LOGIT_SCALE",
    "RULES",
    "MaskProConfig",
    "MaskProExpertWeight",
    "MaskProExperts",
    "MaskProLayer",
    "MaskProModel",
    "check_calls",
    "evaluating",
    "logit_scale",
    "masked_layers",
    "one_adapter",
    "saved_config",
    "split_init_mask",
    "unmasked",
]
