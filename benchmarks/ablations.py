"""
What the settings of `simple` do: each is changed by itself, and the mask measured after as many steps, at home and
elsewhere. Runs that are in the file of results are not repeated, so an interrupted call goes on where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import protocol
from hf_maskpro import MaskProTrainer, MaskProTrainingArguments, perplexity
from hf_maskpro.cli.common import load_adapter, load_to_run
from hf_maskpro.evaluation import against_dense, windows


BASE: dict[str, Any] = {
    "start": "sparsegpt+swaps",
    "logit_scale": 6.0,
    "learning_rate": 0.3,
    "batch": 8,
    "seq_len": 128,
    "tokens": None,
    "objective": "language-modeling",
    "weight_decay": 0.0,
    "weight_pull": 0.3,
    "curvature": 1.0,
    "seed": 0,
}
CHANGES: list[dict[str, Any]] = [
    {},
    {"seed": 1},
    {"seed": 2},
    {"logit_scale": 5.0},
    {"logit_scale": 7.0},
    {"learning_rate": 0.15},
    {"learning_rate": 0.6},
    {"start": "wanda"},
    {"start": "wanda+swaps"},
    {"start": "magnitude"},
    {"tokens": 32_768},
    {"tokens": 131_072},
    {"batch": 4},
    {"batch": 16},
    {"batch": 4, "seq_len": 256},
    {"batch": 2, "seq_len": 512},
    {"objective": "distillation"},
    {"objective": '{"distillation": 1, "language-modeling": 1}'},
    {"weight_decay": 0.1},
    {"weight_pull": 0.0},
    {"curvature": 0.0},
]
MAX_TOKENS = 16_384


class Evaluate(TrainerCallback):
    """Perplexity of held-out and of calibration text at some steps."""

    def __init__(self, steps: list[int], measure):
        self.steps, self.measure = steps, measure
        self.curve: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps or state.global_step == state.max_steps:
            self.curve.append({"step": state.global_step, **self.measure()})
            print(self.curve[-1], file=sys.stderr, flush=True)


def worker(
    settings: dict[str, Any],
    base: str,
    start: str,
    work: Path,
    elsewhere: list[str],
    steps: int,
    evaluate_at: list[int],
    result: Path,
) -> None:
    """One run, in this process; writes its row."""
    model, tokenizer = load_to_run(base)
    masked = load_adapter(model, start, is_trainable=True)
    masked.peft_config["default"].logit_scale = settings["logit_scale"]
    calibration = (work / "calibration.txt").read_text(encoding="utf-8")
    held_out = (work / "held_out.txt").read_text(encoding="utf-8")
    inputs = windows(tokenizer, calibration, settings["seq_len"], settings["tokens"])

    def measure() -> dict[str, float]:
        texts = {"perplexity": held_out} | ({"calibration_perplexity": calibration} if evaluate_at else {})
        return {
            name: perplexity(masked, tokenizer, text, protocol.SEQ_LEN, MAX_TOKENS) for name, text in texts.items()
        }

    args = MaskProTrainingArguments(
        output_dir=tempfile.gettempdir(),  # where nothing is saved
        estimator="simple",
        max_steps=steps,
        per_device_train_batch_size=settings["batch"],
        learning_rate=settings["learning_rate"],
        objective=settings["objective"],
        weight_decay=settings["weight_decay"],
        weight_pull=settings["weight_pull"],
        curvature=settings["curvature"],
        seed=settings["seed"],
        save_strategy="no",
        logging_steps=steps,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    callback = Evaluate(evaluate_at, measure)
    dataset = [{"input_ids": row, "labels": row} for row in inputs]
    trainer = MaskProTrainer(masked, args, train_dataset=dataset, callbacks=[callback])
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    texts = {"held_out.txt": held_out} | {Path(path).name: Path(path).read_text("utf-8") for path in elsewhere}
    row = {
        **settings,
        "steps": steps,
        "training_tokens": inputs.numel(),
        "seconds": seconds,
        "changed": trainer.changed_groups(),
        "curve": callback.curve,
        **callback.curve[-1],
        **against_dense(masked, tokenizer, texts, "held_out.txt", protocol.SEQ_LEN, MAX_TOKENS),
    }
    del row["step"]
    result.write_text(json.dumps(row))


def setting(entry: str) -> tuple[str, Any]:
    try:
        name, value = entry.split("=", 1)
        return name, (int if BASE[name] is None else type(BASE[name]))(value)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{entry!r} is no setting; name one of {', '.join(BASE)}, as in batch=8 or start=wanda."
        ) from None


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("ablations"), help="folder for starts and texts")
    parser.add_argument("--results", type=Path, default=Path("docs/assets/ablations.json"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--evaluate-at", type=int, nargs="*", default=[], help="further steps to measure at")
    parser.add_argument("--base-only", action="store_true", help="the settings that the others are changed from")
    parser.add_argument(
        "--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="one run with these settings"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        settings, result = job["settings"], Path(job["result"])
        worker(settings, job["base"], job["start"], args.work, job["elsewhere"], args.steps, args.evaluate_at, result)
        return
    base, elsewhere = protocol.prepare(args.text, args.elsewhere, args.model, args.work)
    changes = CHANGES[:1] if args.base_only else CHANGES
    if args.set:
        changes = [dict(args.set)]
    described = protocol.describe(args.text, elsewhere, args.model, MAX_TOKENS)
    rows = protocol.read(args.results, described)
    for change in changes:
        settings = BASE | change
        if any(row["steps"] == args.steps and all(row.get(k) == v for k, v in settings.items()) for row in rows):
            continue
        start = protocol.start(base, settings["start"], args.work)
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "row.json"
            job = {"settings": settings, "base": base, "start": str(start), "result": str(result)}
            job["elsewhere"] = [str(path) for path in elsewhere]
            command = [sys.executable, __file__, "--worker", json.dumps(job), "--work", str(args.work), "--text"]
            command += map(str, args.text)
            command += ["--steps", str(args.steps), "--evaluate-at", *map(str, args.evaluate_at)]
            subprocess.run(command, check=True, env=protocol.KEEP_MEMORY | os.environ)
            row = json.loads(result.read_text()) | {"protocol": described}
        # Others may have written meanwhile.
        rows = [*protocol.read(args.results, described), row]
        protocol.write(args.results, rows)
    if args.json:
        print(json.dumps(rows))
        return
    print(described + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, runs of as many steps together."""
    names = [*BASE, "steps", "perplexity", "at_home", "elsewhere", "changed"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in sorted(rows, key=lambda row: row["steps"]):
        shown = row | {"tokens": f"{row['training_tokens']:,}", "changed": f"{row['changed']:.2%}"}
        shown |= {name: f"{row[name]:.2f}" for name in ("perplexity", "at_home", "elsewhere")}
        lines.append("| " + " | ".join(str(shown[name]) for name in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
