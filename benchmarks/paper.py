"""
`residual` on a real model, against forward passes: the loss residual of the sampled masks, and the perplexity of the
mode on held-out text. Few training windows or many, the paper's advantage or the scaled one. Runs that are in the file
of results are not repeated, so an interrupted call goes on where it stopped.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import protocol
from hf_maskpro import MaskProTrainer, MaskProTrainingArguments, perplexity
from hf_maskpro.cli.common import load_adapter, load_to_run
from hf_maskpro.evaluation import windows


START = "sparsegpt+swaps"
MAX_TOKENS = 8192
# What a run is told from others by.
SETTINGS = ("advantage", "windows", "seed", "learning_rate", "passes")


class Measure(TrainerCallback):
    """Where the trainer logs: the mean residual since it did last, the mode's perplexity, and its changed groups."""

    def __init__(self, trainer: MaskProTrainer, mode_perplexity: Callable[[], float]):
        self.trainer, self.mode_perplexity = trainer, mode_perplexity
        self.curve: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "residual" not in logs:
            return
        measured = {"perplexity": self.mode_perplexity(), "changed": self.trainer.changed_groups()}
        self.curve.append({"passes": state.global_step, "residual": logs["residual"]} | measured)
        print(self.curve[-1], file=sys.stderr, flush=True)


def worker(settings: dict[str, Any], every: int, base: str, work: Path) -> dict[str, Any]:
    """One run, in this process."""
    model, tokenizer = load_to_run(base)
    masked = load_adapter(model, str(work / "starts" / START), is_trainable=True)
    held_out = (work / "held_out.txt").read_text(encoding="utf-8")
    ids = windows(tokenizer, (work / "calibration.txt").read_text(encoding="utf-8"), protocol.SEQ_LEN)
    ids = ids[: settings["windows"]]

    def mode_perplexity() -> float:
        return perplexity(masked, tokenizer, held_out, protocol.SEQ_LEN, MAX_TOKENS)

    rate = {"learning_rate": settings["learning_rate"]} if settings["learning_rate"] else {}
    args = MaskProTrainingArguments(
        output_dir=tempfile.gettempdir(),  # where nothing is saved
        estimator="residual",
        advantage=settings["advantage"],
        max_steps=settings["passes"],
        per_device_train_batch_size=1,
        baseline="cache",
        seed=settings["seed"],
        save_strategy="no",
        logging_steps=every,
        report_to="none",
        **rate,
    )
    start = mode_perplexity()
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    trainer = MaskProTrainer(masked, args, train_dataset=dataset)
    measure = Measure(trainer, mode_perplexity)
    trainer.add_callback(measure)
    trainer.train()
    return settings | {"start": start, "curve": measure.curve}


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("paper"), help="folder for the start and texts")
    parser.add_argument("--results", type=Path, default=Path("docs/assets/paper.json"))
    parser.add_argument("--advantage", nargs="+", default=["raw", "scaled"])
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[128], help="training windows, of which a pass has one"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--learning-rate", type=float, help="of the advantage, if absent")
    parser.add_argument("--passes", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="passes between measurements")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    parser.add_argument("--worker", help="a run's settings as JSON, for calls of this file by itself")
    args = parser.parse_args()
    base, _ = protocol.prepare(args.text, [], args.model, args.work)
    described = protocol.describe(args.text, [], args.model, MAX_TOKENS)
    if args.worker:
        row = worker(json.loads(args.worker), args.every, base, args.work) | {"protocol": described}
        # Others may have written meanwhile.
        protocol.write(args.results, [*protocol.read(args.results, described), row])
        return
    protocol.start(base, START, args.work)
    for advantage, count, seed in product(args.advantage, args.windows, args.seed):
        settings = vars(args) | {"advantage": advantage, "windows": count, "seed": seed}
        settings = {name: settings[name] for name in SETTINGS}
        rows = protocol.read(args.results, described)
        if not any(all(row[name] == settings[name] for name in SETTINGS) for row in rows):
            command = [sys.executable, *sys.argv, "--worker", json.dumps(settings)]
            subprocess.run(command, check=True, env=protocol.KEEP_MEMORY | os.environ)
    rows = protocol.read(args.results, described)
    print(json.dumps(rows) if args.json else f"{described}\n\n{table(rows)}")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, a line for every run and measurement."""
    lines = ["| advantage | windows | seed | passes | residual | perplexity | groups changed |", "|---|" + "---:|" * 6]
    for row in rows:
        for at in row["curve"]:
            told = f"{at['residual']:.4f} | {at['perplexity']:.2f} | {at['changed']:.4%}"
            lines.append(f"| {row['advantage']} | {row['windows']} | {row['seed']} | {at['passes']} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
