"""What is minimised: the language-model loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer


def share_of_loss(
    trainer: Trainer, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """The micro-batch's share of the loss of the whole batch: shares add up to it. A scalar without a graph."""
    loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch).detach()
    # Such a loss is a sum over the number of items already.
    if trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None):
        return loss
    return loss / trainer.current_gradient_accumulation_steps


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Summed negative log-likelihood of every sequence.

    Args:
        logits (`torch.Tensor`): `[sequences, tokens, vocabulary]`, of any floating dtype.
        labels (`torch.Tensor`): int64 `[sequences, tokens]`, -100 where a token does not count.

    Returns:
        `torch.Tensor`: float32 `[sequences]`.
    """
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").sum(1)
