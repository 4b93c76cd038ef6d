"""The verb that takes a mask made elsewhere."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import check_model, check_pattern, init_mask, modules_of
from .options import (
    RULES,
    ExcludeModules,
    GgufFile,
    Json,
    Model,
    OnIndivisible,
    Output,
    Overwrite,
    PatternM,
    PatternN,
    TargetModules,
    TargetParameters,
    is_source,
    unrefined,
)


def import_masks(
    source: Annotated[
        str,
        typer.Argument(
            help="A mask adapter, pruned checkpoint or MaskLLM repository (folder or Hub id), "
            "or a .npz or .safetensors file of masks."
        ),
    ],
    model: Model,
    output: Output,
    n: PatternN = 2,
    m: PatternM = 4,
    target_modules: TargetModules = None,
    target_parameters: TargetParameters = None,
    exclude_modules: ExcludeModules = None,
    on_indivisible: OnIndivisible = None,
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write a mask that was made elsewhere as an adapter."""
    refined = unrefined(source) != source and not Path(source).exists()
    if unrefined(source) in RULES or (refined and is_source(source)):
        raise ValueError(f"{source} is made from the weights or a text; use hf-maskpro init --method {source}.")
    if not is_source(source):
        raise ValueError(f"{source} does not exist; pass a folder, a .npz or .safetensors file, or a Hub id.")
    check_pattern(n, m)
    method = init_mask(source)
    layers, left = modules_of(target_modules), modules_of(exclude_modules)
    check_model(model, gguf_file)
    from peft import get_peft_model

    from ..deploy import check_free
    from ..starts import initialize_masks
    from ..tuner import MaskProConfig
    from .common import check_layers, load_model, write_adapter

    config = MaskProConfig(
        n=n,
        m=m,
        init_mask=method,
        target_modules=layers,
        target_parameters=None if target_parameters is None else target_parameters.split(","),
        exclude_modules=left,
        on_indivisible=on_indivisible or "error",
    )
    check_free(output, overwrite, model, source)
    base, _ = load_model(model, gguf_file)
    check_layers(base, layers, left)
    masked = get_peft_model(base, config)
    initialize_masks(masked)
    return write_adapter(masked, output, overwrite, model, gguf_file, as_json)
