"""Where the time of a training step of `residual` goes, with either baseline, on a real model."""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ProgressCallback, TrainerCallback

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments
from hf_maskpro.learning import residual
from hf_maskpro.tuner import MaskProLayer
from memory import ForgetFirstStep, forget_peak, peak_bytes


PARTS = ("forward", "sample and apply", "update", "baseline", "everything else")
EXAMPLES, TOKENS, BATCH = 64, 128, 32


class Clock:
    """Adds up the seconds of the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, owner: Any, method: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = self.now()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] += self.now() - begun

        setattr(owner, method, timed)

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class StepTimes(TrainerCallback):
    """Notes the parts of every step; what is in none of them is everything else."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.rows: list[dict[str, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.seconds.clear()
        self.begun = self.clock.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        whole, seconds = self.clock.now() - self.begun, self.clock.seconds
        row = {
            "forward": seconds["losses"] - seconds["masks"] - seconds["starting masks"] - seconds["baseline"],
            "sample and apply": seconds["masks"],
            "update": seconds["update"],
            "baseline": seconds["baseline"] + seconds["starting masks"],
        }
        row["everything else"] = whole - sum(row.values())
        self.rows.append(row)


def profile(model_name: str | None, logits_dtype: str, baseline: str, steps: int) -> dict[str, float]:
    forget_peak()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if model_name is None:
            model = LlamaForCausalLM._from_config(LlamaConfig(num_hidden_layers=32), dtype=torch.bfloat16)
        else:
            model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    model = get_peft_model(model, MaskProConfig(n=2, m=4, logits_dtype=logits_dtype))
    ids = torch.randint(model.config.vocab_size, (EXAMPLES, TOKENS)).tolist()
    args = MaskProTrainingArguments(
        tempfile.gettempdir(),  # where nothing is saved
        estimator="residual",
        advantage="raw",  # which samples all groups
        baseline=baseline,
        max_steps=steps + 2,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    clock = Clock()
    times = StepTimes(clock)
    trainer = MaskProTrainer(model, args, train_dataset=data, callbacks=[times, ForgetFirstStep()])
    # It writes the metrics of the run to standard output, where the figures belong.
    trainer.remove_callback(ProgressCallback)
    losses = residual.share_of_loss

    def loss(*args: Any) -> Any:
        # The second of a step's two losses is the baseline.
        begun, second = clock.now(), clock.seconds["losses"] > 0
        try:
            return losses(*args)
        finally:
            taken = clock.now() - begun
            clock.seconds["losses"] += taken
            if second:
                clock.seconds["baseline"] += taken - clock.seconds["starting masks"]

    residual.share_of_loss = loss
    originals = {name: getattr(MaskProLayer, name) for name in ("masked", "initially_masked", "move_logits")}
    clock.around(MaskProLayer, "masked", "masks")
    clock.around(MaskProLayer, "initially_masked", "starting masks")
    clock.around(MaskProLayer, "move_logits", "update")
    try:
        trainer.train()
    finally:
        residual.share_of_loss = losses
        for name, original in originals.items():
            setattr(MaskProLayer, name, original)
    # The first steps compile.
    figures = {part: statistics.median(row[part] for row in times.rows[2:]) for part in PARTS}
    return figures | {"peak_bytes": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--model", help="a local folder or a Hub id")
    chosen.add_argument("--seven-b", action="store_true", help="the shape of a 7B Llama with random weights")
    parser.add_argument("--logits-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--plot", type=Path, help="where to draw the picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    figures = {
        baseline: profile(args.model, args.logits_dtype, baseline, args.steps) for baseline in ("step", "cache")
    }
    if args.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 2.2), layout="constrained")
        axes = figure.subplots()
        left = [0.0] * len(figures)
        for part in PARTS:
            widths = [row[part] for row in figures.values()]
            axes.barh([f'baseline="{name}"' for name in figures], widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_xlabel(f"seconds of a step of {BATCH} x {TOKENS} tokens")
        figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize="small")
        figure.savefig(args.plot, dpi=150)
    if args.json:
        print(json.dumps(figures))
        return
    table = Table(title=f"a residual step of {BATCH} x {TOKENS} tokens, medians of {args.steps} steps, seconds")
    for name in ["baseline", *PARTS, "peak memory"]:
        table.add_column(name, justify="right")
    for baseline, row in figures.items():
        whole = sum(row[part] for part in PARTS)
        shares = [f"{row[part]:.3f} ({row[part] / whole:.0%})" for part in PARTS]
        table.add_row(baseline, *shares, f"{row['peak_bytes'] / 2**20:,.0f} MiB")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
