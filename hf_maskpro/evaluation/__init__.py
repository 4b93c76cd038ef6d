"""Perplexity of a language model on texts, at home and elsewhere, and its scores on tasks."""

from .divergence import against_dense, divergence
from .perplexity import perplexity
from .tasks import ZERO_SHOT, find_tasks, task_scores
from .windows import check_length, mixed_windows, protocol, windows


__all__ = [
    "ZERO_SHOT",
    "against_dense",
    "check_length",
    "divergence",
    "find_tasks",
    "mixed_windows",
    "perplexity",
    "protocol",
    "task_scores",
    "windows",
]
