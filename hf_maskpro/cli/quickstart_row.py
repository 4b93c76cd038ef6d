"""One row of the quickstart's table, in a process of its own."""

import json
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..evaluation import mixed_windows, perplexity, windows
from ..learning import MaskProTrainer, MaskProTrainingArguments
from ..starts import start_token_of
from ..starts.calibration import SAMPLES, in_batches
from ..starts.calibration import SEQ_LEN as CALIBRATION_SEQ_LEN
from ..tuner import MaskProConfig, masked_layers
from .common import calibrate, load_adapter, load_to_run, read_text
from .verb import one_line_errors


# A short run by forward passes is measured at its end alone.
EVALUATIONS = {"simple": 2, "residual": 1}
PROBE_STEPS = 3
# The smaller batch where the larger one leaves too few steps for a logit to get anywhere.
BATCHES, SEQ_LEN = {"simple": (8, 2), "residual": (4, 2)}, 128
LEAST_STEPS = 25
LEAST_SECONDS = 60.0


class Clock(TrainerCallback):
    """Stops training when its seconds are up, and measures perplexity on the way, off the clock."""

    def __init__(self, seconds: float, evaluations: int, evaluate: Callable[[], float] | None):
        self.seconds, self.evaluate = seconds, evaluate
        self.due = self.between = seconds / evaluations
        self.curve: list[dict[str, float]] = []
        self.finished: list[float] = []
        self.paused = 0.0
        self.start = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.start - self.paused

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        elapsed = self.elapsed()
        self.finished.append(elapsed)
        control.should_training_stop |= elapsed >= self.seconds
        last = control.should_training_stop or state.global_step == state.max_steps
        if self.evaluate is not None and (last or elapsed >= self.due):
            self.curve.append({"step": state.global_step, "seconds": elapsed, "perplexity": self.evaluate()})
            self.due += self.between
            self.paused += time.perf_counter() - self.start - self.paused - elapsed


