"""N-of-M subset distributions, their fused kernels, the mask codec and the random bits. Pure torch."""

from .bits import uniform_bits
from .codec import codes_of, mask_of, pack, pack_codes, packed_width, unpack, unpack_codes
from .distributions import Distribution, log_prob, marginals, marginals_backward, mode, sample, score
from .kernels import apply_codes, keep_of, mode_codes, move_logits, sample_codes, theta_gradient


__all__ = [
    "Distribution",
    "apply_codes",
    "codes_of",
    "keep_of",
    "log_prob",
    "marginals",
    "marginals_backward",
    "mask_of",
    "mode",
    "mode_codes",
    "move_logits",
    "pack",
    "pack_codes",
    "packed_width",
    "sample",
    "sample_codes",
    "score",
    "theta_gradient",
    "uniform_bits",
    "unpack",
    "unpack_codes",
]
