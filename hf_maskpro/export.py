"""The name that `hf_maskpro.deploy` had before 0.2; it goes with 0.3."""

import warnings

from .deploy import to_onnx, to_torchao_fp8  # noqa: F401


warnings.warn("hf_maskpro.export is now hf_maskpro.deploy; the old name goes with 0.3.", FutureWarning, stacklevel=2)
