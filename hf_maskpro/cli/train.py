"""The verb that learns a mask."""

from pathlib import Path
from shutil import rmtree
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from transformers.trainer_utils import get_last_checkpoint

from ..deploy import check_free
from ..evaluation import check_length, mixed_windows
from ..learning import ESTIMATORS, MaskProTrainer, MaskProTrainingArguments
from ..starts import generated_text, start_token_of
from ..starts.calibration import SAMPLES, SEQ_LEN
from ..tuner import MaskProConfig
from .common import (
    GENERATED,
    Chat,
    Dataset,
    GgufFile,
    Json,
    Model,
    Output,
    Overwrite,
    Revision,
    StartToken,
    Subfolder,
    Text,
    Weights,
    adapter_folder,
    calibrate,
    calibration_batches,
    load_adapter,
    load_model,
    load_tokenizer,
    mixture_name,
    read_sources,
    shares_of,
    show,
    sources_of,
    windows_of_each,
)
from .common import init_mask as source_or_rule


Estimator = Annotated[str, typer.Option(help=f"Who learns the mask: {', '.join(ESTIMATORS)}.")]


def train(
    model: Model,
    output: Output,
    adapter: Annotated[str | None, typer.Option(help="Mask adapter to start from: a folder or a Hub id.")] = None,
    estimator: Estimator = "simple",
    text: Text = None,
    dataset: Dataset = None,
    weights: Weights = None,
    self_generated: Annotated[
        int, typer.Option(min=0, help="Tokens of text that the model itself generates, to learn from as well.")
    ] = 0,
    n: Annotated[int | None, typer.Option(help="Weights kept in every group: 2 unless given.")] = None,
    m: Annotated[int | None, typer.Option(help="Size of a group: 4 unless given.")] = None,
    init_mask: Annotated[
        str | None, typer.Option(help="Starting mask, as init's --method: wanda unless given.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Length of a training window, in tokens.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Use no more of the text than this, in tokens.")] = None,
    start_token: StartToken = True,
    chat: Chat = False,
    max_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 120,
    per_device_train_batch_size: Annotated[int, typer.Option(min=1, help="Windows per micro-batch.")] = 2,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="50 for residual, 0.2 for simple in 120 steps.")] = None,
    logit_scale: Annotated[float | None, typer.Option(help="10 for residual, 6 for simple unless given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of masks and data order.")] = 42,
    logging_steps: Annotated[int, typer.Option(min=1, help="Steps between log lines.")] = 10,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Trade time for memory, with simple.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in the output.")] = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Learn a mask."""
    checkpoint = get_last_checkpoint(str(output)) if resume and output.is_dir() else None
    if resume and checkpoint is None:
        raise ValueError(f"{output} has no checkpoint to resume from; drop --resume.")
    if checkpoint is not None and max_steps < int(checkpoint.rpartition("-")[2]):
        raise ValueError(f"--max-steps is {max_steps}, and {checkpoint} is beyond it; raise it or drop --resume.")
    if not resume:
        check_replaceable(output, overwrite, model, adapter, *sources_of(init_mask, text, dataset))
    if adapter is not None and (n, m, init_mask) != (None, None, None):
        raise ValueError("--n, --m and --init-mask are the adapter's own; drop them or drop --adapter.")
    known = MaskProConfig.from_pretrained(checkpoint) if checkpoint else MaskProConfig(init_mask="wanda")
    config = MaskProConfig(
        n=known.n if n is None else n,
        m=known.m if m is None else m,
        init_mask=known.init_mask if init_mask is None else source_or_rule(init_mask),
        logit_scale=logit_scale,
    )
    args = MaskProTrainingArguments(
        output_dir=str(output),
        estimator=estimator,
        max_steps=max_steps,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        learning_rate=learning_rate,
        seed=seed,
        logging_steps=logging_steps,
        save_steps=save_steps,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    names = [*map(str, text or []), *(dataset or []), *[GENERATED] * (self_generated > 0)]
    if not names:
        raise ValueError("nothing to learn from: pass --text FILE, --dataset NAME or --self-generated TOKENS.")
    if 0 < self_generated < seq_len:
        raise ValueError(f"--self-generated is {self_generated}, less than one window of {seq_len}; raise it.")
    shares = shares_of(weights, len(names))
    # As much as the run sees, and in a short one as much as calibration is drawn from.
    seen = max_steps * per_device_train_batch_size * gradient_accumulation_steps * seq_len
    tokens = max_tokens or max(seen, 16 * SAMPLES * SEQ_LEN)
    contents = read_sources(text, dataset, tokens)
    tokenizer = load_tokenizer(model, gguf_file)
    limit = max_tokens if len(names) == 1 else None
    pieces = windows_of_each(tokenizer, contents, seq_len, limit, start_token, chat)
    base, _ = load_model(model, gguf_file)
    check_length(base, seq_len)
    if self_generated:
        cache = output.with_name(f"{output.name}.generated")
        batches = generated_text(base, tokenizer, self_generated // seq_len, seq_len, seed, cache)
        pieces.append(torch.cat([batch["input_ids"] for batch in batches]))
    inputs = pieces[0] if len(pieces) == 1 else mixed_windows(pieces, shares, tokens if shares else max_tokens, seed)
    if adapter is None:
        torch.manual_seed(seed)
        masked = get_peft_model(base, config)
        # A resumed run takes its starting mask from the checkpoint, together with the logits.
        if checkpoint is None:
            start_id = start_token_of(tokenizer) if start_token else None
            known = inputs.numel() if start_id is None else inputs[:, 1:].numel() + 1
            in_order = len(pieces) == 1 and not self_generated
            batches = calibration_batches(inputs, in_order, SAMPLES, min(SEQ_LEN, known), seed, start_id)
            calibrate(masked, batches, mixture_name(names, shares), seed)
    else:
        masked = load_adapter(base, adapter_folder(adapter, revision, subfolder), is_trainable=True)
        config = masked.peft_config["default"]
        # The scale goes with the logits: where there are none, it belongs to a training that is over.
        if not config.save_logits or logit_scale is not None:
            config.logit_scale = logit_scale
    config = masked.peft_config["default"]
    config.start["training"] = {"text": mixture_name(names, shares), "seq_len": seq_len}
    trainer = MaskProTrainer(masked, args, train_dataset=[{"input_ids": row, "labels": row} for row in inputs])
    previous = set_aside(output) if not resume else None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    masked.save_pretrained(output)
    if previous is not None:
        rmtree(previous)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1:]
    figures = {name: value for entry in last for name, value in entry.items() if name not in ("epoch", "step")}
    show(
        {"output": str(output), "steps": result.global_step, "seconds": result.metrics["train_runtime"], **figures},
        as_json,
    )


def check_replaceable(output: Path, overwrite: bool, *inputs: str | Path | None) -> None:
    """As [`check_free`], for a folder that is set aside until its successor is complete."""
    check_free(output, overwrite, *inputs)
    previous = output.with_name(f"{output.name}.old")
    if overwrite and previous.exists():
        raise ValueError(f"{previous}, set aside by an earlier run, is still there; remove or rename it.")


def set_aside(output: Path) -> Path | None:
    """Move what is to be overwritten out of the way; it is deleted only when its successor is complete."""
    if not output.is_dir() or not any(output.iterdir()):
        output.mkdir(parents=True, exist_ok=True)
        return None
    previous = output.with_name(f"{output.name}.old")
    output.rename(previous)
    output.mkdir()
    return previous
