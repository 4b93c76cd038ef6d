"""The verb that writes models for other runtimes."""

from typing import Annotated, Any, Literal

import typer

from .inputs import adapter_folder, check_extra, check_model, check_no_place
from .options import FILES, GgufFile, Json, Model, Output, Overwrite, Revision, Subfolder
from .output import show


def export(
    model: Model,
    output: Output,
    target: Annotated[
        Literal["dense", "cpu", "onnx", "torchao-fp8"],
        typer.Option(
            metavar="NAME",
            help="dense is what merge writes; cpu packed weights for decoding on a CPU; onnx a float32 graph for "
            "TensorRT; torchao-fp8 a checkpoint that vLLM serves in FP8 + 2:4.",
            rich_help_panel=FILES,
        ),
    ],
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER",
            help="Mask adapter: a local folder or a Hub id. Without it the model is a merged one.",
            rich_help_panel=FILES,
        ),
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write a sparse model for another runtime, checked."""
    if target == "dense" and adapter is None:
        raise ValueError("--target dense merges a mask adapter: pass --adapter.")
    if adapter is None:
        check_no_place(revision, subfolder)
    if package := {"onnx": "onnxscript", "torchao-fp8": "torchao"}.get(target):
        check_extra(package, f"--target {target}", target.removeprefix("torchao-"))
    check_model(model, gguf_file)
    masks = None if adapter is None else adapter_folder(adapter, revision, subfolder)
    from .. import deploy
    from ..tuner import saved_config
    from .common import checkpoint, load_adapter, load_model

    deploy.check_free(output, overwrite, model, adapter)
    if masks is not None:
        saved_config(masks)
    figures: dict[str, Any] = {"output": str(output), "target": target}
    if target in ("cpu", "onnx"):
        sparse, tokenizer = load_model(model, gguf_file)
        if masks is not None:
            sparse = load_adapter(sparse, masks).merge_and_unload(safe_merge=True)
        write = deploy.to_packed if target == "cpu" else deploy.to_onnx
        figures |= write(sparse, tokenizer, output, overwrite)
    else:
        with checkpoint(model, gguf_file, output) as folder:
            if target == "torchao-fp8":
                report = deploy.to_torchao_fp8(folder, masks, output, overwrite)
            else:
                assert masks is not None
                report = deploy.merge(folder, masks, output, overwrite)
        figures |= {"layers": len(report), "zeros": sum(report.values()) / len(report)}
    if not as_json:
        show(figures)
    return figures
