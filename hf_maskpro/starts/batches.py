"""What a batch of calibration data is."""

import inspect
from collections.abc import Mapping

from peft import PeftModel
from torch import nn


def forward_arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward, by name, also of one that PEFT has wrapped."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return inspect.signature(base.forward).parameters
