"""
Every one-shot rule, and every learner from the best of them, on one model and by one protocol: at home, on text of the
kind that was learned, and elsewhere, on other kinds. Each row is made by the command line in a process of its own.
Rows that are in the file of results are not made again, so an interrupted call goes on where it stopped; those of
learners are if their budget was another.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import protocol
from hf_maskpro.tuner import RULES


REFINED = ("wanda+swaps", "sparsegpt+swaps")
# Every learner from the best mask, and those of other papers from the start of their own, too.
LEARNERS = (
    ("simple", None),
    ("proxsparse", None),
    ("maskllm", None),
    ("proxsparse", "magnitude"),
    ("maskllm", "sparsegpt"),
    ("residual", None),
)


def run(arguments: list[str]) -> tuple[str, float, int]:
    """Output, seconds and peak memory of one command."""
    command = [sys.executable, "-W", "ignore", "-m", "hf_maskpro_cli", *arguments]
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=protocol.KEEP_MEMORY | os.environ, stdout=subprocess.PIPE, text=True)
    output: list[str] = []
    # Read beside, since wait4, which tells the memory of this child alone, comes before the rest of its output.
    reader = threading.Thread(target=lambda: output.append(process.stdout.read()))
    reader.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.terminate()
        raise
    reader.join()
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed; its message is above.")
    return output[0], time.perf_counter() - begun, usage.ru_maxrss * 1024


def evaluate(
    base: str, held_out: Path, elsewhere: list[Path], max_tokens: int, adapter: Path | None
) -> tuple[dict[str, Any], int]:
    """Perplexity at home; what it is times dense, there and elsewhere; the figures of every text; and peak memory."""
    command = ["eval", "--model", base, "--home", str(held_out), "--seq-len", str(protocol.SEQ_LEN), "--json"]
    command += [option for path in elsewhere for option in ("--text", str(path))]
    command += ["--adapter", str(adapter)] if adapter else []
    command += ["--max-tokens", str(max_tokens)]
    output, _, peak = run(command)
    figures = json.loads(output)
    texts = {
        Path(path).name: {name: value for name, value in measured.items() if name != "protocol"}
        for path, measured in figures["texts"].items()
    }
    return {
        "perplexity": texts[held_out.name]["perplexity"],
        "at_home": figures.get("at_home", 1.0),
        "elsewhere": figures.get("elsewhere", 1.0),
        "texts": texts,
    }, peak


def bits(adapter: Path | None) -> float | None:
    if adapter is None:
        return None
    return json.loads(run(["inspect", str(adapter), "--json"])[0])["bits_per_weight"]


def one_shot(method: str, base: str, work: Path) -> tuple[Path, dict[str, Any]]:
    adapter = work / method
    command = ["init", "--model", base, "--method", method, "--output", str(adapter), "--overwrite"]
    command += ["--text", str(work / "calibration.txt")]
    _, seconds, peak = run(command)
    return adapter, {"seconds": seconds, "peak_bytes": peak, "steps": 0}


def learned(estimator: str, method: str, base: str, work: Path, budget: float) -> tuple[Path, dict[str, Any]]:
    start = work / method
    # Its row may come from elsewhere.
    if not start.is_dir():
        one_shot(method, base, work)
    # Of this estimator, start and budget alone, so that nothing else is resumed.
    folder = work / f"{estimator} from {method} in {budget} seconds"
    folder.mkdir(exist_ok=True)
    adapter, planned, spent = folder / "adapter", folder / "steps.json", folder / "seconds.json"
    command = ["train", "--model", base, "--adapter", str(start), "--estimator", estimator, "--json"]
    command += ["--text", str(work / "calibration.txt")]
    if not planned.is_file():
        planned.write_text(json.dumps(steps_within(budget, command, folder)))
    steps = json.loads(planned.read_text())
    command += ["--output", str(adapter), "--max-steps", str(steps), "--logging-steps", str(min(10, steps))]
    command += ["--resume"] if list(adapter.glob("checkpoint-*")) else ["--overwrite"]
    # What was spent before an interruption counts.
    before = json.loads(spent.read_text()) if spent.is_file() else 0.0
    begun = time.perf_counter()
    try:
        output, _, peak = run(command)
    finally:
        seconds = before + time.perf_counter() - begun
        spent.write_text(json.dumps(seconds))
    training = json.loads((adapter / "adapter_config.json").read_text())["lineage"][-1]["training"]
    figures = {"seconds": seconds, "peak_bytes": peak, "steps": steps, "budget_seconds": budget, "training": training}
    return adapter, figures | {"changed": json.loads(output.splitlines()[-1])["changed"]}


def steps_within(budget: float, command: list[str], work: Path) -> int:
    """How many steps the budget holds, by the difference of two short trials after one that compiles."""
    taken = []
    for steps in (1, 2, 6):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            output, _, _ = run([*command, "--max-steps", str(steps), "--output", f"{folder}/trial"])
        taken.append(json.loads(output.splitlines()[-1])["seconds"])
    return max(1, int((budget - taken[1]) / (taken[2] - taken[1]) * 4))


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("leaderboard"), help="folder for texts and adapters")
    parser.add_argument("--results", type=Path, default=Path("docs/assets/leaderboard.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/assets/leaderboard.png"))
    parser.add_argument(
        "--seconds", type=float, default=900, help="time budget of each learner, which decides its steps"
    )
    parser.add_argument("--max-tokens", type=int, default=16_384, help="of each held-out text")
    parser.add_argument(
        "--dense-samples", action="store_true", help="text that the dense model writes counts as elsewhere, too"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    args = parser.parse_args()
    base, elsewhere = protocol.prepare(args.text, args.elsewhere, args.model, args.work)
    samples = args.work / "elsewhere" / protocol.SAMPLES_NAME
    elsewhere += [samples] * args.dense_samples
    held_out = args.work / "held_out.txt"
    described = protocol.describe(args.text, elsewhere, args.model, args.max_tokens)
    rows = protocol.read(args.results, described)
    if args.dense_samples:
        protocol.write_dense_samples(base, samples, args.work / "dense samples")

    def add(method: str, make, budget: float | None = None) -> None:
        same = [row for row in rows if row["method"] == method]
        if any(row.get("budget_seconds") == budget for row in same):
            return
        print(method, file=sys.stderr)
        adapter, figures = make()
        measured, peak = evaluate(base, held_out, elsewhere, args.max_tokens, adapter)
        figures = {"peak_bytes": peak, "seconds": 0.0, "steps": 0} | figures
        row = {"method": method, **measured, "bits_per_weight": bits(adapter), **figures}
        rows[:] = [other for other in rows if other not in same] + [row | {"protocol": described}]
        protocol.write(args.results, rows)

    add("dense", lambda: (None, {}))
    for method in (*RULES, *REFINED):
        add(method, lambda method=method: one_shot(method, base, args.work))
    starts = [row for row in rows if row["method"] in (*RULES, *REFINED)]
    best = min(starts, key=lambda row: row["perplexity"])["method"]
    for estimator, start in LEARNERS:
        make = partial(learned, estimator, start or best, base, args.work, args.seconds)
        add(f"{estimator} from {start or best}", make, args.seconds)
    plot(rows, args.plot)
    if args.json:
        print(json.dumps(rows))
        return
    print(described + "\n")
    print(table(rows))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    axes.axhline(dense, linestyle="--", color="gray", label="dense")
    for row, marker in zip(rows[1:], cycle("os^vD<>pP*Xh"), strict=False):
        # What has collapsed would hide the differences between the others.
        if row["perplexity"] < 20 * dense:
            axes.scatter(row["seconds"], row["perplexity"], marker=marker, label=row["method"], s=60)
    axes.set(xlabel="seconds of the command", ylabel="held-out perplexity at home", ylim=(0, None))
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    names = ["method", "perplexity at home", "times dense at home", "times dense elsewhere"]
    names += ["KL divergence elsewhere", "seconds", "steps", "peak memory, MiB", "bits per weight"]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for row in sorted(rows, key=lambda row: -row["perplexity"]):
        width = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        cells = [row["method"], f"{row['perplexity']:,.2f}", f"{row['at_home']:,.2f}", f"{row['elsewhere']:,.2f}"]
        # Neither the dense model has one nor rows of the versions that did not measure it.
        divergences = [text["kl"] for name, text in row["texts"].items() if name != "held_out.txt" and "kl" in text]
        cells += [f"{fmean(divergences):,.2f}" if divergences else "", f"{row['seconds']:.0f}", f"{row['steps']:,}"]
        cells += [f"{row['peak_bytes'] / 2**20:,.0f}", width]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
