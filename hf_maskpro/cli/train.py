"""The verb that learns a mask."""

import math
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .inputs import (
    GENERATED,
    adapter_folder,
    check_datasets,
    check_model,
    check_no_place,
    check_pattern,
    check_texts,
    modules_of,
    read_text,
    shares_of,
)
from .inputs import init_mask as source_or_rule
from .options import (
    EVALUATION,
    FILES,
    LEARNING,
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
    Revision,
    Seed,
    StartToken,
    Subfolder,
    TargetModules,
    TargetParameters,
    Text,
    Weights,
    check_method,
)
from .output import say_next, show
from .training_options import one_of, training_arguments


if TYPE_CHECKING:
    from ..learning import MaskProTrainingArguments


STEPS = "Steps"
# As in `hf_maskpro.learning`, which is not imported for the names alone, and the patterns of those that have not all.
Estimator = Literal["simple", "residual", "proxsparse", "maskllm"]
PATTERNS = {"proxsparse": ("2:4",), "maskllm": ("2:4", "1:4")}


def train(
    ctx: typer.Context,
    model: Model,
    output: Output,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file of options, one a line as in max_steps: 400; those of the command line win.",
            rich_help_panel=FILES,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER", help="Mask adapter to start from: a folder or a Hub id.", rich_help_panel=MASK
        ),
    ] = None,
    estimator: Annotated[
        Estimator,
        typer.Option(
            metavar="NAME",
            help="Who learns the mask: simple, residual, proxsparse or maskllm.",
            rich_help_panel=LEARNING,
        ),
    ] = "simple",
    text: Text = None,
    dataset: Dataset = None,
    weights: Weights = None,
    self_generated: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="So much text that the model itself generates, to learn from as well.",
            rich_help_panel=TEXT,
        ),
    ] = 0,
    n: Annotated[
        int | None,
        typer.Option(
            min=1, max=15, metavar="N", help="Weights kept in every group: 2 unless given.", rich_help_panel=MASK
        ),
    ] = None,
    m: Annotated[
        int | None,
        typer.Option(min=2, max=16, metavar="N", help="Size of a group: 4 unless given.", rich_help_panel=MASK),
    ] = None,
    init_mask: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=check_method,
            help="Starting mask, as init's --method: sparsegpt+swaps unless given.",
            rich_help_panel=MASK,
        ),
    ] = None,
    target_modules: TargetModules = None,
    target_parameters: TargetParameters = None,
    exclude_modules: ExcludeModules = None,
    on_indivisible: OnIndivisible = None,
    seq_len: Annotated[
        int, typer.Option(min=2, metavar="N", help="Length of a training window, in tokens.", rich_help_panel=TEXT)
    ] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Use no more of the text than this, in tokens.", rich_help_panel=TEXT),
    ] = None,
    start_token: StartToken = True,
    chat: Chat = False,
    max_steps: Annotated[int, typer.Option(min=1, metavar="N", help="Optimizer steps.", rich_help_panel=STEPS)] = 120,
    per_device_train_batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Windows per micro-batch.", rich_help_panel=STEPS)
    ] = 2,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Micro-batches per step.", rich_help_panel=STEPS)
    ] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="RATE",
            help="The estimator's own unless given: 0.2 for simple in 120 steps, 0.57 for residual in 100.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    lr_scheduler_type: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=one_of("trainer_utils.py", "SchedulerType"),
            help="Schedule of the learning rate, as linear or cosine: the estimator's own unless given.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    optim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=one_of("training_args.py", "OptimizerNames"),
            help="Optimizer, as adamw_torch or adafactor: transformers' default unless given.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    logit_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=40,
            metavar="C",
            help="6 unless given, 3 for residual, 10 with --advantage raw.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    logits_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(metavar="DTYPE", help="Of what is learned: float32 or bfloat16.", rich_help_panel=LEARNING),
    ] = None,
    dtype: Dtype = "auto",
    seed: Seed = 42,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to evaluate on meanwhile; the best mask is kept.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Steps between evaluations, a divisor of --save-steps: those unless given.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Stop after so many evaluations without a better one.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    logging_steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Steps between log lines.", rich_help_panel=EVALUATION)
    ] = 10,
    report_to: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=one_of("integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK", "all", "none"),
            help="Where to report to besides, as tensorboard or trackio.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    save_steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Steps between checkpoints.", rich_help_panel=FILES)
    ] = 50,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the last checkpoint in the output folder.", rich_help_panel=FILES
        ),
    ] = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """
    Learn a mask.

    Every other field of transformers' TrainingArguments is an option too, as in --weight-decay 0.1 or
    --gradient-checkpointing.
    """
    for option, value in ("--learning-rate", learning_rate), ("--logit-scale", logit_scale):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{option} is {value}; give a number.")
    if logit_scale == 0:
        raise ValueError("--logit-scale is 0.0, outside 0 to 40; 6 is usual.")
    keeps_best = any(word.replace("_", "-").startswith("--load-best-model-at-end") for word in ctx.args)
    if eval_text is None and (keeps_best or (eval_steps, early_stopping) != (None, None)):
        raise ValueError(
            "--eval-steps, --early-stopping and --load-best-model-at-end need a text to evaluate on: pass --eval-text "
            "FILE."
        )
    eval_steps = eval_steps or save_steps
    if eval_text is not None and save_steps % eval_steps:
        raise ValueError(
            f"--save-steps is {save_steps}, not a multiple of --eval-steps, {eval_steps}: the best mask is one that "
            "is saved; change either."
        )
    layer_options = {target_modules, target_parameters, exclude_modules, on_indivisible}
    if adapter is not None and {n, m, init_mask} | layer_options != {None}:
        raise ValueError(
            "--n, --m, --init-mask, --target-modules, --target-parameters, --exclude-modules and --on-indivisible are "
            "the adapter's own; drop them or drop --adapter."
        )
    if adapter is None:
        check_no_place(revision, subfolder)
    names = [*map(str, text or []), *(dataset or []), *[GENERATED] * (self_generated > 0)]
    if not names:
        raise ValueError("nothing to learn from: pass --text FILE, --dataset NAME or --self-generated TOKENS.")
    if self_generated and (chat or not start_token):
        raise ValueError(
            "text that the model generates is taken as it is, from the start token on; drop --self-generated or "
            "--chat and --no-start-token."
        )
    if 0 < self_generated < seq_len:
        raise ValueError(f"--self-generated is {self_generated}, less than one window of {seq_len}; raise it.")
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(f"--max-tokens is {max_tokens}, less than one window of --seq-len, {seq_len}; raise it.")
    shares = shares_of(weights, len(names))
    check_texts([*(text or []), eval_text])
    check_datasets(dataset or [])
    if adapter is None and not resume:
        check_pattern(n or 2, m or 4)
        _check_learner(estimator, f"{n or 2}:{m or 4}")
    start = None if init_mask is None else source_or_rule(init_mask)
    layers, left = modules_of(target_modules), modules_of(exclude_modules)
    check_model(model, gguf_file)
    folder = None if adapter is None else adapter_folder(adapter, revision, subfolder)
    import torch
    from peft import get_peft_model
    from transformers import EarlyStoppingCallback, IntervalStrategy
    from transformers.integrations import get_reporting_integration_callbacks

    from ..deploy import check_free
    from ..evaluation import check_length, mixed_windows, windows
    from ..learning import MaskProTrainer
    from ..learning.checkpoints import checkpoint_to_resume, newest_checkpoint
    from ..learning.dataset import check_tokens
    from ..starts import generated_text, start_token_of
    from ..starts.calibration import SAMPLES, SEQ_LEN
    from ..tuner import MaskProConfig, saved_config
    from .common import (
        calibrate,
        calibration_batches,
        check_layers,
        load_adapter,
        load_config,
        load_to_run,
        load_tokenizer,
        mixture_name,
        read_sources,
        sources_of,
        windows_of_each,
    )

    checkpoint = checkpoint_to_resume(output) if resume else None
    if checkpoint is not None and max_steps < int(checkpoint.rpartition("-")[2]):
        raise ValueError(f"--max-steps is {max_steps}, and {checkpoint} is beyond it; raise it or drop --resume.")
    if not resume:
        check_free(output, overwrite, model, adapter, eval_text, *sources_of(start, text, dataset))
    known = MaskProConfig.from_pretrained(checkpoint) if checkpoint else MaskProConfig(init_mask="sparsegpt+swaps")
    parameters = known.target_parameters if target_modules is None else None
    if target_parameters is not None:
        parameters = target_parameters.split(",")
    mask = MaskProConfig(
        n=known.n if n is None else n,
        m=known.m if m is None else m,
        init_mask=start or known.init_mask,
        target_modules=known.target_modules if layers is None else layers,
        target_parameters=parameters,
        exclude_modules=known.exclude_modules if left is None else left,
        on_indivisible=on_indivisible or known.on_indivisible,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype or known.logits_dtype,
    )
    settings = {
        "output_dir": str(output),
        "estimator": estimator,
        "max_steps": max_steps,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": lr_scheduler_type,
        "seed": seed,
        "logging_steps": logging_steps,
        "save_steps": save_steps,
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": report_to or "none",
    }
    if optim is not None:
        settings["optim"] = optim
    if eval_text is not None:
        settings |= {
            "eval_strategy": "steps",
            "eval_steps": eval_steps,
            "per_device_eval_batch_size": per_device_train_batch_size,
            "prediction_loss_only": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            # A resumed run stops early where one that was not interrupted does.
            "restore_callback_states_from_checkpoint": True,
        }
    args = training_arguments(settings, ctx.args)
    _check_settings(args)
    if eval_text is None and (strategy := IntervalStrategy(args.eval_strategy).value) != "no":
        raise ValueError(f"--eval-strategy {strategy} needs a text to evaluate on: pass --eval-text FILE.")
    # What a trainer would find out after the calibration; of optimizers and reporters also what package is not there.
    _check_optimizer(args)
    for reporter in get_reporting_integration_callbacks(args.report_to):
        reporter()
    held_out = read_text(eval_text) if eval_text is not None else None
    # As much as the run sees, and in a short one as much as calibration is drawn from.
    seen = max_steps * per_device_train_batch_size * gradient_accumulation_steps * seq_len
    tokens = max_tokens or max(seen, 16 * SAMPLES * SEQ_LEN)
    if folder is not None:
        own = saved_config(folder)
        own.logits_dtype = logits_dtype or own.logits_dtype
    _check_learner(estimator, (mask if folder is None else own).pattern)
    contents = read_sources(text, dataset, tokens)
    tokenizer = load_tokenizer(model, gguf_file)
    limit = max_tokens if len(names) == 1 else None
    pieces = windows_of_each(tokenizer, contents, seq_len, limit, start_token, chat)
    evaluated = None if held_out is None else windows(tokenizer, held_out, seq_len, start_token=start_token)
    base_config = load_config(model, gguf_file)
    check_length(base_config, seq_len)
    for ids in pieces:
        check_tokens(base_config, ids)
    base, _ = load_to_run(model, gguf_file, dtype)
    check_layers(base, layers, left)
    if self_generated:
        cache = _beside(output, "{}.generated")
        batches = generated_text(base, tokenizer, self_generated // seq_len, seq_len, seed, cache)
        pieces.append(torch.cat([batch["input_ids"] for batch in batches]))
    inputs = pieces[0] if len(pieces) == 1 else mixed_windows(pieces, shares, tokens if shares else max_tokens, seed)
    if folder is None:
        torch.manual_seed(seed)
        masked = get_peft_model(base, mask)
        # A resumed run takes its starting mask from the checkpoint, together with the logits.
        if checkpoint is None:
            start_id = start_token_of(tokenizer) if start_token else None
            available = inputs.numel() if start_id is None else inputs[:, 1:].numel() + 1
            in_order = len(pieces) == 1 and not self_generated
            batches = calibration_batches(inputs, in_order, SAMPLES, min(SEQ_LEN, available), seed, start_id)
            calibrate(masked, batches, mixture_name(names, shares), seed, start_id, chat)
    else:
        masked = load_adapter(base, folder, is_trainable=True, config=own)
        # The scale goes with the logits: where there are none, it belongs to a training that is over.
        if not own.save_logits or logit_scale is not None:
            masked.peft_config["default"].logit_scale = logit_scale
    masked.peft_config["default"].start["training"] = {"text": mixture_name(names, shares), "seq_len": seq_len}
    # A trainer prints what it logs, and stdout is for the figures.
    with redirect_stdout(sys.stderr):
        trainer = MaskProTrainer(
            masked,
            args,
            train_dataset=_rows(inputs),
            eval_dataset=None if evaluated is None else _rows(evaluated),
            callbacks=[EarlyStoppingCallback(early_stopping)] if early_stopping else None,
        )
        # Of several processes.
        is_first = trainer.is_world_process_zero()
        if is_first and not resume:
            set_aside(output)
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
            if is_first:
                masked.save_pretrained(output)
        except BaseException:
            if is_first and newest_checkpoint(output) is None:
                put_back(output)
            raise
    if not is_first:
        raise typer.Exit
    forget_previous(output)
    state = trainer.state
    last = [entry for entry in state.log_history if "loss" in entry][-1:]
    figures = {"output": str(output), "steps": result.global_step, "seconds": result.metrics["train_runtime"]}
    figures |= {name: value for entry in last for name, value in entry.items() if name not in ("epoch", "step")}
    # Of the mask that was saved, which need not be the last one that was logged.
    figures["changed"] = trainer.changed_groups()
    if state.best_metric is not None:
        figures |= {"best_step": state.best_global_step, "eval_perplexity": math.exp(state.best_metric)}
    if not as_json:
        show(figures)
        given = ["--model", model, *(["--gguf-file", gguf_file] if gguf_file else [])]
        say_next(
            "eval", *given, "--adapter", str(output), "--text", str(eval_text or "FILE"), "--seq-len", str(seq_len)
        )
        say_next("merge", *given, "--adapter", str(output), "--output", f"{output}-merged")
    return figures


def _check_learner(estimator: str, pattern: str) -> None:
    """Refuse a pattern that a learner does not learn."""
    if pattern not in (known := PATTERNS.get(estimator, (pattern,))):
        raise ValueError(f"--estimator {estimator} learns {' and '.join(known)} alone, not {pattern}; use simple.")


def _check_settings(args: "MaskProTrainingArguments") -> None:
    """Refuse a setting of another learner, which this one would not read."""
    from ..learning import ESTIMATORS

    for other, learner in ESTIMATORS.items():
        if other == args.estimator or learner.Arguments is None:
            continue
        for setting in fields(learner.Arguments):
            if (value := getattr(args, setting.name)) != setting.default:
                raise ValueError(f"{setting.name}={value} is for estimator={other}, not {args.estimator}; drop it.")


def _check_optimizer(args: "MaskProTrainingArguments") -> None:
    """Refuse what the optimizer or the schedule does not take."""
    from torch import zeros
    from torch.optim import SGD
    from transformers import SchedulerType, get_scheduler

    from ..learning import MaskProTrainer

    try:
        MaskProTrainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        if not args.optim_args:
            raise
        raise ValueError(
            f"--optim-args is {args.optim_args!r}; write name=value, separated by commas, with values that the "
            f"optimizer takes ({error})."
        ) from error
    # A schedule may end at no more than this.
    assert args.learning_rate is not None
    optimizer, schedule = SGD([zeros(1)], args.learning_rate), SchedulerType(args.lr_scheduler_type).value
    warmup, known = args.get_warmup_steps(args.max_steps), args.lr_scheduler_kwargs
    try:
        get_scheduler(schedule, optimizer, warmup, args.max_steps, known)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--lr-scheduler-kwargs {known} does not fit --lr-scheduler-type {schedule}: {error}."
        ) from error


