"""The verb that makes a one-shot mask."""

import math
from typing import Annotated, Any

import typer

from .inputs import (
    GENERATED,
    check_datasets,
    check_model,
    check_pattern,
    check_texts,
    modules_of,
    needs_text,
    shares_of,
)
from .inputs import init_mask as source_or_rule
from .options import (
    MASK,
    TEXT,
    Chat,
    Dataset,
    Dtype,
    ExcludeModules,
    GgufFile,
    Json,
    Model,
    OnIndivisible,
    Output,
    Overwrite,
    PatternM,
    PatternN,
    Seed,
    StartToken,
    TargetModules,
    TargetParameters,
    Text,
    Weights,
    check_method,
)


def init(
    model: Model,
    output: Output,
    init_mask: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            callback=check_method,
            help="magnitude or random, which need no text; wanda, ria, sparsegpt, gblm or pruner-zero; or a source as "
            "for import. +swaps, +blocks or +swaps+blocks at the end refine the mask, from a text.",
            rich_help_panel=MASK,
        ),
    ] = "sparsegpt+swaps",
    text: Text = None,
    dataset: Dataset = None,
    weights: Weights = None,
    self_generated: Annotated[
        bool,
        typer.Option(
            "--self-generated", help="Calibrate on text that the model itself generates.", rich_help_panel=TEXT
        ),
    ] = False,
    n: PatternN = 2,
    m: PatternM = 4,
    target_modules: TargetModules = None,
    target_parameters: TargetParameters = None,
    exclude_modules: ExcludeModules = None,
    on_indivisible: OnIndivisible = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Length of a calibration window, in tokens: 256 unless given.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of calibration windows: 128 unless given.", rich_help_panel=TEXT
        ),
    ] = None,
    source_settings: Annotated[
        bool,
        typer.Option(
            "--source-settings",
            help="As many and as long windows as in the rules' papers: 128 of 2,048 tokens.",
            rich_help_panel=TEXT,
        ),
    ] = False,
    start_token: StartToken = True,
    chat: Chat = False,
    seed: Seed = 42,
    dtype: Dtype = "auto",
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write a one-shot mask as an adapter."""
    if source_settings and (samples, seq_len) != (None, None):
        raise ValueError("--source-settings says what --samples and --seq-len are; drop the one or the other.")
    if self_generated and (chat or not start_token):
        raise ValueError(
            "text that the model generates is taken as it is, from the start token on; drop --self-generated or "
            "--chat and --no-start-token."
        )
    check_pattern(n, m)
    method = source_or_rule(init_mask)
    layers, left = modules_of(target_modules), modules_of(exclude_modules)
    with_data = needs_text(method)
    names = [*map(str, text or []), *(dataset or [])]
    if with_data and not names and not self_generated:
        raise ValueError(
            f"{method} needs a text: pass one of --text FILE, --dataset NAME and --self-generated, or several. "
            "--method magnitude needs none."
        )
    shares = shares_of(weights, len(names) + self_generated)
    check_texts(text or [])
    check_datasets(dataset or [])
    check_model(model, gguf_file)
    import torch
    from peft import get_peft_model

    from ..deploy import check_free
    from ..evaluation import check_length, mixed_windows
    from ..starts import generated_text, start_token_of
    from ..starts.calibration import SAMPLES, SEQ_LEN, SOURCE_SAMPLES, SOURCE_SEQ_LEN, rows_at_once
    from ..tuner import MaskProConfig
    from .common import (
        calibrate,
        calibration_batches,
        check_layers,
        load_config,
        load_to_run,
        load_tokenizer,
        mixture_name,
        read_sources,
        sources_of,
        windows_of_each,
        write_adapter,
    )

    config = MaskProConfig(
        n=n,
        m=m,
        init_mask=method,
        target_modules=layers,
        target_parameters=None if target_parameters is None else target_parameters.split(","),
        exclude_modules=left,
        on_indivisible=on_indivisible or "error",
    )
    check_free(output, overwrite, model, *sources_of(method, text, dataset))
    if source_settings:
        samples, seq_len = SOURCE_SAMPLES, SOURCE_SEQ_LEN
    samples, seq_len = samples or SAMPLES, seq_len or SEQ_LEN
    # Windows are drawn from much more text than they hold.
    contents = read_sources(text, dataset, 16 * samples * seq_len) if with_data else {}
    tokenizer = load_tokenizer(model, gguf_file)
    tokens = 16 * samples * seq_len if dataset and len(names) == 1 else None
    pieces = windows_of_each(tokenizer, contents, seq_len, tokens, start_token, chat)
    if with_data:
        check_length(load_config(model, gguf_file), seq_len)
    base, _ = load_to_run(model, gguf_file, dtype)
    check_layers(base, layers, left)
    torch.manual_seed(seed)
    batches: list[dict[str, torch.Tensor]] = []
    if with_data and self_generated:
        # By shares the model writes no more than its own, but what is drawn from has texts of both kinds.
        own = 1 if shares is None else shares[-1] / sum(shares)
        written = max(math.ceil(samples * own - 1e-6), min(samples, 2 * rows_at_once(seq_len)))
        batches = generated_text(base, tokenizer, written, seq_len, seed)
        pieces.append(torch.cat([batch["input_ids"] for batch in batches]))
    start_id = start_token_of(tokenizer) if start_token else None
    if with_data and contents:
        inputs = pieces[0] if len(pieces) == 1 else mixed_windows(pieces, shares, samples * seq_len, seed)
        batches = calibration_batches(inputs, len(pieces) == 1, samples, seq_len, seed, start_id)
    masked = get_peft_model(base, config)
    text_name = mixture_name([*names, *[GENERATED] * self_generated], shares)
    calibrate(masked, batches, text_name, seed, start_id, chat)
    return write_adapter(masked, output, overwrite, model, gguf_file, as_json)
