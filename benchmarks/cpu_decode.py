"""
What a packed 2:4 weight is worth on a CPU: `F.linear` in bfloat16 on the dense weight against products that read the
packed one, values and positions, 0.5625 of the bytes. For one to eight tokens, with a model's shapes and so many
layers in turn that weights come from memory, not from a cache. Candidates take turns; ratios are of medians.

With `--end-to-end` it is whole models instead: a merged checkpoint against what `hf-maskpro export --target cpu` makes
of it, generating 64 tokens one at a time, and reading a prompt of 512.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_maskpro import packed


# in_features, out_features of a block's linear layers, each with how often it occurs.
SHAPES = {
    "SmolLM2-135M": [(576, 576, 2), (576, 192, 2), (576, 1536, 2), (1536, 576, 1)],
    "Llama-3.2-1B": [(2048, 2048, 2), (2048, 512, 2), (2048, 8192, 2), (8192, 2048, 1)],
}


def random_2_4(out_features: int, in_features: int) -> torch.Tensor:
    weight = torch.randn(out_features, in_features // 4, 4)
    return torch.zeros_like(weight).scatter(2, (top := weight.abs().topk(2).indices), weight.gather(2, top)).flatten(1)


class Dense:
    """`F.linear`, as a merged checkpoint runs."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.bfloat16()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def select(x0: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return torch.where(position & 2 != 0, x2, torch.where(position & 1 != 0, x1, x0))


@torch.compile(dynamic=False)
def compiled_product(planes: torch.Tensor, pairs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Each group is two bfloat16 in a word and a nibble: the first is member 0 to 2, the second 1 to 3. A byte has the
    nibbles of two groups, half a row apart.

    Args:
        planes (`torch.Tensor`): The tokens' inputs by member, half and group, float32 `[4, 2, tokens, groups // 2]`.
        pairs (`torch.Tensor`): int32 `[out_features, 2, groups // 2]`.
        positions (`torch.Tensor`): uint8 `[out_features, groups // 2]`.
    """
    bits = positions.int().unsqueeze(0)
    total = 0.0
    for half in (0, 1):
        word, nibble = pairs[:, half].unsqueeze(0), bits >> 4 * half
        xs = [plane[half].unsqueeze(1) for plane in planes.unbind(0)]
        total = total + (word << 16).view(torch.float32) * select(*xs[:3], nibble)
        total = total + (word & -65536).view(torch.float32) * select(*xs[1:], nibble >> 2)
    return total.sum(-1).to(torch.bfloat16)


class Compiled:
    """torch.compile's product: values as pairs, positions as nibbles."""

    def __init__(self, weight: torch.Tensor):
        groups = weight.unflatten(1, (-1, 4))
        where = (groups != 0).int().topk(2).indices.sort().values
        self.pairs = groups.gather(2, where).bfloat16().view(torch.int32).squeeze(-1).unflatten(1, (2, -1))
        nibble = (where[..., 0] | where[..., 1] - 1 << 2).unflatten(1, (2, -1))
        self.positions = (nibble[:, 0] | nibble[:, 1] << 4).to(torch.uint8)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        planes = x.float().unflatten(1, (2, -1, 4)).permute(3, 1, 0, 2).contiguous()
        return compiled_product(planes, self.pairs, self.positions)


class Packed:
    """What `hf-maskpro export --target cpu` is for: a C++ loop that expands packed values in AVX-512 registers."""

    def __init__(self, weight: torch.Tensor):
        self.layer = packed.PackedLinear(*reversed(weight.shape), bias=False)
        self.layer.values, self.layer.positions = packed.pack(weight.bfloat16())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@cache
def dense_loop() -> ctypes.CDLL:
    source = Path(packed.__file__).with_name("packed.cpp").read_text()
    begin, end = source.index("  return _mm512_maskz_expand_epi16"), source.index("static inline uint16_t rounded")
    source = f"{source[:begin]}  return _mm512_loadu_si512(values);\n}}\n{source[end:]}"
    return packed.compiled(source.replace("* 16", "* 32"))


class DenseLoop(Dense):
    """The same loop over the dense weight: what is due to the loop and not to packing."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(len(x), len(self.weight), dtype=x.dtype)
        pointers = x.data_ptr(), self.weight.data_ptr(), 0, y.data_ptr()
        dense_loop().product(*pointers, *x.shape, len(self.weight), torch.get_num_threads())
        return y


CANDIDATES: dict[str, Callable] = {"dense": Dense, "compiled": Compiled, "packed": Packed, "dense-loop": DenseLoop}


def check(product: Callable, reference: Dense, in_features: int) -> None:
    for tokens in (1, 2, 4, 8):
        x = torch.randn(tokens, in_features).bfloat16()
        torch.testing.assert_close(product(x).float(), reference(x).float(), rtol=0.05, atol=0.3)


def measure(model: str, names: list[str], megabytes: int, repeats: int) -> list[dict[str, object]]:
    """Seconds of one pass over all layers, per candidate and number of tokens."""
    shapes = [(k, n) for k, n, times in SHAPES[model] for _ in range(times)]
    block = 2 * sum(k * n for k, n in shapes)
    layers = shapes * max(2, megabytes * 2**20 // block)
    weights = {shape: random_2_4(*reversed(shape)) for shape in shapes}
    products: dict[str, list[Callable]] = {}
    for name in ("dense", *names):
        made = {shape: CANDIDATES[name](weight) for shape, weight in weights.items()}
        for shape, product in made.items():
            check(product, Dense(weights[shape]), shape[0])
        # Of the same values, but each at its own place in memory.
        products[name] = [deepcopy(made[shape]) for shape in layers]
    rows = []
    for tokens in (1, 2, 4, 8):
        inputs = {k: torch.randn(tokens, k).bfloat16() for k, _ in shapes}
        seconds: dict[str, list[float]] = {name: [] for name in products}
        for repeat in range(repeats + 1):
            for name, stack in products.items():
                begun = time.perf_counter()
                for (k, _), product in zip(layers, stack, strict=True):
                    product(inputs[k])
                if repeat:
                    seconds[name].append(time.perf_counter() - begun)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rows.append(
            {
                "shapes": model,
                "tokens": tokens,
                "dense_gb_per_s": block * len(layers) / len(shapes) / medians["dense"] / 1e9,
                "milliseconds": {name: 1000 * value for name, value in medians.items()},
                "ratio": {name: medians["dense"] / medians[name] for name in names},
            }
        )
    return rows


def random_1b() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_config(config)
    weight = cache(random_2_4)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(0.02 * weight(*module.weight.shape))
    return model


def end_to_end(folders: list[str], repeats: int) -> dict[str, object]:
    """Tokens a second of two forms of a model, by turns, and their bytes on disk."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in folders]
    sizes = [sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) for folder in folders]
    ids = torch.randint(models[0].config.vocab_size, (1, 512))
    figures: dict[str, object] = {"folders": folders, "threads": torch.get_num_threads(), "bytes": sizes}
    for work, tokens in ((generate, 64), (read, 512)):
        times = [[seconds(work, model, ids) for model in models] for _ in range(repeats + 1)]
        medians = [statistics.median(column) for column in zip(*times[1:], strict=True)]
        figures[work.__name__] = {"tokens_per_s": [tokens / s for s in medians], "ratio": medians[0] / medians[1]}
    return figures


