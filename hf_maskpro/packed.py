"""The name that `hf_maskpro.deploy.packed` had before 0.2; it goes with 0.3."""

import warnings

from .deploy.packed import PackedConfig, PackedLinear, PackedQuantizer, pack, to_packed, unpack  # noqa: F401


warnings.warn(
    "hf_maskpro.packed is now hf_maskpro.deploy.packed; the old name goes with 0.3.", FutureWarning, stacklevel=2
)