def _rows(windows: Any) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in windows]


def _beside(output: Path, name: str) -> Path:
    """A path beside a folder, by a name with the folder's in it."""
    # A name may have no more bytes than this leaves room for.
    output = output.resolve()
    own = output.name.encode()[:200].decode(errors="ignore")
    return output.with_name(name.format(own))


def _previous(output: Path) -> Path:
    """Where a folder is kept until its successor is complete, under a name that nobody else gives."""
    return _beside(output, ".{}.replaced")


def set_aside(output: Path) -> None:
    """
    Make an empty folder, and move what is to be overwritten out of the way. If an earlier run never came to its end,
    it is that run's unfinished folder that goes, and what it was to replace stays aside.
    """
    output = output.resolve()
    # What an adapter, a checkpoint and the quickstart have at their end.
    ends = ("adapter_config.json", "config.json", "results.json")
    is_complete = any((output / name).is_file() for name in ends)
    if _previous(output).exists() and not is_complete:
        rmtree(output, ignore_errors=True)
    elif output.is_dir() and any(output.iterdir()):
        forget_previous(output)
        output.rename(_previous(output))
    output.mkdir(parents=True, exist_ok=True)


def put_back(output: Path) -> None:
    """Take away what is unfinished, and give a folder that was set aside its place again."""
    output = output.resolve()
    rmtree(output, ignore_errors=True)
    if _previous(output).exists():
        _previous(output).rename(output)


def forget_previous(output: Path) -> None:
    """Delete what was set aside: its successor is complete."""
    rmtree(_previous(output), ignore_errors=True)
