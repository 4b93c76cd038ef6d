"""Dense against sparse, on the device at hand."""

from collections import Counter
from importlib.metadata import version
from typing import Annotated, Any, Literal

import typer
from rich.table import Column, Table

from .inputs import check_extra, check_model
from .options import Json
from .output import console


MODEL, TIMING = "Model", "Timing"


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Merged 2:4 checkpoint: a local folder or a Hub id.", rich_help_panel=MODEL
        ),
    ] = None,
    shapes: Annotated[
        Literal["7b"] | None,
        typer.Option(
            metavar="7b", help="Random decoder layers of this shape instead of a checkpoint.", rich_help_panel=MODEL
        ),
    ] = None,
    prefill_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of the sequence for prefill; repeat it for several. [default: 512 to 32,768]",
            rich_help_panel=TIMING,
        ),
    ] = None,
    batch_size: Annotated[
        list[int],
        typer.Option(
            min=1, metavar="N", help="Sequences decoded together; repeat it for several.", rich_help_panel=TIMING
        ),
    ] = [1, 4, 16, 64],  # noqa: B006, typer reads it once
    repeats: Annotated[
        int, typer.Option(min=1, metavar="N", help="Timed passes of each of the two.", rich_help_panel=TIMING)
    ] = 30,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="FP8 against FP8 + 2:4, through torchao.", rich_help_panel=MODEL)
    ] = False,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed", help="Dense against this library's packed weights, for decoding.", rich_help_panel=MODEL
        ),
    ] = False,
    min_weights: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Leave smaller layers dense; for torch's 2:4 products alone.",
            rich_help_panel=MODEL,
        ),
    ] = 0,
    as_json: Json = False,
) -> dict[str, Any]:
    """Time a 2:4 model with sparse layers against the same model dense."""
    if (model is None) == (shapes is None):
        raise ValueError("pass either --model DIR or --shapes 7b.")
    if fp8 and packed:
        raise ValueError("pass either --fp8 or --packed.")
    if model is not None:
        check_model(model, None)
    if fp8:
        check_extra("torchao", "--fp8", "fp8")
    import torch

    from ..deploy import bench as benchmark
    from .common import load_model

    benchmark.check_device(fp8)
    base = load_model(model)[0] if model is not None else benchmark.random_model(str(shapes))
    dtype = base.dtype
    longest = base.config.get_text_config().max_position_embeddings
    if prefill_tokens is None:
        prefill_tokens = [tokens for tokens in benchmark.PREFILL_TOKENS if tokens <= longest]
    elif max(prefill_tokens) > longest:
        raise ValueError(f"--prefill-tokens {max(prefill_tokens)} is more than the model's {longest:,} positions.")
    form: benchmark.Form = "fp8" if fp8 else "packed" if packed else "semi-structured"
    dense, sparse, left = benchmark.sparse_pair(base, form, min_weights)
    rows = list(benchmark.compare(dense, sparse, prefill_tokens, batch_size, repeats))
    packages = ("torch", "transformers") + (("torchao",) if fp8 else ())
    figures = {
        "model": model or f"random layers of {shapes} shape",
        "device": torch.cuda.get_device_name(),
        "form": form,
        "dtype": "float8_e4m3fn" if fp8 else str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in packages},
        "repeats": repeats,
        "rows": rows,
        "tolerance": 2 * torch.finfo(dtype).eps,
        "left_dense": left,
    }
    if as_json:
        return figures
    names = ("batch", "tokens", "mode", "dense ms", "sparse ms", "ratio", "sparse is", "difference")
    columns = [Column("phase", overflow="fold"), *(Column(name, justify="right", overflow="fold") for name in names)]
    table = Table(*columns, title=f"{figures['model']}, {form}, {figures['dtype']}, {figures['device']}")
    for row in rows:
        cells = [row["phase"], str(row["batch_size"]), f"{row['tokens']:,}", row["mode"]]
        if "failed" in row:
            table.add_row(*cells, "", "", "", f"not run: {row['failed']}")
            continue
        table.add_row(
            *cells,
            f"{1e3 * row['dense_seconds']:.3f}",
            f"{1e3 * row['sparse_seconds']:.3f}",
            f"{row['ratio']:.2f}",
            row["sparse"],
            f"{row['difference']:.1e}",
        )
    console.print(table)
    console.print(
        f"Medians of {repeats} passes in turns; a graph is a pass without the host's work. Difference: of the logits, "
        "relative to the largest; two roundings of "
        f"{str(dtype).removeprefix('torch.')} are {figures['tolerance']:.1e}."
    )
    for reason, count in Counter(left.values()).items():
        console.print(f"Dense in both: {count} linear layers: {reason}.")
    return figures
