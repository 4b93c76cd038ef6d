"""How a text is cut into windows, and in words."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..starts import start_token_of
from ..starts.calibration import begin_windows
from ..starts.text import check_length, tokens_after_start


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


def mixed_windows(
    sources: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    tokens: int | None = None,
    seed: int = 42,
) -> torch.Tensor:
    """
    The training windows of a mixture of texts, shuffled across them: a function of these arguments alone, so that a
    resumed run continues the same stream.

    Without weights, all windows of all sources, or at random as many as `tokens` allows. With them, each source has
    its share of `tokens`; one that holds less is gone through again.

    Args:
        sources (`Sequence[torch.Tensor]`): The windows of each text, int64 `[windows, seq_len]`, from [`windows`] or
            [`starts.generated_text`].
        weights (`Sequence[float]`, *optional*): The share of each source in the windows, relative to the others.
        tokens (`int`, *optional*): How many tokens to draw. With weights and unless given, so many that no window is
            there twice.
        seed (`int`, defaults to 42): Seed of the choice and of the order.

    Returns:
        `torch.Tensor`: int64 `[windows, seq_len]`.

    Raises:
        `ValueError`: if there are not as many positive weights as sources, or a source gets no window.
    """
    sizes = [len(source) for source in sources]
    shares = sizes if weights is None else weights
    if len(shares) != len(sources) or not all(share > 0 for share in shares):
        raise ValueError(f"weights are {list(shares)}; give a positive number for each of the {len(sources)} sources.")
    scale = min(size / share for size, share in zip(sizes, shares, strict=True))
    if tokens is not None:
        asked = tokens / sources[0].shape[1] / sum(shares)
        scale = min(scale, asked) if weights is None else asked
    # A product that is a whole number but for rounding is that number.
    exact = [scale * share + 1e-6 for share in shares]
    counts = [int(count) for count in exact]
    if weights is None:
        counts = [max(1, count) for count in counts]
    elif tokens is not None:
        by_rest = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
        for i in by_rest[: int(sum(exact)) - sum(counts)]:
            counts[i] += 1
    if 0 in counts:
        raise ValueError(
            f"source {counts.index(0) + 1} of {len(sources)} gets no window at the shares {list(shares)}; raise its "
            "weight or the number of tokens."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for source, count in zip(sources, counts, strict=True):
        passes = [torch.randperm(len(source), generator=generator) for _ in range(-(-count // len(source)))]
        drawn.append(source[torch.cat(passes)[:count]])
    return torch.cat(drawn)[torch.randperm(sum(counts), generator=generator)]


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
    ids = torch.tensor(tokens_after_start(tokenizer, text, start_id)[:max_tokens])
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
    check_length(model.config, seq_len)
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
    seq_len: int = 512,
    max_tokens: int | None = None,
    stride: int | None = None,
    start_token: bool = True,
) -> str:
    """
    How [`perplexity`] reads a text, in words: two figures compare only where these are the same.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        text (`str`): The text.
        seq_len (`int`, defaults to 512): Length of a window, in tokens.
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
