"""
Time of the refinement of a layer's mask by swaps, in torch and compiled, from Wanda's mask. The inputs go together and
differ in size, as in a model; a few features are far larger than the others.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hf_maskpro.starts.swaps import reconstruction_error, refine, refine_in_torch
from hf_maskpro.subset import mode


SHAPES = ("576x1536", "1536x576", "576x576")


def random_layer(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and X^T X of 16,384 tokens."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(in_features, generator=generator).exp()
    scale[:: in_features // 4] *= 30
    mix = torch.eye(in_features) + torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    lengths = torch.randn(16384, 1, generator=generator).mul(0.5).exp()
    inputs = (lengths * torch.randn(16384, in_features, generator=generator)) @ mix * scale
    # A product of two normal numbers has heavier tails than either.
    weight = torch.randn(2, out_features, in_features, generator=generator).prod(0)
    return weight.bfloat16().float(), inputs.T @ inputs


def fastest(run: Callable[[], torch.Tensor], repeats: int) -> tuple[float, torch.Tensor]:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        mask = run()
        times.append(time.perf_counter() - begun)
    return min(times), mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="out_features x in_features")
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    refine(torch.ones(1, 4), torch.tensor([[[True], [True], [False], [False]]]), torch.eye(4))  # compiles
    rows: list[dict[str, Any]] = []
    for shape in tqdm(args.shapes):
        weight, gram = random_layer(*map(int, shape.split("x")))
        for pattern in args.patterns:
            n, m = map(int, pattern.split(":"))
            scores = weight.abs() * gram.diagonal().sqrt()
            start = mode(scores.unflatten(1, (-1, m)).transpose(1, 2), n)
            torch_s, plain = fastest(lambda: refine_in_torch(weight, start, gram), args.repeats)  # noqa: B023
            compiled_s, refined = fastest(lambda: refine(weight, start, gram), args.repeats)  # noqa: B023
            first, after, compiled_after = (
                reconstruction_error(weight, mask, gram).sum().item() for mask in (start, plain, refined)
            )
            rows.append(
                {
                    "shape": shape,
                    "pattern": pattern,
                    "torch_s": torch_s,
                    "compiled_s": compiled_s,
                    "ratio": torch_s / compiled_s,
                    "error_left": after / first,
                    "equal_places": (plain == refined).double().mean().item(),
                    "error_difference": compiled_after / after - 1,
                }
            )
    result = {"threads": torch.get_num_threads(), "layers": rows}
    if args.json:
        print(json.dumps(result))
        return
    table = Table(title=f"refinement by swaps, {result['threads']} threads, fastest of {args.repeats}")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