def seconds(step: Callable, *inputs: object) -> float:
    begun = time.perf_counter()
    step(*inputs)
    return time.perf_counter() - begun


def generate(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids[:, :8], do_sample=False, min_new_tokens=64, max_new_tokens=64, pad_token_id=0)


def read(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, logits_to_keep=1).logits


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--candidates", nargs="*", default=list(CANDIDATES)[1:], choices=list(CANDIDATES)[1:])
    parser.add_argument("--megabytes", type=int, default=1024, help="of dense weights to go through")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--end-to-end", nargs=2, metavar=("DENSE", "PACKED"), help="folders of a model's two forms")
    parser.add_argument("--random-1b", metavar="FOLDER", help="write a 2:4 checkpoint of Llama-3.2-1B's shape")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.random_1b:
        random_1b().save_pretrained(args.random_1b)
        return
    if args.end_to_end:
        print(json.dumps(end_to_end(args.end_to_end, args.repeats)))
        return
    torch._dynamo.config.recompile_limit = 64  # a kernel per shape and number of tokens
    rows = [row for model in args.models for row in measure(model, args.candidates, args.megabytes, args.repeats)]
    if args.json:
        print(json.dumps({"threads": torch.get_num_threads(), "megabytes": args.megabytes, "rows": rows}))
        return
    table = Table(
        title=f"one pass over {args.megabytes} MB of dense bfloat16 weights, {torch.get_num_threads()} threads"
    )
    for name in ("shapes", "tokens", "dense, ms", "dense, GB/s", *(f"{name}, ratio" for name in args.candidates)):
        table.add_column(name)
    for row in rows:
        ratios = (f"{row['ratio'][name]:.2f}" for name in args.candidates)
        dense = f"{row['milliseconds']['dense']:.1f}", f"{row['dense_gb_per_s']:.1f}"
        table.add_row(row["shapes"], str(row["tokens"]), *dense, *ratios)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
