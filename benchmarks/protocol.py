"""What the leaderboard and the ablations measure by: model, text, held-out perplexity, and a place for results."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hf_maskpro.cli.common import load_tokenizer
from hf_maskpro.cli.quickstart import KEEP_MEMORY, write_smollm2
from hf_maskpro.deploy import new_folder
from hf_maskpro.starts import start_token_of
from hf_maskpro.starts.calibration import SAMPLES
from hf_maskpro.starts.calibration import SEQ_LEN as CALIBRATION_SEQ_LEN


SEQ_LEN = 512


def split(path: Path) -> tuple[str, str]:
    """The first four fifths and the last fifth of WikiText, its tokenization undone."""
    text = path.read_text(encoding="utf-8")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    cut = text.index("\n", len(text) * 4 // 5)
    return text[:cut], text[cut:]


def prepare(text: Path, model: str | None, work: Path) -> str:
    """Write `calibration.txt` and `held_out.txt` into the working folder; name the base model."""
    work.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("calibration.txt", "held_out.txt"), split(text), strict=True):
        (work / name).write_text(part, encoding="utf-8")
    if model is not None:
        return model
    if not (work / "base").is_dir():
        with new_folder(work / "base") as folder:
            write_smollm2(folder)
    return str(work / "base")


def describe(text: Path, model: str | None, max_tokens: int) -> str:
    begun = "" if model is None or start_token_of(load_tokenizer(model)) is None else ", each from the start token on"
    return (
        f"{model or 'SmolLM2-135M-Instruct'} on {text.name}, tokenization artefacts undone. Calibration: {SAMPLES} "
        f"windows of {CALIBRATION_SEQ_LEN} tokens of its first four fifths, on which learners train, too. Held-out: "
        f"its last fifth, non-overlapping windows of {SEQ_LEN} tokens{begun}, {max_tokens:,} tokens."
    )


def start(base: str, method: str, work: Path) -> Path:
    """The one-shot mask of a rule as an adapter, made unless it is there."""
    folder = work / "starts" / method
    if not folder.is_dir():
        command = [sys.executable, "-m", "hf_maskpro.cli", "init", "--model", base, "--method", method]
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
