"""
Time of one mask step of `residual` (sample, apply, update) over the linear layers of a model: the published formulas
in eager torch, this library eager and compiled, and the time that the bytes alone would take. The published formulas
are those of Plackett-Luce; beyond n = 2 this library's default is conditional Poisson.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from hf_maskpro.subset import compiling as compilation
from hf_maskpro.subset import pack, sample_and_apply, score_and_update


SCALE = 10.0
SEED = 1234


def shapes_of(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Out and in features of every linear layer but the head."""
    head = model.get_output_embeddings()
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


class Published:
    """The published formulas, written plainly: logits `[groups, m]`, masks by multinomial and scatter."""

    def __init__(self, weight: torch.Tensor, n: int, m: int):
        self.weight, self.n = weight, n
        self.logits = torch.zeros(weight.numel() // m, m, device=weight.device)
        self.logits.scatter_(1, weight.abs().float().view(-1, m).topk(n, dim=1).indices, SCALE)

    def sample_and_apply(self) -> torch.Tensor:
        probabilities = self.logits.softmax(dim=1)
        self.drawn = torch.multinomial(probabilities, self.n, replacement=False)
        self.mask = torch.zeros_like(self.logits).scatter_(1, self.drawn, 1.0)
        return self.weight * self.mask.view_as(self.weight).to(self.weight.dtype)

    def update(self, step: float) -> None:
        """The score of the observed order: of n draws, each from what the earlier ones left."""
        probabilities = self.logits.softmax(dim=1)
        score = self.mask.clone()
        left = torch.ones_like(probabilities)
        for k in range(self.n):
            rest = probabilities * left
            score -= rest / rest.sum(dim=1, keepdim=True)
            left.scatter_(1, self.drawn[:, k : k + 1], 0.0)
        self.logits.add_(score, alpha=step)


class Ours:
    """This library's kernels."""

    def __init__(self, weight: torch.Tensor, n: int, m: int, index: int, dtype: torch.dtype):
        out_features, groups = weight.shape[0], weight.shape[1] // m
        self.weight, self.n, self.index = weight, n, index
        self.distribution = "plackett_luce" if n <= 2 else "conditional_poisson"
        self.theta = torch.zeros(m, out_features, groups, dtype=dtype, device=weight.device).transpose(0, 1)
        kept = weight.abs().float().view(out_features, groups, m).topk(n, dim=2).indices
        mask = torch.zeros(out_features, groups, m, dtype=torch.bool, device=weight.device).scatter_(2, kept, True)
        self.packed = pack(mask.transpose(1, 2), n, m)

    def sample_and_apply(self) -> torch.Tensor:
        return sample_and_apply(
            self.weight, self.theta, self.packed, SCALE, self.n, SEED, self.index, self.distribution
        )

    def update(self, step: float) -> None:
        score_and_update(self.theta, self.packed, SCALE, self.n, step, SEED, self.index, self.distribution)


@contextmanager
def compiling(enabled: bool) -> Iterator[None]:
    before, compilation.SMALLEST_COMPILED = compilation.SMALLEST_COMPILED, 1 if enabled else 1 << 62
    try:
        yield
    finally:
        compilation.SMALLEST_COMPILED = before


def seconds(run: Callable[[], None], device: str) -> float:
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(8)]
    return 2 * source.numel() / statistics.median(times[1:])


def step(layers: list, part: str | None = None) -> None:
    for layer in layers:
        if part != "update":
            layer.sample_and_apply()
    for layer in layers:
        if part != "sample":
            layer.update(1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="a local folder or Hub id whose shape to take, with random weights; SmolLM2-135M's if absent"
    )
    parser.add_argument("--seven-b", action="store_true", help="the shape of a 7B Llama with random weights")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "8:16"])
    parser.add_argument("--logits-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="+", default=[], choices=["published", "eager"], help="leave these out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if args.model:
        config = AutoConfig.from_pretrained(args.model)
    elif args.seven_b:
        config = LlamaConfig(num_hidden_layers=32)
    else:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    weights = [torch.randn(shape, device=device).bfloat16() for shape in shapes_of(model)]
    ids = torch.randint(config.vocab_size, (32, 128), device=device)
    rate = copy_rate(device)
    dtype = getattr(torch, args.logits_dtype)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, labels=ids)

    figures: dict[str, dict[str, Any]] = {}
    for pattern in args.patterns:
        n, m = map(int, pattern.split(":"))
        contestants: dict[str, Callable[[], None]] = {}
        if "published" not in args.without:
            published = [Published(weight, n, m) for weight in weights]
            contestants["published_s"] = partial(step, published)
        ours = [Ours(weight, n, m, index, dtype) for index, weight in enumerate(weights)]
        compiled = {"compiled_s": None, "compiled_sample_s": "sample", "compiled_update_s": "update"}
        for name, part in compiled.items():
            contestants[name] = partial(step, ours, part)
        if "eager" not in args.without:
            contestants["eager_s"] = partial(step, ours)
        contestants["forward_s"] = forward
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for repeat in tqdm(range(args.repeats + 1), desc=pattern):
            for name, run in contestants.items():
                with compiling(name != "eager_s"):
                    taken = seconds(run, device)
                if repeat:
                    times[name].append(taken)
        row = {name: statistics.median(values) for name, values in times.items()}
        # Sampling reads mask, logits and weight and writes the masked weight; the update reads mask and logits and
        # writes logits.
        moved = sum(
            3 * layer.theta.nbytes + 2 * layer.packed.nbytes + 2 * weight.nbytes
            for layer, weight in zip(ours, weights, strict=True)
        )
        row["floor_s"] = moved / rate
        theta = sum(layer.theta.nbytes for layer in ours)
        dense = sum(weight.nbytes for weight in weights)
        row["sample_gb_per_s"] = (theta + 2 * dense) / row["compiled_sample_s"] / 1e9
        row["update_gb_per_s"] = 2 * theta / row["compiled_update_s"] / 1e9
        row["speedup"] = row["published_s"] / row["compiled_s"] if "published_s" in row else None
        row["share_of_forward"] = row["compiled_s"] / row["forward_s"]
        row["times_floor"] = row["compiled_s"] / row["floor_s"]
        figures[pattern] = {"distribution": ours[0].distribution, **row}
        del ours, contestants, run  # so that the next pattern does not find the memory full
        if "published" not in args.without:
            del published
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "target_weights": sum(weight.numel() for weight in weights),
        "logits_dtype": args.logits_dtype,
        "copy_gb_per_s": rate / 1e9,
        "patterns": figures,
    }
    if args.json:
        print(json.dumps(result))
        return
    table = Table(title=f"one mask step, {result['target_weights']:,} weights, {result['device']}, medians")
    names = [
        "published_s",
        "eager_s",
        "compiled_s",
        "floor_s",
        "forward_s",
        "speedup",
        "share_of_forward",
        "times_floor",
    ]
    for name in ["pattern", *names]:
        table.add_column(name, justify="right")
    for pattern, row in figures.items():
        table.add_row(pattern, *("" if row.get(name) is None else f"{row[name]:.3g}" for name in names))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
