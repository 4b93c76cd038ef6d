"""Calibration text as windows of tokens."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..tuner.base import fingerprint
from ..tuner.files import private_folder


SAMPLES, SEQ_LEN = 128, 256
# What the papers of all rules use, on C4.
SOURCE_SAMPLES, SOURCE_SEQ_LEN = 128, 2048
# What is generated at once: beyond so many rows a batch is hardly faster, and every token has its keys and values.
MOST_ROWS, BATCH_TOKENS = 64, 16_384


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
    seed: int = 42,
    start_token: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """
    Windows that start anywhere in a text, as batches for [`initialize_masks`].

    Args:
        ids (`torch.Tensor`): The token ids of the text, int64 `[tokens]`, or the windows that it was cut into, int64
            `[windows, tokens]`. A start token that it or each of them begins with is no part of the text.
        samples (`int`, defaults to 128): Number of windows.
        seq_len (`int`, defaults to 256): Length of a window, in tokens, the start token among them.
        seed (`int`, defaults to 42): Seed of their positions.
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
    return in_batches(windows)


def in_batches(windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Windows of token ids, int64 `[windows, tokens]`, as batches for [`initialize_masks`]."""
    return [{"input_ids": batch} for batch in windows.split(8)]


def generated_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int = SAMPLES,
    seq_len: int = SEQ_LEN,
    seed: int = 42,
    cache: Path | None = None,
) -> list[dict[str, torch.Tensor]]:
    """
    Text that the model itself samples: for those who have none, and to train on what the dense model knows.

    Every sequence begins with the start token, if the tokenizer adds one, and a token that is drawn from the whole
    vocabulary: the texts are of as many kinds as the model knows. Where the tokenizer has a chat template, every other
    batch begins with the opening of a conversation instead, so that the model asks a question and answers it. The rest
    is drawn from the model's distribution, in a text without special tokens.

    Args:
        model (`PreTrainedModel`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        samples (`int`, defaults to 128): Number of sequences.
        seq_len (`int`, defaults to 256): Length of each, in tokens.
        seed (`int`, defaults to 42): Seed of what is drawn. torch's own generator is left as it was.
        cache (`Path`, *optional*): Folder to keep the sequences in. What is there is not generated again, so an
            interrupted call goes on where it stopped.

    Returns:
        `list[dict[str, torch.Tensor]]`: Batches for [`initialize_masks`].

    Raises:
        `ValueError`: if the cache was made otherwise.
    """
    start_token = start_token_of(tokenizer)
    begun = [] if start_token is None else [start_token]
    conversation = _conversation(tokenizer, begun, seq_len)
    # What was added to a vocabulary may be text, such as line breaks.
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token, known in added.items() if known.special)}
    vocabulary = min(len(tokenizer), model.config.get_text_config().vocab_size)
    words = torch.tensor([token for token in range(vocabulary) if token not in special and token not in added])
    rows = rows_at_once(seq_len)
    made_by = {}
    if cache is not None:
        made_by = {"model": _identity(model), "seed": str(seed), "seq_len": str(seq_len), "begin": "any token"}
    parts = []
    for index in tqdm(range(-(-samples // rows)), desc="generating text"):
        path = None if cache is None else cache / f"{index:05d}.safetensors"
        if path is not None and path.is_file():
            parts.append(_read(path, made_by))
            continue
        # On a CPU torch looks at no more than 32 bits of a seed.
        own_seed = int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest())
        if conversation and index % 2:
            parts.append(_sample(model, torch.tensor([conversation] * rows), seq_len, own_seed))
        else:
            drawn = torch.randint(len(words), (rows, 1), generator=torch.Generator().manual_seed(own_seed))
            prompts = torch.cat([torch.tensor([begun] * rows, dtype=torch.int64), words[drawn]], 1)[:, : seq_len - 1]
            parts.append(_sample(model, prompts, seq_len, own_seed, sorted(special)))
        if path is not None:
            with private_folder(path.parent) as folder:
                save_file({"input_ids": parts[-1]}, folder / path.name, metadata=made_by)
    return in_batches(torch.cat(parts)[:samples])


def rows_at_once(seq_len: int) -> int:
    """How many sequences of so many tokens are generated at once."""
    return max(1, min(MOST_ROWS, BATCH_TOKENS // seq_len))


def _conversation(tokenizer: PreTrainedTokenizerBase, begun: list[int], seq_len: int) -> list[int] | None:
    """The tokens that a conversation begins with, if there is a template and room for more than these."""
    if tokenizer.chat_template is None:
        return None
    mark = "QUESTION"
    turns = str(tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False))
    opening = tokenizer(turns.rpartition(mark)[0], add_special_tokens=False).input_ids
    # Templates may leave it to the tokenizer.
    opening = opening if opening[: len(begun)] == begun else begun + opening
    return opening if 0 < len(opening) < seq_len else None


@torch.no_grad()
def _sample(
    model: PreTrainedModel, prompts: torch.Tensor, seq_len: int, seed: int, without: list[int] | None = None
) -> torch.Tensor:
    """Sequences that begin so, int64 `[rows, seq_len]`, and go on without some tokens."""
    # No end token, so that every sequence has the full length, and nothing of the model's own taste in sampling.
    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=seq_len - prompts.shape[1],
        top_k=0,
        pad_token_id=int(prompts[0, 0]),
        suppress_tokens=without,
    )
    prompts = prompts.to(model.device)
    before, model.generation_config = model.generation_config, settings
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts)).cpu()
    finally:
        model.generation_config = before


def _identity(model: PreTrainedModel) -> str:
    """A hash that another model, or the same under a mask, does not have."""
    known = "".join(fingerprint(parameter.detach()) for parameter in model.parameters())
    return hashlib.blake2b(known.encode(), digest_size=8).hexdigest()


def _read(path: Path, made_by: dict[str, str]) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != made_by:
                raise ValueError(f"{path.parent} holds text by another model, seed or seq_len; remove or rename it.")
            return file.get_tensor("input_ids")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; remove it, and it is generated again.") from error
