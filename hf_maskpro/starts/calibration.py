"""Calibration text as windows of tokens."""

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase


SAMPLES, SEQ_LEN = 128, 256
# What the papers of all rules use, on C4.
SOURCE_SAMPLES, SOURCE_SEQ_LEN = 128, 2048


def start_token_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    The start token that a tokenizer puts before every text: a model that was never trained without it is another model
    on windows that lack it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.

    Returns:
        `int`, *optional*: Its id; `None` if the tokenizer adds none, be there a `bos_token` or not.
    """
    # What an empty text is turned into, the tokenizer has added.
    added = tokenizer("").input_ids
    return tokenizer.bos_token_id if added[:1] == [tokenizer.bos_token_id] else None


def begin_windows(pieces: torch.Tensor, start_token: int | None) -> torch.Tensor:
    """Windows from pieces of a text, int64 `[windows, tokens]`: the start token, if there is one, before each."""
    return pieces if start_token is None else F.pad(pieces, (1, 0), value=start_token)


def random_windows(
    ids: torch.Tensor,
    samples: int = SAMPLES,
    seq_len: int = SEQ_LEN,
    seed: int = 0,
    start_token: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """
    Windows that start anywhere in a text, as batches for [`initialize_masks`].

    Args:
        ids (`torch.Tensor`): The token ids of the text, int64 `[tokens]`, or the windows that it was cut into, int64
            `[windows, tokens]`. A start token that it or each of them begins with is no part of the text.
        samples (`int`, defaults to 128): Number of windows.
        seq_len (`int`, defaults to 256): Length of a window, in tokens, the start token among them.
        seed (`int`): Seed of their positions.
        start_token (`int`, *optional*): Id of a token that every window begins with, from [`start_token_of`].

    Returns:
        `list[dict[str, torch.Tensor]]`: Batches of up to 8 windows.

    Raises:
        `ValueError`: if the text is shorter than one window.
    """
    length = seq_len if start_token is None else seq_len - 1
    if start_token is not None and (ids[..., :1] == start_token).all():
        ids = ids[..., 1:]
    ids = ids.flatten()
    if len(ids) < length:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than a calibration window of {seq_len}; lower seq_len."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (samples, 1), generator=generator)
    windows = begin_windows(ids[starts + torch.arange(length)], start_token)
    return [{"input_ids": batch} for batch in windows.split(8)]


@torch.no_grad()
def generated_text(
    model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, samples: int = SAMPLES, seq_len: int = SEQ_LEN
) -> list[dict[str, torch.Tensor]]:
    """
    Text that the model itself samples, for those who have none: every sequence from the start token on.

    Draws from torch's own generator.

    Args:
        model (`GenerationMixin`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        samples (`int`, defaults to 128): Number of sequences.
        seq_len (`int`, defaults to 256): Length of each, in tokens.

    Returns:
        `list[dict[str, torch.Tensor]]`: Batches for [`initialize_masks`].

    Raises:
        `ValueError`: if the tokenizer has neither a start nor an end token.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token to start a text from; pass a text.")
    # No end token, so that every sequence has the full length, and nothing of the model's own taste in sampling.
    settings = GenerationConfig(do_sample=True, max_new_tokens=seq_len - 1, top_k=0, pad_token_id=first)
    before, model.generation_config = model.generation_config, settings
    try:
        batches = []
        for count in tqdm([8] * (samples // 8) + [samples % 8] * (samples % 8 > 0), desc="generating text"):
            prompt = torch.full((count, 1), first, device=model.device)
            text = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
            batches.append({"input_ids": text.cpu()})
        return batches
    finally:
        model.generation_config = before
