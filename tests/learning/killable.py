"""
Runs that are killed again and again, in processes forked from one that has imported everything and computed nothing.

`python -m tests.learning.killable FOLDER KILLS RUN...` fails if a run does not end, bit for bit, as one that was let
alone, and prints how many kills were in the middle of writing a checkpoint, with certainty. A run is the name of an
estimator, of its data and how many batches it accumulates, as `simple,rows,2`; or `hf-maskpro,MODEL,TEXT`, which is
the command's.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments
from hf_maskpro.cli import main as hf_maskpro
from hf_maskpro.learning.checkpoints import UNFINISHED, newest_checkpoint

from ..conftest import tiny_llama


STEPS = 8
# One that hangs ends by an alarm, as no run should.
SECONDS = 120
OPTIONS = {
    "proxsparse": {"learning_rate": 0.02, "prox_pull": 0.01},
    "maskllm": {"learning_rate": 0.02},
    "lean": {"estimator": "simple", "optimizer_in_backward": True},
}


class Stream(torch.utils.data.IterableDataset):
    """So many different rows, one after the other."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        ids = torch.randint(2, 34, (self.count, 12), generator=torch.Generator().manual_seed(0))
        return iter([{"input_ids": row, "labels": row} for row in ids])


# What is gone through once, what is begun again within a batch, and what is shuffled.
DATA = {"stream": Stream(200), "short": Stream(23), "rows": list(Stream(32))}


def train(folder: Path, estimator: str, data: str, accumulation: str) -> None:
    torch.manual_seed(7)
    model = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=2.0, init_mask="random"))
    args = MaskProTrainingArguments(
        str(folder), max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=2, report_to=[],
        per_device_train_batch_size=2, gradient_accumulation_steps=int(accumulation), disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, **{"estimator": estimator} | OPTIONS.get(estimator, {}),
    )  # fmt: skip
    trainer = MaskProTrainer(model, args, train_dataset=DATA[data])
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder) is not None)


def command(folder: Path, model: str, text: str) -> None:
    sys.argv = ["hf-maskpro", "train", "--model", model, "--text", text, "--seq-len", "16", "--logit-scale", "2"]
    sys.argv += ["--max-steps", str(STEPS), "--save-steps", "1", "--output", str(folder)]
    sys.argv += ["--overwrite" if newest_checkpoint(folder) is None else "--resume"]
    hf_maskpro()


def started(folder: Path, name: str, *settings: str, event: int | None = None) -> int:
    """A process with the run, which may kill itself when it asks for a file of an unfinished checkpoint so often."""
    process = os.fork()
    if process > 0:
        return process
    asked = 0

    def count(name: str, arguments: tuple) -> None:
        nonlocal asked
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and UNFINISHED in str(arguments[0]):
            asked += 1
            if asked == event:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        signal.alarm(SECONDS)
        torch.set_num_threads(1)
        if event is not None:
            sys.addaudithook(count)
        command(folder, *settings) if name == "hf-maskpro" else train(folder, name, *settings)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(code)


def main(folder: Path, kills: int, runs: list[str]) -> None:
    moments = random.Random(0)
    for run in runs:
        whole, killed = folder / run.replace("/", "_") / "whole", folder / run.replace("/", "_") / "killed"
        settings = run.split(",")
        begun = time.monotonic()
        assert os.waitpid(started(whole, *settings), 0)[1] == 0
        seconds = time.monotonic() - begun
        written = 0
        for kill in range(kills):
            event = moments.randrange(1, 100) if kill % 2 else None
            process = started(killed, *settings, event=event)
            if event is None:
                time.sleep(moments.uniform(0, 0.5) * seconds)
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            written += event is not None and status == signal.SIGKILL
            assert status in (0, signal.SIGKILL), f"it could not go on after {kill} kills"
            if status == 0:
                compare(whole, killed)
        assert os.waitpid(started(killed, *settings), 0)[1] == 0
        compare(whole, killed)
        # Before the next fork, whose end would print it again.
        print(f"{run}: {kills} kills, {written} of them in the middle of writing a checkpoint", flush=True)


def compare(whole: Path, killed: Path) -> None:
    last = f"checkpoint-{STEPS}"
    files = [path.name for path in (whole / last).glob("*.safetensors")]
    assert files
    for name in files:
        assert (whole / last / name).read_bytes() == (killed / last / name).read_bytes(), f"{name} differs"
    shutil.rmtree(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
