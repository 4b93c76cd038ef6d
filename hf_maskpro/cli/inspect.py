"""The verb that looks into adapters and checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import check_on_hub, check_pattern
from .options import MASK, Json, Revision, Subfolder
from .output import show


def inspect(
    source: Annotated[str, typer.Argument(help="An adapter or a checkpoint: a local folder or a Hub id.")],
    n: Annotated[
        int,
        typer.Option(
            min=1, max=15, metavar="N", help="Pattern to check a checkpoint for: weights kept.", rich_help_panel=MASK
        ),
    ] = 2,
    m: Annotated[
        int,
        typer.Option(
            min=2,
            max=16,
            metavar="N",
            help="Pattern to check a checkpoint for: size of a group.",
            rich_help_panel=MASK,
        ),
    ] = 4,
    revision: Revision = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Show what an adapter or checkpoint holds."""
    figures = _inspect(source, n, m, revision, subfolder)
    if not as_json:
        show(figures)
    return figures


def _inspect(source: str, n: int, m: int, revision: str | None, subfolder: str | None) -> dict[str, Any]:
    check_pattern(n, m)
    folder = Path(source) / (subfolder or "")
    if not folder.is_dir():
        if Path(source).is_dir():
            raise ValueError(f"{folder} does not exist; pass --subfolder with a folder of {source}.")
        check_on_hub(source, "adapter_config.json", "an adapter's or checkpoint's folder", revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    from .. import hub

    if not folder.is_dir():
        try:
            return hub.inspect_adapter(source, revision, subfolder)
        except EntryNotFoundError:
            patterns = ["*.json", "*.safetensors"]
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns)) / (subfolder or "")
    if (folder / "adapter_config.json").is_file():
        return hub.inspect_adapter(str(folder))
    if (folder / "config.json").is_file():
        return _inspect_checkpoint(folder, n, m)
    raise ValueError(f"{source} holds neither adapter_config.json nor config.json.")


def _inspect_checkpoint(folder: Path, n: int, m: int) -> dict[str, Any]:
    from .. import deploy

    try:
        report = deploy.check_sparsity(folder, n, m)
    except ValueError as error:
        return {"kind": "checkpoint", "pattern": None, "why": str(error)}
    zeros = sum(report.values()) / len(report)
    return {"kind": "checkpoint", "pattern": f"{n}:{m}", "layers": len(report), "zeros": zeros}
