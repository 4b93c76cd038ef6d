"""How far a masked model is from the dense one, on text of the kind that it learned and on other text."""

from statistics import geometric_mean
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..tuner import evaluating, unmasked
from .windows import batches_of


def divergence(
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
    KL divergence of a masked model's predictions from the dense model's: what remains to be learned, without the
    part of a perplexity that no model could predict.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter, which applies its learned mask. The dense model is the
            same with the adapter disabled, so no second one is in memory.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        text (`str`): The text.
        seq_len (`int`, *optional*, defaults to `512`): As for [`perplexity`], like all below.
        max_tokens (`int`, *optional*): Use no more of the text than this, in tokens.
        progress (`bool`, *optional*, defaults to `False`): Show a progress bar.
        stride (`int`, *optional*): Tokens from one window to the next; without it windows do not overlap.
        batch_size (`int`, *optional*, defaults to `1`): Windows per forward pass.
        start_token (`bool`, *optional*, defaults to `True`): Begin windows as the tokenizer begins a text.

    Returns:
        `float`: The mean of `sum p log(p / q)` over the predicted tokens, in nats, where p is the dense and q the
            masked model's distribution. It is taken in float32.

    Raises:
        `ValueError`: if the model has no mask adapter, or as [`perplexity`] does.
    """
    figures = _compare(
        model, tokenizer, text, seq_len, max_tokens, progress, stride, batch_size, start_token, "divergence"
    )
    return figures["kl"]


def against_dense(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, str],
    home: str | None = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    progress: bool = False,
    stride: int | None = None,
    batch_size: int = 1,
    start_token: bool = True,
) -> dict[str, Any]:
    """
    A masked model against the dense one on several texts: what is at home on one kind of text may be lost elsewhere.

    Args:
        model (`torch.nn.Module`): As for [`divergence`].
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`dict[str, str]`): Texts that the mask was not learned from, by name.
        home (`str`, *optional*): Name of the one among them that is of the kind that was learned. All others count as
            elsewhere.
        seq_len (`int`, *optional*, defaults to `512`): As for [`perplexity`], for each of the texts, like all below.
        max_tokens (`int`, *optional*): Use no more of a text than this, in tokens.
        progress (`bool`, *optional*, defaults to `False`): Show a progress bar for each text.
        stride (`int`, *optional*): Tokens from one window to the next; without it windows do not overlap.
        batch_size (`int`, *optional*, defaults to `1`): Windows per forward pass.
        start_token (`bool`, *optional*, defaults to `True`): Begin windows as the tokenizer begins a text.

    Returns:
        `dict[str, Any]`: `"texts"`, with the `"perplexity"`, `"dense_perplexity"`, the `"ratio"` of the two and the
            divergence `"kl"` of each. `"at_home"` is the ratio of that text, if one is named. `"elsewhere"` is the
            geometric mean of the others' ratios, if there are others.

    Raises:
        `ValueError`: as [`divergence`] does, or if `home` is none of the texts.
    """
    if home is not None and home not in texts:
        raise ValueError(f"home is {home!r}, which is none of the texts: {', '.join(texts)}.")
    measured = {
        name: _compare(model, tokenizer, text, seq_len, max_tokens, progress, stride, batch_size, start_token, name)
        for name, text in texts.items()
    }
    report: dict[str, Any] = {"texts": measured}
    if home is not None:
        report["at_home"] = measured[home]["ratio"]
    others = [figures["ratio"] for name, figures in measured.items() if name != home]
    if others:
        report["elsewhere"] = geometric_mean(others)
    return report


@torch.no_grad()
def _compare(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int,
    max_tokens: int | None,
    progress: bool,
    stride: int | None,
    batch_size: int,
    start_token: bool,
    name: str,
) -> dict[str, float]:
    """Perplexity of both models on one text and their divergence, from one forward pass of each."""
    batches = batches_of(model, tokenizer, text, seq_len, max_tokens, stride, batch_size, start_token)
    losses = torch.zeros(3, dtype=torch.float64)
    with evaluating(model):
        for inputs, targets in tqdm(batches, desc=name, disable=not progress):
            with unmasked(model):
                dense = model(input_ids=inputs, use_cache=False).logits
            masked = model(input_ids=inputs, use_cache=False).logits
            # Row by row, so that only one window's logits are ever there in float32.
            for ours, theirs, predicted in zip(masked, dense, targets, strict=True):
                q, p = (row[-len(predicted) - 1 : -1].float().log_softmax(-1) for row in (ours, theirs))
                losses[0] += F.nll_loss(q, predicted, reduction="sum").item()
                losses[1] += F.nll_loss(p, predicted, reduction="sum").item()
                losses[2] += F.kl_div(q, p, reduction="sum", log_target=True).item()
    losses /= sum(len(predicted) for _, targets in batches for predicted in targets)
    perplexity, dense_perplexity = losses[:2].exp().tolist()
    return {
        "perplexity": perplexity,
        "dense_perplexity": dense_perplexity,
        "ratio": perplexity / dense_perplexity,
        "kl": losses[2].item(),
    }
