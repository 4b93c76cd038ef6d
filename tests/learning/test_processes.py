"""Several processes learn one mask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .processes import RUNS, logits_of, trainer_of


ROOT = Path(__file__).parents[2]


def launch(module: str, processes: int, *arguments: str) -> None:
    """Run a module of the tests in several processes; what they print is shown if they fail."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", module]
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]


class Ran:
    """What several processes left behind, of so many masks a step in each."""

    def __init__(self, folder: Path, processes: int, masks: int):
        self.folder, self.processes, self.masks = folder, processes, masks
        launch("tests.learning.processes", processes, str(folder), str(masks))
        self.told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]

    def logits(self, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}-{rank}.safetensors")


@pytest.fixture(
    scope="module",
    params=[(2, 1), pytest.param((4, 1), marks=pytest.mark.slow), pytest.param((2, 2), marks=pytest.mark.slow)],
    ids=lambda ran: f"{ran[0]} processes, {ran[1]} masks",
)
def ran(request, tmp_path_factory) -> Ran:
    return Ran(tmp_path_factory.mktemp("ran"), *request.param)


@pytest.mark.parametrize("name", RUNS)
def test_all_processes_end_with_the_same_logits(ran, name):
    first = ran.logits(name)
    assert all(theta.any() for theta in first.values())
    for rank in range(1, ran.processes):
        other = ran.logits(name, rank)
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["scaled", "raw"])
def test_masks_of_several_processes_are_those_of_one(ran, tmp_path, name):
    masks = ran.processes * ran.masks
    trainer = trainer_of(name, tmp_path, masks_per_step=masks, gradient_accumulation_steps=masks)
    trainer.train()
    for key, theta in logits_of(trainer).items():
        torch.testing.assert_close(theta, ran.logits(name)[key], atol=1e-4, rtol=1e-4)


def test_processes_tell_each_other_seeds_and_scalars_alone(ran):
    """Sixteen bytes a mask, and eight for the number of tokens; what is compared and logged comes on top, seldom."""
    steps = RUNS["raw"]["max_steps"]
    for told in ran.told:
        assert told["bytes"].count(16 * ran.masks) == steps
        assert sum(told["bytes"]) <= steps * (16 * ran.masks + 8) + 64


def test_every_process_draws_masks_of_its_own_in_simple(ran):
    seeds = [seed for told in ran.told for seed in told["seeds"]]
    assert len(set(seeds)) == len(seeds) > 0


def test_processes_that_part_stop(ran):
    last = RUNS["raw"]["max_steps"]
    for told in ran.told:
        assert told["parted"].startswith(f"{last - 1} after step {last} process 1 does not have the masks and logits")


def test_several_processes_stop_together_and_resume_exactly(ran):
    assert [told["stopped"] for told in ran.told] == [3] * ran.processes
    for rank in range(ran.processes):
        whole, resumed = ran.logits("whole", rank), ran.logits("resumed", rank)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
