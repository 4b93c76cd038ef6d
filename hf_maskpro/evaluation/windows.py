"""How a text is cut into windows, and in words."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..starts import start_token_of
from ..starts.calibration import begin_windows


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int,
    max_tokens: int | None = None,
    start_token: bool = True,
) -> torch.Tensor:
    """
    The non-overlapping windows of a text; what is left over at its end is not used.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        text (`str`): The text.
        seq_len (`int`): Length of a window, in tokens.
        max_tokens (`int`, *optional*): Use no more of the text than this, in tokens.
        start_token (`bool`, defaults to `True`): Begin every window with the start token, where the tokenizer adds
            one, and not the first alone: the text then fills the other `seq_len - 1` tokens of each.

    Returns:
        `torch.Tensor`: int64 `[windows, seq_len]`.

    Raises:
        `ValueError`: if the text is shorter than one window.
    """
    ids, start_id = tokens_of(tokenizer, text, seq_len, max_tokens, start_token)
    spans = spans_of(len(ids), seq_len, start_id)
    return begin_windows(torch.stack([ids[start:end] for start, _, end in spans]), start_id)


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, max_tokens: int | None, start_token: bool
) -> tuple[torch.Tensor, int | None]:
    """
    The tokens of a text that fills at least one window, int64 `[tokens]`, and the start token that each window begins
    with, which is not among them.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a window needs at least 2 tokens.")
    start_id = start_token_of(tokenizer) if start_token else None
    known = tokenizer(text, add_special_tokens=start_id is None, verbose=False).input_ids
    # A text may spell its start token out, as chat templates do.
    if start_id is not None and known[:1] == [start_id]:
        known = known[1:]
    ids = torch.tensor(known[:max_tokens])
    if len(ids) < seq_len - (start_id is not None):
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {seq_len}; lower seq_len.")
    return ids, start_id


def spans_of(tokens: int, seq_len: int, start_id: int | None, stride: int | None = None) -> list[tuple[int, int, int]]:
    """Of every window: where in the text it starts, the first token that it predicts, where it ends."""
    # From the start token even a window's first token of the text is predicted.
    unseen = 1 if start_id is None else 0
    length = seq_len - 1 + unseen
    if stride is None:
        return [(start, start + unseen, start + length) for start in range(0, tokens - length + 1, length)]
    if not 1 <= stride < seq_len:
        raise ValueError(
            f"stride is {stride}, outside 1 to seq_len - 1 = {seq_len - 1}; without it windows do not overlap."
        )
    seen = length - stride
    return [(0, unseen, length)] + [
        (start, start + seen, min(start + length, tokens)) for start in range(stride, tokens - seen, stride)
    ]


def batches_of(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int,
    max_tokens: int | None,
    stride: int | None,
    batch_size: int,
    start_token: bool,
) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """
    A text as a model is measured on it: batches of windows, int64 `[windows, tokens]`, on the model's device, and of
    every window the tokens at its end that count.
    """
    check_length(model, seq_len)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it needs to be at least 1.")
    ids, start_id = tokens_of(tokenizer, text, seq_len, max_tokens, start_token)
    spans = spans_of(len(ids), seq_len, start_id, stride)
    # The last window may be shorter, and then it is a batch of its own.
    whole = sum(end - start == spans[0][-1] for start, _, end in spans)
    groups = [
        group[i : i + batch_size] for group in (spans[:whole], spans[whole:]) for i in range(0, len(group), batch_size)
    ]
    ids = ids.to(next(model.parameters()).device)
    return [
        (
            begin_windows(torch.stack([ids[start:end] for start, _, end in group]), start_id),
            [ids[first:end] for _, first, end in group],
        )
        for group in groups
    ]


def protocol(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    stride: int | None = None,
    start_token: bool = True,
) -> str:
    """
    How [`perplexity`] reads a text, in words: two figures compare only where these are the same.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        text (`str`): The text.
        seq_len (`int`, defaults to 2048): Length of a window, in tokens.
        max_tokens (`int`, *optional*): Use no more of the text than this, in tokens.
        stride (`int`, *optional*): Tokens from one window to the next.
        start_token (`bool`, defaults to `True`): Begin every window with the start token, where the tokenizer adds
            one.

    Returns:
        `str`: The kind of windows, their length, whether each begins with a start token, and how many tokens of the
            text they cover.

    Raises:
        `ValueError`: as [`perplexity`] does.
    """
    ids, start_id = tokens_of(tokenizer, text, seq_len, max_tokens, start_token)
    spans = spans_of(len(ids), seq_len, start_id, stride)
    kind = f"non-overlapping windows of {seq_len} tokens"
    if stride is not None:
        kind = f"windows of {seq_len} tokens at a stride of {stride}"
    if start_id is not None:
        kind += ", each from the start token on"
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
