"""Dense against sparse, on the device at hand."""

import json
from collections import Counter
from importlib.metadata import version
from typing import Annotated, Literal

import typer
from rich.table import Column, Table

from .options import Json
from .output import console


def bench(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Merged 2:4 checkpoint: a local folder or a Hub id.")
    ] = None,
    shapes: Annotated[
        Literal["7b"] | None,
        typer.Option(metavar="7b", help="Random decoder layers of this shape instead of a checkpoint."),
    ] = None,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of the sequence for prefill.")
    ] = 2048,
    batch_size: Annotated[
        list[int], typer.Option(min=1, metavar="N", help="Sequences decoded together; repeat it for several.")
    ] = [1, 16, 64],  # noqa: B006, typer reads it once
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed passes of each of the two.")] = 30,
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 against FP8 + 2:4, through torchao.")] = False,
    as_json: Json = False,
) -> None:
    """Time a 2:4 model on sparse tensor cores against the same model dense."""
    if (model is None) == (shapes is None):
        raise ValueError("pass either --model DIR or --shapes 7b.")
    import torch

    from ..deploy import bench as benchmark
    from .common import load_model

    benchmark.check_device(fp8)
    base = load_model(model)[0] if model is not None else benchmark.random_model(str(shapes))
    dtype = base.dtype
    dense, sparse, left = benchmark.sparse_pair(base, fp8)
    rows = benchmark.compare(dense, sparse, prefill_tokens, batch_size, repeats)
    packages = ("torch", "transformers") + (("torchao",) if fp8 else ())
    figures = {
        "model": model or f"random layers of {shapes} shape",
        "device": torch.cuda.get_device_name(),
        "dtype": "float8_e4m3fn" if fp8 else str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in packages},
        "repeats": repeats,
        "rows": rows,
        "tolerance": 2 * torch.finfo(dtype).eps,
        "left_dense": left,
    }
    if as_json:
        typer.echo(json.dumps(figures))
        return
    names = ("batch", "tokens", "dense ms", "sparse ms", "ratio", "difference")
    columns = [Column("phase"), *(Column(name, justify="right", overflow="fold") for name in names)]
    table = Table(*columns, title=f"{figures['model']}, {figures['dtype']}, {figures['device']}")
    for row in rows:
        table.add_row(
            row["phase"],
            str(row["batch_size"]),
            f"{row['tokens']:,}",
            f"{1e3 * row['dense_seconds']:.3f}",
            f"{1e3 * row['sparse_seconds']:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.1e}",
        )
    console.print(table)
    console.print(
        f"Medians of {repeats} passes in turns; ratio above 1: sparse is faster. Difference: of the logits, relative "
        f"to the largest; two roundings of {str(dtype).removeprefix('torch.')} are {figures['tolerance']:.1e}."
    )
    for reason, count in Counter(left.values()).items():
        console.print(f"Dense in both: {count} linear layers: {reason}.")
