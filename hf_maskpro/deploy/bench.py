"""What sparse tensor cores make of a 2:4 model: dense against sparse, on the GPU at hand."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from ..subset import group_members
from .flat import flatten_inputs, own_forward
from .packed import pack_layers
from .semi_structured import to_semi_structured


PREFILL_TOKENS, BATCH_SIZES = (512, 2048, 8192, 32768), (1, 4, 16, 64)
DECODE_CONTEXT = 128
WARMUP = 3
# Ratios closer to 1 are no difference.
_EVEN = 0.02
# A small vocabulary, so that the time is that of the layers.
SHAPES = {
    "7b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=4,
        vocab_size=512,
        max_position_embeddings=PREFILL_TOKENS[-1],
    )
}

Step = Callable[[], Any]
Form = Literal["semi-structured", "fp8", "packed"]


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


def sparse_pair(
    model: PreTrainedModel, form: Form = "semi-structured", min_weights: int = 0
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, str]]:
    """
    A 2:4 model twice on its GPU: with its zeros multiplied, and with its linear layers sparse.

    Args:
        model ([`~transformers.PreTrainedModel`]): A merged 2:4 model, fp16 or bf16. It becomes the dense one.
        form (`str`): `"semi-structured"`: torch's, on sparse tensor cores. `"fp8"`: the 2:4 layers of both in FP8
            through torchao, with one scale per row. `"packed"`: this library's, which decodes with fewer bytes.
        min_weights (`int`): As of [`to_semi_structured`].

    Returns:
        `tuple[PreTrainedModel, PreTrainedModel, dict[str, str]]`: Dense, sparse, and by parameter why a linear layer
            is dense in both.

    Raises:
        `ImportError`: if FP8 is asked for and torchao is not installed.
        `ValueError`: if no layer can be sparse.
    """
    sparse = copy.deepcopy(model)
    if form == "packed":
        return model, sparse, pack_layers(sparse)
    if form == "semi-structured":
        return model, sparse, to_semi_structured(sparse, min_weights)
    _to_fp8(sparse, "sparse_2d_data_2d_metadata")
    return model, sparse, _to_fp8(model, "plain")


def _to_fp8(model: PreTrainedModel, packing_format: str) -> dict[str, str]:
    """Convert the 2:4 layers, and say why others were left."""
    layers = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    reasons = {name: own_forward(module) or _why_not_fp8(module.weight) for name, module in layers.items()}
    left = {name: reason for name, reason in reasons.items() if reason}
    if len(left) == len(layers):
        name, reason = next(iter(left.items()))
        raise ValueError(f"nothing was measured: no layer can be FP8 + 2:4; {name}: {reason}.")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise ImportError("FP8 needs torchao: pip install 'hf-maskpro[fp8]'.") from error
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
    dense: PreTrainedModel, sparse: PreTrainedModel, prefill_tokens: list[int], batch_sizes: list[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """
    Time two forms of a model in turns: prefill of a sequence, and decoding at several batch sizes. On a GPU each is
    timed as torch runs it, call by call, and replayed as one CUDA graph, which is how servers decode.

    Prefill is a forward pass over random tokens that computes the last one's logits. Decoding is a forward pass of one
    token for each sequence of a batch after 128 tokens, always into the same place of a static cache.

    Args:
        dense ([`~transformers.PreTrainedModel`]): A causal language model.
        sparse ([`~transformers.PreTrainedModel`]): Its other form, on the same device.
        prefill_tokens (`list[int]`): Lengths of the sequence for prefill.
        batch_sizes (`list[int]`): Sequences that are decoded together.
        repeats (`int`): Timed passes of each model.

    Yields:
        `dict`: Of a `phase`, `batch_size`, `tokens` and `mode` (`"eager"` or `"graph"`): the medians
            `dense_seconds` and `sparse_seconds`, the median `ratio` of the two in a pair of turns, what that makes
            sparse (`"faster"`, `"slower"` or within 2 % `"even"`), and `difference`, the largest absolute difference
            of their logits relative to the largest logit. Where a pass fails, as for want of memory or because it
            cannot become a graph, `failed` says why instead of the times.
    """
    phases: list[tuple[str, int, int, Callable[[PreTrainedModel, torch.Tensor], Step]]] = [
        ("prefill", 1, tokens, _prefill) for tokens in prefill_tokens
    ]
    phases += [("decode", size, DECODE_CONTEXT, _decode) for size in batch_sizes]
    device = next(dense.parameters()).device
    modes = ("eager", "graph") if device.type == "cuda" else ("eager",)
    # Graphs last, since one that cannot be captured may leave the device unusable.
    for mode, (phase, batch_size, tokens, make) in tqdm([*product(modes, phases)], desc="bench"):
        row = {"phase": phase, "batch_size": batch_size, "tokens": tokens, "mode": mode}
        # Drawn on the CPU: after a failed capture the generator of the GPU refuses to draw.
        ids = torch.randint(dense.config.get_text_config().vocab_size, (batch_size, tokens))
        try:
            ids = ids.to(device)
            steps = make(dense, ids), make(sparse, ids)
            if mode == "graph":
                steps = captured(steps[0]), captured(steps[1])
            figures = _compared(*steps, repeats)
        except RuntimeError as error:
            figures = {"failed": str(error).strip().partition("\n")[0]}
        yield row | figures


def _compared(dense: Step, sparse: Step, repeats: int) -> dict[str, Any]:
    logits, sparse_logits = (step().float() for step in (dense, sparse))
    difference = (logits - sparse_logits).abs().max() / logits.abs().max()
    times = in_turns(dense, sparse, repeats)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return {
        "dense_seconds": statistics.median(times[0]),
        "sparse_seconds": statistics.median(times[1]),
        "ratio": ratio,
        "sparse": "even" if abs(ratio - 1) < _EVEN else "faster" if ratio > 1 else "slower",
        "difference": difference.item(),
    }


def _prefill(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    # With a cache, since without one transformers looks at the positions, for which the host waits.
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


def _decode(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 1)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(ids.shape[1])
        return model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits

    return step


def captured(step: Step) -> Step:
    """
    The same step as one CUDA graph, which leaves the host no work between its kernels.

    Args:
        step (`Callable`): Work on the GPU that never waits for it, always on the same memory.

    Returns:
        `Callable`: Does that work again, and returns the same tensors.

    Raises:
        `RuntimeError`: if it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What compiles or takes a workspace at first use must not do so while it is captured.
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream as the current one; the outer context does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


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
