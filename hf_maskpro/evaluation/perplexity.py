"""Perplexity of a language model on a text."""

import math

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..tuner import evaluating
from .windows import batches_of


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int = 512,
    max_tokens: int | None = None,
    progress: bool = False,
    stride: int | None = None,
    batch_size: int = 1,
    start_token: bool = True,
) -> float:
    """
    Perplexity by one of the two usual protocols.

    Without `stride`, over non-overlapping windows, as in the pruning papers: every window is predicted from its own
    first token on, and what is left over at the end of the text is not used.

    With `stride`, every window starts `stride` tokens after the one before, and only those of its tokens count that no
    earlier window has predicted. So every token but the very first is predicted once, from at least
    `seq_len - stride` tokens before it once there are so many. The last window may be shorter. The figure is lower,
    and takes `seq_len / stride` times as long.

    Where the tokenizer begins a text with a start token, every window begins with it, by both protocols, and the very
    first token of the text is predicted, too. The papers' windows have none but the first: `start_token=False`.

    Args:
        model (`torch.nn.Module`): A causal language model. It is put into eval mode meanwhile, in which a mask adapter
            applies its learned mask.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        text (`str`): The text.
        seq_len (`int`, defaults to 512): Length of a window, in tokens.
        max_tokens (`int`, *optional*): Use no more of the text than this, in tokens.
        progress (`bool`): Show a progress bar.
        stride (`int`, *optional*): Tokens from one window to the next, fewer than `seq_len`.
        batch_size (`int`, defaults to 1): Windows per forward pass. The figure does not depend on it, beyond the
            rounding of the model's dtype.
        start_token (`bool`, defaults to `True`): Begin every window with the start token, where the tokenizer adds
            one. It is one of the window's `seq_len` tokens, and none of the text's.

    Returns:
        `float`: exp of the mean negative log-likelihood per predicted token, which is taken in float32.

    Raises:
        `ValueError`: if the text is shorter than one window, the model's positions are fewer, or `stride` or
            `batch_size` out of range.
    """
    batches = batches_of(model, tokenizer, text, seq_len, max_tokens, stride, batch_size, start_token)
    total = 0.0
    with evaluating(model):
        for inputs, targets in tqdm(batches, desc="perplexity", disable=not progress):
            logits = model(input_ids=inputs, use_cache=False).logits
            # Row by row, so that only one window's logits are ever there in float32.
            for row, predicted in zip(logits, targets, strict=True):
                total += F.cross_entropy(row[-len(predicted) - 1 : -1].float(), predicted, reduction="sum").item()
    return math.exp(total / sum(len(predicted) for _, targets in batches for predicted in targets))
