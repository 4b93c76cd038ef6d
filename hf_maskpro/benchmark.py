"""The name that `hf_maskpro.deploy.bench` had before 0.2; it goes with 0.3."""

import warnings

from .deploy.bench import check_device, compare, in_turns, random_model, sparse_pair  # noqa: F401


warnings.warn(
    "hf_maskpro.benchmark is now hf_maskpro.deploy.bench; the old name goes with 0.3.", FutureWarning, stacklevel=2
)
