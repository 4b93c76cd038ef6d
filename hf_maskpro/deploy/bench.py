"""What sparse tensor cores make of a 2:4 model: dense against sparse, on the GPU at hand."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..subset import group_members
from .flat import flatten_inputs
from .semi_structured import to_semi_structured


DECODE_CONTEXT = 128
WARMUP = 3
# A small vocabulary, so that the time is that of the layers.
SHAPES = {
    "7b": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=4, vocab_size=512
    )
}

Step = Callable[[], torch.Tensor]


def check_device(fp8: bool = False) -> None:
    """
    Raises:
        `ValueError`: if there is no GPU with tensor cores for 2:4 (in FP8).
    """
    needed = (9, 0) if fp8 else (8, 0)
    wanted = f"{'FP8 + ' if fp8 else ''}2:4 needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or newer"
    if not torch.cuda.is_available():
        raise ValueError(f"nothing was measured: {wanted}, and torch finds no GPU here.")
    if (capability := torch.cuda.get_device_capability()) < needed:
        name = torch.cuda.get_device_name()
        raise ValueError(f"nothing was measured: {wanted}, and {name} has {capability[0]}.{capability[1]}.")


def random_model(shape: str, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> PreTrainedModel:
    """
    A few decoder layers of a large model's shape with random weights, of which 2 in 4 are zeros.

    Args:
        shape (`str`): Its name: `"7b"` is LLaMA-2-7B.
        dtype (`torch.dtype`): Its dtype.
        device (`str`): Where to make it.

    Returns:
        [`~transformers.PreTrainedModel`]: In eval mode.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(SHAPES[shape]).to(dtype).eval()
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            groups = module.weight.data.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
    return model


def sparse_pair(model: PreTrainedModel, fp8: bool = False) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, str]]:
    """
    A 2:4 model twice on its GPU: with its zeros multiplied, and with its linear layers on sparse tensor cores.

    Args:
        model ([`~transformers.PreTrainedModel`]): A merged 2:4 model, fp16 or bf16. It becomes the dense one.
        fp8 (`bool`): Convert the 2:4 layers of both to FP8 through torchao, with one scale per row.

    Returns:
        `tuple[PreTrainedModel, PreTrainedModel, dict[str, str]]`: Dense, sparse, and by parameter why a linear layer
            is dense in both.

    Raises:
        `ImportError`: if FP8 is asked for and torchao is not installed.
        `ValueError`: if no layer can be sparse.
    """
    sparse = copy.deepcopy(model)
    if not fp8:
        return model, sparse, to_semi_structured(sparse)
    _to_fp8(sparse, "sparse_2d_data_2d_metadata")
    return model, sparse, _to_fp8(model, "plain")


def _to_fp8(model: PreTrainedModel, packing_format: str) -> dict[str, str]:
    """Convert the 2:4 layers, and say why others were left."""
    layers = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = {name: reason for name, module in layers.items() if (reason := _why_not_fp8(module.weight))}
    if len(left) == len(layers):
        name, reason = next(iter(left.items()))
        raise ValueError(f"nothing was measured: no layer can be FP8 + 2:4; {name}: {reason}.")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise ImportError("--fp8 needs torchao: pip install 'hf-maskpro[fp8]'.") from error
    config = Float8DynamicActivationFloat8WeightConfig(version=2, packing_format=packing_format, granularity=PerRow())
    chosen = layers.keys() - left.keys()
    flatten_inputs(model)
    quantize_(model, config, lambda module, name: f"{name}.weight" in chosen)
    return left


def _why_not_fp8(weight: torch.Tensor) -> str | None:
    if weight.dtype != torch.bfloat16:
        return f"it is {weight.dtype}, not bfloat16"
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return "its shape is no multiple of 16"
    if int((group_members(weight, 4) != 0).sum(1).max()) > 2:
        return "it is not 2:4"
    return None


@torch.no_grad()
def compare(
    dense: PreTrainedModel, sparse: PreTrainedModel, prefill_tokens: int, batch_sizes: list[int], repeats: int
) -> list[dict[str, Any]]:
    """
    Time two forms of a model in turns: one sequence's prefill, and decoding at several batch sizes.

    Prefill is a forward pass over `prefill_tokens` random tokens that computes the last one's logits. Decoding is a
    forward pass of one token for each sequence of a batch after 128 tokens, and one more each time.

    Args:
        dense ([`~transformers.PreTrainedModel`]): A causal language model.
        sparse ([`~transformers.PreTrainedModel`]): Its other form, on the same device.
        prefill_tokens (`int`): Tokens of the sequence for prefill.
        batch_sizes (`list[int]`): Sequences that are decoded together.
        repeats (`int`): Timed passes of each model.

    Returns:
        `list[dict]`: By phase and batch size: the medians `dense_seconds` and `sparse_seconds`, the median `ratio` of
            the two in a pair of turns (above 1: sparse is faster), and `difference`, the largest absolute difference
            of their logits relative to the largest logit.
    """
    phases: list[tuple[str, int, int, Callable[[PreTrainedModel, torch.Tensor], Step]]] = [
        ("prefill", 1, prefill_tokens, _prefill)
    ]
    phases += [("decode", size, DECODE_CONTEXT, _decode) for size in batch_sizes]
    device = next(dense.parameters()).device
    rows = []
    for phase, batch_size, tokens, make in tqdm(phases, desc="bench"):
        ids = torch.randint(dense.config.vocab_size, (batch_size, tokens), device=device)
        steps = make(dense, ids), make(sparse, ids)
        logits, sparse_logits = (step().float() for step in steps)
        difference = (logits - sparse_logits).abs().max() / logits.abs().max()
        times = in_turns(*steps, repeats)
        rows.append(
            {
                "phase": phase,
                "batch_size": batch_size,
                "tokens": tokens,
                "dense_seconds": statistics.median(times[0]),
                "sparse_seconds": statistics.median(times[1]),
                "ratio": statistics.median(a / b for a, b in zip(*times, strict=True)),
                "difference": difference.item(),
            }
        )
    return rows


def _prefill(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    return lambda: model(input_ids=ids, logits_to_keep=1).logits


def _decode(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    return lambda: model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits


def in_turns(first: Step, second: Step, repeats: int) -> tuple[list[float], list[float]]:
    """
    Time two functions by turns, so that what slows the machine for a while slows both.

    Args:
        first (`Callable`): What to time.
        second (`Callable`): What to time against it. Which of them begins changes from pair to pair.
        repeats (`int`): Pairs, after three that are not timed.

    Returns:
        `tuple[list[float], list[float]]`: Seconds of each.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(WARMUP + repeats):
        for which in (0, 1) if i % 2 else (1, 0):
            seconds = _seconds((first, second)[which])
            if i >= WARMUP:
                times[which].append(seconds)
    return times


def _seconds(step: Step) -> float:
    _synchronize()
    begun = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - begun


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
