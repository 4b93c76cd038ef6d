"""How a text is cut into windows, and in words."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


def windows(
    tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, max_tokens: int | None = None
) -> torch.Tensor:
    """
    The non-overlapping windows of a text; what is left over at its end is not used.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        text (`str`): The text.
        seq_len (`int`): Length of a window, in tokens.
        max_tokens (`int`, *optional*): Use no more of the text than this, in tokens.

    Returns:
        `torch.Tensor`: int64 `[windows, seq_len]`.

    Raises:
        `ValueError`: if the text is shorter than one window.
    """
    ids = tokens_of(tokenizer, text, seq_len, max_tokens)
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, max_tokens: int | None) -> torch.Tensor:
    """The tokens of a text that fills at least one window, int64 `[tokens]`."""
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a window needs at least 2 tokens.")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][:max_tokens]
    if len(ids) < seq_len:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {seq_len}; lower seq_len.")
    return ids


def spans_of(tokens: int, seq_len: int, stride: int | None) -> list[tuple[int, int, int]]:
    """Of every window: where it starts, the first token that it predicts, where it ends."""
    if stride is None:
        return [(start, start + 1, start + seq_len) for start in range(0, tokens - seq_len + 1, seq_len)]
    if not 1 <= stride < seq_len:
        raise ValueError(
            f"stride is {stride}, outside 1 to seq_len - 1 = {seq_len - 1}; without it windows do not overlap."
        )
    seen = seq_len - stride
    return [(0, 1, seq_len)] + [
        (start, start + seen, min(start + seq_len, tokens)) for start in range(stride, tokens - seen, stride)
    ]


def protocol(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    stride: int | None = None,
) -> str:
    """
    How [`perplexity`] reads a text, in words: two figures compare only where these are the same.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        text (`str`): The text.
        seq_len (`int`, defaults to 2048): Length of a window, in tokens.
        max_tokens (`int`, *optional*): Use no more of the text than this, in tokens.
        stride (`int`, *optional*): Tokens from one window to the next.

    Returns:
        `str`: The kind of windows, their length, and how many tokens of the text they cover.

    Raises:
        `ValueError`: as [`perplexity`] does.
    """
    spans = spans_of(len(tokens_of(tokenizer, text, seq_len, max_tokens)), seq_len, stride)
    kind = f"non-overlapping windows of {seq_len} tokens"
    if stride is not None:
        kind = f"windows of {seq_len} tokens at a stride of {stride}"
    return f"{kind}, {spans[-1][-1]} tokens"


def check_length(model: torch.nn.Module, seq_len: int) -> None:
    """
    Raises:
        `ValueError`: if windows are longer than the model has positions: learned ones end in an index error there, and
            rotary ones in a figure that says nothing.
    """
    config: Any = model.config
    # Not every architecture counts positions.
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise ValueError(f"windows of {seq_len:,} tokens exceed the model's {positions:,} positions; lower seq_len.")