def learn(
    masked: PeftModel,
    estimator: Literal["residual", "simple"],
    inputs: torch.Tensor,
    seconds: float | None,
    deadline: float,
    evaluate: Callable[[], float],
    scratch: Path,
) -> dict[str, Any]:
    """
    Train for so many seconds, or as long as the deadline lets, on the schedule of as many steps as a short trial says
    that they hold.
    """

    def run(
        batch: int, steps: int, seconds: float, evaluate: Callable[[], float] | None
    ) -> tuple[MaskProTrainer, Clock]:
        args = MaskProTrainingArguments(
            output_dir=str(scratch),
            estimator=estimator,
            max_steps=steps,
            per_device_train_batch_size=batch,
            logging_steps=max(1, steps // 20) if estimator == "simple" else 5,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        )
        clock = Clock(seconds, EVALUATIONS[estimator], evaluate)
        dataset = [{"input_ids": row, "labels": row} for row in inputs]
        trainer = MaskProTrainer(masked, args, train_dataset=dataset, callbacks=[clock])
        trainer.train()
        return trainer, clock

    def step_seconds(batch: int) -> float:
        _, trial = run(batch, PROBE_STEPS, float("inf"), None)
        for layer in masked_layers(masked).values():
            with torch.no_grad():
                layer.maskpro_theta["default"].zero_()
        # The first step compiles.
        return min(after - before for before, after in pairwise(trial.finished))

    begun = time.perf_counter()
    curve = [{"step": 0, "seconds": 0.0, "perplexity": evaluate()}]
    evaluations = EVALUATIONS[estimator] * (time.perf_counter() - begun)
    batch, smaller = BATCHES[estimator]
    each = step_seconds(batch)

    def left() -> float:
        return deadline - time.time() - evaluations if seconds is None else seconds

    def given() -> float:
        # On a slow machine a story that ends late is better than none.
        return max(LEAST_SECONDS, left())

    if given() < LEAST_STEPS * each:
        typer.echo(f"{given():.0f} seconds hold few steps of {batch} windows; they are of {smaller}.")
        batch = smaller
        each = step_seconds(batch)
    if (late := LEAST_SECONDS - left()) > 0:
        typer.echo(f"Learning takes {LEAST_SECONDS:.0f} seconds all the same, and ends about {late:.0f} seconds late.")
    seconds = given()
    steps = max(1, int(seconds / each))
    if steps < LEAST_STEPS:
        typer.echo(f"{seconds:.0f} seconds hold {steps} steps, too few to see what it can learn; raise --minutes.")
    trainer, clock = run(batch, steps, seconds, evaluate)
    log = [
        {"seconds": clock.finished[entry["step"] - 1], **{k: v for k, v in entry.items() if k != "epoch"}}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {
        "perplexity": clock.curve[-1]["perplexity"],
        "steps": trainer.state.global_step,
        "seconds": clock.finished[-1],
        "changed_groups": trainer.changed_groups(),
        "curve": curve + clock.curve,
        "log": log,
    }


def quickstart_row(
    method: Annotated[Literal["dense", "magnitude", "wanda", "sparsegpt+swaps", "residual", "simple"], typer.Option()],
    base: Annotated[str, typer.Option()],
    calibration: Annotated[list[Path], typer.Option()],
    held_out: Annotated[Path, typer.Option()],
    elsewhere: Annotated[Path, typer.Option()],
    result: Annotated[Path, typer.Option()],
    seq_len: Annotated[int, typer.Option()] = 512,
    max_tokens: Annotated[int, typer.Option()] = 8192,
    seconds: Annotated[float | None, typer.Option()] = None,
    deadline: Annotated[float, typer.Option()] = 0.0,
    start: Annotated[Path | None, typer.Option()] = None,
    samples: Annotated[int, typer.Option()] = SAMPLES,
    output: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Run one method, and write its row and the adapter."""
    # What the quickstart says itself.
    with warnings.catch_warnings(action="ignore"):
        model, tokenizer = load_to_run(base)
    text, other = read_text(held_out), read_text(elsewhere)
    contents = [read_text(path) for path in calibration]

    def mixed(seq_len: int) -> torch.Tensor:
        sources = [windows(tokenizer, content, seq_len) for content in contents]
        # As much of each, and of the largest all.
        return mixed_windows(sources, [1] * len(sources), len(sources) * max(map(torch.numel, sources)), seed=0)

    torch.manual_seed(0)
    begun = time.perf_counter()
    if method == "dense":
        masked: Any = model
    elif method in ("magnitude", "wanda", "sparsegpt+swaps"):
        masked = get_peft_model(model, MaskProConfig(init_mask=method))
        batches = in_batches(mixed(CALIBRATION_SEQ_LEN)[:samples])
        name = " and ".join(path.name for path in calibration)
        calibrate(masked, batches, name, 0, start_token_of(tokenizer))
    else:
        assert start is not None
        masked = load_adapter(model, start, is_trainable=True)
    initialized = time.perf_counter()

    def evaluate() -> float:
        return perplexity(masked, tokenizer, text, seq_len, max_tokens)

    if start is None:
        value = evaluate()
        row: dict[str, Any] = {"perplexity": value, "steps": 0, "seconds": initialized - begun, "changed_groups": 0.0}
        row |= {"curve": [], "log": []}
    else:
        estimator: Literal["residual", "simple"] = "residual" if method == "residual" else "simple"
        with tempfile.TemporaryDirectory() as scratch:
            row = learn(masked, estimator, mixed(SEQ_LEN), seconds, deadline, evaluate, Path(scratch))
    if output is not None:
        masked.save_pretrained(output)
    row |= {"method": method, "elsewhere": perplexity(masked, tokenizer, other, seq_len, max_tokens)}
    row["peak_bytes"] = peak_bytes()
    result.write_text(json.dumps(row))


def peak_bytes() -> int:
    """Most memory that this process has held. Linux hands `ru_maxrss` down from the parent; VmHWM is its own."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run the row that the command line asks for."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(quickstart_row)
    with one_line_errors():
        app()
