"""Perplexity of a language model on a text, and its scores on tasks."""

from .perplexity import perplexity
from .tasks import ZERO_SHOT, find_tasks, task_scores
from .windows import check_length, protocol, windows


__all__ = ["ZERO_SHOT", "check_length", "find_tasks", "perplexity", "protocol", "task_scores", "windows"]
