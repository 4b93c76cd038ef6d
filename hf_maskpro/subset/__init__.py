"""N-of-M subset distributions, their fused kernels, the mask codec and the random bits. Pure torch."""

from .bits import random_keys, uniform_bits
from .codec import (
    candidates,
    check_packed,
    codes_of,
    group_members,
    mask_of,
    pack,
    pack_codes,
    packed_width,
    unpack,
    unpack_codes,
)
from .compiling import Kernel
from .distributions import Distribution, gumbel, log_prob, mode, sample, score
from .kernels import (
    apply_packed,
    keep_of,
    mode_and_apply,
    mode_codes,
    sample_and_apply,
    sample_codes,
    score_and_update,
    store_logits,
    theta_gradient,
)
from .marginals import marginals, marginals_backward


__all__ = [
    "Distribution",
    "Kernel",
    "apply_packed",
    "candidates",
    "check_packed",
    "codes_of",
    "group_members",
    "gumbel",
    "keep_of",
    "log_prob",
    "marginals",
    "marginals_backward",
    "mask_of",
    "mode",
    "mode_and_apply",
    "mode_codes",
    "pack",
    "pack_codes",
    "packed_width",
    "random_keys",
    "sample",
    "sample_and_apply",
    "sample_codes",
    "score",
    "score_and_update",
    "store_logits",
    "theta_gradient",
    "uniform_bits",
    "unpack",
    "unpack_codes",
]
