"""The verb that makes a one-shot mask."""

from typing import Annotated

import torch
import typer
from peft import get_peft_model

from ..deploy import check_free
from ..evaluation import check_length, mixed_windows
from ..starts import generated_text, needs_data, start_token_of
from ..starts.calibration import SAMPLES, SEQ_LEN, SOURCE_SAMPLES, SOURCE_SEQ_LEN
from ..tuner import MaskProConfig
from .common import (
    GENERATED,
    Chat,
    Dataset,
    GgufFile,
    Model,
    Output,
    Overwrite,
    PatternM,
    PatternN,
    StartToken,
    Text,
    Weights,
    calibrate,
    calibration_batches,
    init_mask,
    load_model,
    load_tokenizer,
    mixture_name,
    read_sources,
    shares_of,
    sources_of,
    windows_of_each,
    write_adapter,
)


def init(
    model: Model,
    output: Output,
    method: Annotated[
        str,
        typer.Option(
            help="magnitude, random, wanda, ria, sparsegpt, gblm or pruner-zero, or a source as for import; "
            "with +swaps at the end the mask is refined."
        ),
    ] = "wanda",
    text: Text = None,
    dataset: Dataset = None,
    weights: Weights = None,
    self_generated: Annotated[
        bool, typer.Option("--self-generated", help="Calibrate on text that the model itself generates.")
    ] = False,
    n: PatternN = 2,
    m: PatternM = 4,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help=f"Length of a calibration window, in tokens: {SEQ_LEN} unless given.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help=f"Number of calibration windows: {SAMPLES} unless given.")
    ] = None,
    source_settings: Annotated[
        bool, typer.Option("--source-settings", help="Calibrate as the rules' papers do: 128 windows of 2,048 tokens.")
    ] = False,
    start_token: StartToken = True,
    chat: Chat = False,
    seed: Annotated[int, typer.Option(help="Seed of the random mask and of the choice of windows.")] = 42,
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a one-shot mask as an adapter."""
    method = init_mask(method)
    config = MaskProConfig(n=n, m=m, init_mask=method)
    check_free(output, overwrite, model, *sources_of(method, text, dataset))
    if source_settings:
        if (samples, seq_len) != (None, None):
            raise ValueError("--source-settings says what --samples and --seq-len are; drop the one or the other.")
        samples, seq_len = SOURCE_SAMPLES, SOURCE_SEQ_LEN
    samples, seq_len = samples or SAMPLES, seq_len or SEQ_LEN
    with_data = needs_data(method)
    names = [*map(str, text or []), *(dataset or [])]
    if with_data and not names and not self_generated:
        raise ValueError(
            f"{method} needs a text: pass one of --text FILE, --dataset NAME and --self-generated, or several."
        )
    if self_generated and (chat or not start_token):
        raise ValueError(
            "text that the model generates is taken as it is, from the start token on; drop --self-generated or "
            "--chat and --no-start-token."
        )
    shares = shares_of(weights, len(names) + self_generated)
    # Windows are drawn from much more text than they hold.
    contents = read_sources(text, dataset, 16 * samples * seq_len) if with_data else {}
    tokenizer = load_tokenizer(model, gguf_file)
    tokens = 16 * samples * seq_len if dataset and len(names) == 1 else None
    pieces = windows_of_each(tokenizer, contents, seq_len, tokens, start_token, chat)
    base, _ = load_model(model, gguf_file)
    if with_data:
        check_length(base, seq_len)
    torch.manual_seed(seed)
    batches: list[dict[str, torch.Tensor]] = []
    if with_data and self_generated:
        batches = generated_text(base, tokenizer, samples, seq_len, seed)
        pieces.append(torch.cat([batch["input_ids"] for batch in batches]))
    if with_data and contents:
        inputs = pieces[0] if len(pieces) == 1 else mixed_windows(pieces, shares, samples * seq_len, seed)
        start_id = start_token_of(tokenizer) if start_token else None
        batches = calibration_batches(inputs, len(pieces) == 1, samples, seq_len, seed, start_id)
    masked = get_peft_model(base, config)
    calibrate(masked, batches, mixture_name([*names, *[GENERATED] * self_generated], shares), seed)
    write_adapter(masked, output, overwrite)
