"""Mask adapters on the Hub: push, look into, record results. Importing it lets `push_to_hub` know mask adapters."""

from .push import push_folder
from .reading import inspect_adapter, read_masks, record_evaluation


__all__ = ["inspect_adapter", "push_folder", "read_masks", "record_evaluation"]
