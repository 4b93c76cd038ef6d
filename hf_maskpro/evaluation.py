"""Perplexity of a language model on a text, and its scores on tasks."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .tuner import evaluating


ZERO_SHOT = ("hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


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
    ids = _tokens(tokenizer, text, seq_len, max_tokens)
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, max_tokens: int | None) -> torch.Tensor:
    """The tokens of a text that fills at least one window, int64 `[tokens]`."""
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a window needs at least 2 tokens.")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][:max_tokens]
    if len(ids) < seq_len:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {seq_len}; lower seq_len.")
    return ids


def _spans(tokens: int, seq_len: int, stride: int | None) -> list[tuple[int, int, int]]:
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
    spans = _spans(len(_tokens(tokenizer, text, seq_len, max_tokens)), seq_len, stride)
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


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    progress: bool = False,
    stride: int | None = None,
    batch_size: int = 1,
) -> float:
    """
    Perplexity by one of the two usual protocols.

    Without `stride`, over non-overlapping windows, as in the pruning papers: every window is predicted from its own
    first token on, and what is left over at the end of the text is not used.

    With `stride`, every window starts `stride` tokens after the one before, and only those of its tokens count that no
    earlier window has predicted: every token but the very first is predicted once, from at least `seq_len - stride`
    tokens before it once there are so many. The last window may be shorter. The figure is lower, and takes
    `seq_len / stride` times as long.

    Args:
        model (`torch.nn.Module`): A causal language model. It is put into eval mode meanwhile, in which a mask adapter
            applies its learned mask.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        text (`str`): The text.
        seq_len (`int`, defaults to 2048): Length of a window, in tokens.
        max_tokens (`int`, *optional*): Use no more of the text than this, in tokens.
        progress (`bool`): Show a progress bar.
        stride (`int`, *optional*): Tokens from one window to the next, fewer than `seq_len`.
        batch_size (`int`, defaults to 1): Windows per forward pass. The figure does not depend on it, beyond the
            rounding of the model's dtype.

    Returns:
        `float`: exp of the mean negative log-likelihood per predicted token, which is taken in float32.

    Raises:
        `ValueError`: if the text is shorter than one window, the model's positions are fewer, or `stride` or
            `batch_size` out of range.
    """
    check_length(model, seq_len)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it needs to be at least 1.")
    ids = _tokens(tokenizer, text, seq_len, max_tokens)
    spans = _spans(len(ids), seq_len, stride)
    whole = sum(end - start == seq_len for start, _, end in spans)
    batches = [
        group[i : i + batch_size] for group in (spans[:whole], spans[whole:]) for i in range(0, len(group), batch_size)
    ]
    ids = ids.to(next(model.parameters()).device)
    total = 0.0
    with evaluating(model):
        for batch in tqdm(batches, desc="perplexity", disable=not progress):
            inputs = torch.stack([ids[start:end] for start, _, end in batch])
            logits = model(input_ids=inputs, use_cache=False).logits
            # Row by row, so that only one window's logits are ever there in float32.
            for row, (start, first, end) in zip(logits, batch, strict=True):
                predicted = row[first - start - 1 : -1].float()
                total += F.cross_entropy(predicted, ids[first:end], reduction="sum").item()
    return math.exp(total / sum(end - first for _, first, end in spans))


def task_scores(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """
    Scores on tasks of lm-evaluation-harness (the `eval` extra).

    Args:
        model (`torch.nn.Module`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`list[str]`): Names of tasks, paths of the harness's task files (YAML), or `"zero-shot"` for the seven
            of the pruning papers: HellaSwag, RACE, PIQA, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA.
        batch_size (`int`, defaults to 8): Sequences per forward pass.
        limit (`int`, *optional*): Use no more examples of a task than this.

    Returns:
        `dict[str, dict[str, float]]`: The harness's metrics by task; for `"zero-shot"` also the mean of the seven
            accuracies, under that name.

    Raises:
        `ImportError`: if the extra is not installed.
        `ValueError`: if there is no such task, or a task file is no YAML.
    """
    names, manager = find_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(model):
        harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = simple_evaluate(harness, tasks=names, limit=limit, task_manager=manager)["results"]
    scores = {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results.items()
    }
    if "zero-shot" in tasks:
        scores["zero-shot"] = {"acc": sum(scores[task]["acc"] for task in ZERO_SHOT) / len(ZERO_SHOT)}
    return scores


def find_tasks(tasks: list[str]) -> tuple[list[str], Any]:
    """
    What [`task_scores`] would run; the first thing to ask for, since it tells soon what is missing.

    Args:
        tasks (`list[str]`): As for [`task_scores`].

    Returns:
        `tuple[list[str], lm_eval.tasks.TaskManager]`: Names and paths with `"zero-shot"` spelt out, and the harness's
            index of its tasks.

    Raises:
        `ImportError`: if the extra is not installed.
        `ValueError`: if there is no such task, or a task file is no YAML.
    """
    manager = _task_manager()
    names = [name for task in tasks for name in (ZERO_SHOT if task == "zero-shot" else (task,))]
    for name in names:
        if name in manager.all_tasks:
            continue
        if not Path(name).is_file():
            raise ValueError(f"{name} is neither a task of lm-evaluation-harness nor a task file.")
        try:
            yaml.compose(Path(name).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{name} is no YAML file: {' '.join(str(error).split())}.") from error
    return names, manager


@cache
def _task_manager() -> Any:
    """The harness's index of its tasks, which takes seconds to make."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks need lm-evaluation-harness: pip install 'hf-maskpro[eval]'.") from error
    return TaskManager()
