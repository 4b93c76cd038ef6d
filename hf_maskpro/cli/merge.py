"""The verb that writes a sparse checkpoint."""

from typing import Annotated, Any

import typer

from .inputs import adapter_folder, check_model
from .options import FILES, GgufFile, Json, Model, Output, Overwrite, Revision, Subfolder
from .output import say_next, show


def merge(
    model: Model,
    adapter: Annotated[
        str, typer.Option(metavar="ADAPTER", help="Mask adapter: a local folder or a Hub id.", rich_help_panel=FILES)
    ],
    output: Output,
    revision: Revision = None,
    subfolder: Subfolder = None,
    allow_dense: Annotated[
        bool,
        typer.Option(
            "--allow-dense", help="Merge another method's adapter all the same: it fills zeros.", rich_help_panel=FILES
        ),
    ] = False,
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write an ordinary sparse checkpoint, checked."""
    check_model(model, gguf_file)
    folder = adapter_folder(adapter, revision, subfolder)
    from peft import PeftConfig

    from .. import deploy
    from ..deploy.merge import drop_sparsity_config
    from ..tuner import MaskProConfig, saved_config
    from .common import checkpoint, load_adapter, load_model

    deploy.check_free(output, overwrite, model, adapter)
    figures: dict[str, Any] = {"output": str(output), "pattern": None}
    if allow_dense and not isinstance(PeftConfig.from_pretrained(str(folder)), MaskProConfig):
        loaded, tokenizer = load_model(model, gguf_file)
        with deploy.new_folder(output, overwrite) as new:
            load_adapter(loaded, folder).merge_and_unload(safe_merge=True).save_pretrained(new)
            tokenizer.save_pretrained(new)
            drop_sparsity_config(new)
    else:
        figures["pattern"] = saved_config(folder).pattern
        with checkpoint(model, gguf_file, output) as base:
            report = deploy.merge(base, folder, output, overwrite)
        figures |= {"layers": len(report), "zeros": sum(report.values()) / len(report)}
    if not as_json:
        show(figures)
        say_next("eval", "--model", str(output), "--text", "FILE")
    return figures
