"""The verb that looks into adapters and checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from .. import deploy, hub
from .common import Json, Revision, Subfolder, show


def inspect(
    source: Annotated[str, typer.Argument(help="An adapter or a checkpoint: a local folder or a Hub id.")],
    n: Annotated[int, typer.Option(help="Pattern to check a checkpoint for: weights kept.")] = 2,
    m: Annotated[int, typer.Option(help="Pattern to check a checkpoint for: size of a group.")] = 4,
    revision: Revision = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter or checkpoint holds."""
    folder = Path(source) / (subfolder or "")
    if not folder.is_dir():
        if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ValueError(f"{folder} is not a folder; pass an adapter's or checkpoint's folder or a Hub id.")
        try:
            return show(hub.inspect_adapter(source, revision, subfolder), as_json)
        except EntryNotFoundError:
            patterns = ["*.json", "*.safetensors"]
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns)) / (subfolder or "")
    if (folder / "adapter_config.json").is_file():
        show(hub.inspect_adapter(str(folder)), as_json)
    elif (folder / "config.json").is_file():
        show(_inspect_checkpoint(folder, n, m), as_json)
    else:
        raise ValueError(f"{source} holds neither adapter_config.json nor config.json.")
    return None


def _inspect_checkpoint(folder: Path, n: int, m: int) -> dict[str, Any]:
    try:
        report = deploy.check_sparsity(folder, n, m)
    except ValueError as error:
        return {"kind": "checkpoint", "pattern": None, "why": str(error)}
    zeros = sum(report.values()) / len(report)
    return {"kind": "checkpoint", "pattern": f"{n}:{m}", "layers": len(report), "zeros": zeros}
