"""N-of-M subset distributions, their fused kernels, the mask codec and the random bits. Pure torch."""

from .bits import uniform_bits
from .codec import check_packed, codes_of, mask_of, pack, pack_codes, packed_width, unpack, unpack_codes
from .distributions import Distribution, log_prob, marginals, marginals_backward, mode, sample, score
from .kernels import (
    apply_packed,
    keep_of,
    mode_and_apply,
    mode_codes,
    sample_and_apply,
    sample_codes,
    score_and_update,
    theta_gradient,
)


__all__ = [
    "Distribution",
    "apply_packed",
    "check_packed",
    "codes_of",
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
    "sample",
    "sample_and_apply",
    "sample_codes",
    "score",
    "score_and_update",
    "theta_gradient",
    "uniform_bits",
    "unpack",
    "unpack_codes",
]
