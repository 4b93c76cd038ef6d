"""What the leaderboard and the ablations measure by: model, texts at home and elsewhere, and a place for results."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from hf_maskpro.cli.common import load_to_run, load_tokenizer
from hf_maskpro.cli.quickstart import KEEP_MEMORY, _topics, write_smollm2
from hf_maskpro.deploy import new_folder
from hf_maskpro.starts import generated_text, start_token_of
from hf_maskpro.starts.calibration import SAMPLES
from hf_maskpro.starts.calibration import SEQ_LEN as CALIBRATION_SEQ_LEN


SEQ_LEN = 512
# Text that needs no file, since every Python carries it.
TOPICS = "python-topics.txt"
SAMPLES_NAME = "dense-samples.txt"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all of them take."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--text", type=Path, nargs="+", required=True, help="texts to learn from; a fifth is held out"
    )
    others = "texts of other kinds, beside the topics of Python's help"
    options.add_argument("--elsewhere", type=Path, nargs="*", default=[], help=others)
    options.add_argument("--model", help="a local folder or a Hub id; SmolLM2-135M-Instruct if absent")
    return options


def plain(path: Path) -> str:
    """A text, WikiText's tokenization undone."""
    text = path.read_text(encoding="utf-8")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    return text


def split(path: Path) -> tuple[str, str]:
    """The first four fifths and the last fifth of a text."""
    text = plain(path)
    cut = text.index("\n", len(text) * 4 // 5)
    return text[:cut], text[cut:]


def prepare(texts: list[Path], elsewhere: list[Path], model: str | None, work: Path) -> tuple[str, list[Path]]:
    """
    Write `calibration.txt`, `held_out.txt` and the texts that count as elsewhere into the working folder; name the
    base model, and those texts.
    """
    names = ["held_out.txt", TOPICS, SAMPLES_NAME, *(path.name for path in elsewhere)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SystemExit(f"two texts are named {twice[0]}, which their figures go by; rename one.")
    (work / "elsewhere").mkdir(parents=True, exist_ok=True)
    learned, held_out = zip(*map(split, texts), strict=True)
    # Paragraphs in turns, since no more of what is held out is measured than so many tokens.
    turns = zip_longest(*(part.split("\n\n") for part in held_out))
    at_home = "\n\n".join(paragraph for turn in turns for paragraph in turn if paragraph is not None)
    contents = {"calibration.txt": "\n\n".join(learned), "held_out.txt": at_home}
    contents |= {f"elsewhere/{path.name}": plain(path) for path in elsewhere}
    contents |= {f"elsewhere/{TOPICS}": "\n\n".join(_topics())}
    for name, content in contents.items():
        (work / name).write_text(content, encoding="utf-8")
    others = [work / "elsewhere" / name for name in (*(path.name for path in elsewhere), TOPICS)]
    if model is not None:
        return model, others
    if not (work / "base").is_dir():
        with new_folder(work / "base") as folder:
            write_smollm2(folder)
    return str(work / "base"), others


def write_dense_samples(base: str, path: Path, cache: Path) -> None:
    """Write a text of what the dense model samples, kept in a cache: plain text and conversations by turns."""
    model, tokenizer = load_to_run(base)
    # Half of them are of the one kind, and then half of the other; a seed that nothing learns from.
    batches = generated_text(model, tokenizer, 64, SEQ_LEN, seed=0, cache=cache)
    plain, conversations = torch.cat([batch["input_ids"] for batch in batches]).chunk(2)
    turns = torch.stack([plain, conversations], 1).flatten(0, 1)
    # Every window of a text begins with the start token anyway.
    turns = turns[:, 0 if start_token_of(tokenizer) is None else 1 :]
    path.write_text("\n\n".join(tokenizer.batch_decode(turns)), encoding="utf-8")


def describe(texts: list[Path], elsewhere: list[Path], model: str | None, max_tokens: int) -> str:
    begun = "" if model is None or start_token_of(load_tokenizer(model)) is None else ", each from the start token on"
    others = ""
    if elsewhere:
        others = f" Elsewhere: the geometric mean over {', '.join(path.name for path in elsewhere)}, measured alike."
    return (
        f"{model or 'SmolLM2-135M-Instruct'} on {', '.join(path.name for path in texts)}, tokenization artefacts "
        f"undone. Calibration: {SAMPLES} windows of {CALIBRATION_SEQ_LEN} tokens of its first four fifths, on which "
        f"learners train, too. Held-out: its last fifth, non-overlapping windows of {SEQ_LEN} tokens{begun}, "
        f"{max_tokens:,} tokens.{others}"
    )


def start(base: str, method: str, work: Path) -> Path:
    """The one-shot mask of a rule as an adapter, made unless it is there."""
    folder = work / "starts" / method
    if not folder.is_dir():
        command = [sys.executable, "-m", "hf_maskpro_cli", "init", "--model", base, "--method", method]
        command += ["--output", str(folder)]
        if method not in ("magnitude", "random"):
            command += ["--text", str(work / "calibration.txt")]
        subprocess.run(command, check=True, env=KEEP_MEMORY | os.environ)
    return folder


def read(path: Path, protocol: str) -> list[dict[str, Any]]:
    """The rows of a file of results, which must all have been obtained by this protocol."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    for row in rows:
        if row["protocol"] != protocol:
            raise SystemExit(
                f"{path} was obtained by another protocol: {row['protocol']} "
                f"This call's: {protocol} Name another --results."
            )
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(rows, file, indent=1)
    Path(file.name).replace(path)
