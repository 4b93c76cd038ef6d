"""The verb that takes a mask made elsewhere."""

from typing import Annotated

import typer
from peft import get_peft_model

from ..deploy import check_free
from ..starts import initialize_masks, needs_data
from ..tuner import RULES, MaskProConfig
from .common import GgufFile, Model, Output, Overwrite, PatternM, PatternN, init_mask, load_model, write_adapter


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
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a mask that was made elsewhere as an adapter."""
    config = MaskProConfig(n=n, m=m, init_mask=init_mask(source))
    if needs_data(config.init_mask) or config.init_mask in RULES:
        raise ValueError(f"{source} is made from the weights or a text; use hf-maskpro init --method {source}.")
    check_free(output, overwrite, model, source)
    base, _ = load_model(model, gguf_file)
    masked = get_peft_model(base, config)
    initialize_masks(masked)
    write_adapter(masked, output, overwrite)
