"""The name that `hf_maskpro.starts` had before 0.2; it goes with 0.3."""

import warnings

from .starts import __path__, generated_text, initialize_masks, random_windows  # noqa: F401


warnings.warn(
    "hf_maskpro.initialization is now hf_maskpro.starts; the old name goes with 0.3.", FutureWarning, stacklevel=2
)
