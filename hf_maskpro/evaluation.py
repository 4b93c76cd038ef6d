"""Perplexity of a language model on a text."""

import math

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .tuner import evaluating


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
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a window needs at least 2 tokens.")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][:max_tokens]
    if len(ids) < seq_len:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {seq_len}; lower seq_len.")
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    progress: bool = False,
) -> float:
    """
    Perplexity over non-overlapping windows, as in the pruning papers: every window is predicted from its own first
    token on, and what is left over at the end of the text is not used.

    Args:
        model (`torch.nn.Module`): A causal language model. It is put into eval mode meanwhile, in which a mask adapter
            applies its learned mask.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        text (`str`): The text.
        seq_len (`int`, defaults to 2048): Length of a window, in tokens.
        max_tokens (`int`, *optional*): Use no more of the text than this, in tokens.
        progress (`bool`): Show a progress bar.

    Returns:
        `float`: exp of the mean negative log-likelihood per predicted token.

    Raises:
        `ValueError`: if the text is shorter than one window.
    """
    inputs = windows(tokenizer, text, seq_len, max_tokens)
    device = next(model.parameters()).device
    total = 0.0
    with evaluating(model):
        for window in tqdm(inputs, desc="perplexity", disable=not progress):
            window = window.to(device).unsqueeze(0)
            logits = model(input_ids=window).logits
            total += F.cross_entropy(logits[0, :-1].float(), window[0, 1:], reduction="sum").item()
    return math.exp(total / (len(inputs) * (seq_len - 1)))


def task_scores(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: list[str], batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """
    Accuracy on tasks of lm-evaluation-harness (the `eval` extra).

    Args:
        model (`torch.nn.Module`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`list[str]`): Names of tasks, or paths of task files.
        batch_size (`int`): Sequences per forward pass.

    Returns:
        `dict[str, dict[str, float]]`: The harness's metrics by task.

    Raises:
        `ImportError`: if the extra is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("tasks need lm-evaluation-harness: pip install 'hf-maskpro[eval]'.") from error
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(harness, tasks=tasks)["results"]
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, float)}
        for task, scores in results.items()
    }
