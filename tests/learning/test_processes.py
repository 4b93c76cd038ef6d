"""Several processes learn one mask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hf_maskpro.subset import group_members, mode
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_llama
from .processes import RUNS, SHARDED, logits_of, trainer_of


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

    def __init__(self, folder: Path, processes: int, masks: int, *read: Path):
        self.folder, self.processes, self.masks = folder, processes, masks
        launch("tests.learning.processes", processes, *map(str, (folder, masks, *read)))
        self.told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]

    def logits(self, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}-{rank}.safetensors")


@pytest.fixture(
    scope="module",
    params=[(2, 1), pytest.param((4, 1), marks=pytest.mark.slow), pytest.param((2, 2), marks=pytest.mark.slow)],
    ids=lambda ran: f"{ran[0]} processes, {ran[1]} masks",
)
def ran(request, tmp_path_factory, checkpoint, text) -> Ran:
    return Ran(tmp_path_factory.mktemp("ran"), *request.param, checkpoint, text)


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
    """Sixteen bytes a mask, and eight for the number of tokens; a hash after the first and the last step, and logs."""
    steps = RUNS["raw"]["max_steps"]
    for told in ran.told:
        assert told["hashes"] == [8, 8]
        assert told["bytes"].count(16 * ran.masks) == steps
        logged = sum(told["bytes"]) - steps * (16 * ran.masks + 8) - sum(told["hashes"])
        assert 0 <= logged <= 24


def test_every_process_draws_masks_of_its_own_in_simple(ran):
    seeds = [seed for told in ran.told for seed in told["seeds"]]
    assert len(set(seeds)) == len(seeds) > 0


def test_processes_that_part_stop(ran):
    last = RUNS["raw"]["max_steps"]
    for told in ran.told:
        assert told["parted"].startswith(f"{last - 1} after step {last} process 1 does not have the masks and logits")


def test_several_processes_stop_together_and_resume_exactly(ran):
    assert [told["stopped"] for told in ran.told] == [[2, 3]] * ran.processes
    for rank in range(ran.processes):
        whole, resumed = ran.logits("whole", rank), ran.logits("resumed", rank)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_of_the_command_the_first_process_writes_and_prints(ran):
    first, *others = [told["printed"] for told in ran.told]
    assert [json.loads(line)["steps"] for line in first.splitlines()] == [2, 2]
    assert set(others) == {""}
    assert not (ran.folder / ".command.replaced").exists()
    assert (ran.folder / "command" / "adapter_model.safetensors").is_file()


def test_data_that_fail_in_one_process_end_all_with_a_checkpoint(ran):
    """Rows are read by each process, a stream by the first; the next batch is asked for while a step runs."""
    other = "the data of another process failed, which says why."
    for rank, told in enumerate(ran.told):
        of_rows, of_stream = told["failed"]
        assert of_rows[0] == ("the disk is gone" if rank == 1 else other)
        assert of_stream[0] == ("the disk is gone" if rank == 0 else other)
        assert of_rows[1:] == of_stream[1:] == [2, ["checkpoint-2"]]


def test_a_reader_that_fails_ends_all_processes(ran):
    """What one process reads for all by another of its own."""
    first, *others = [told["reader"] for told in ran.told]
    assert first[0] == "OSError"
    assert {name for name, _ in others} == {"RuntimeError"}
    assert all("checkpoint-1" in left for _, left in (first, *others))


@pytest.mark.parametrize("estimator", SHARDED)
def test_a_split_model_learns_what_a_whole_one_does(ran, estimator):
    """Masks go by the position in the whole layer, so that each process has a part of the same."""
    whole, split = ran.logits(f"whole-{estimator}"), ran.logits(f"split-{estimator}")
    assert all(theta.any() for theta in whole.values())
    for key, theta in whole.items():
        torch.testing.assert_close(split[key], theta, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimator", SHARDED)
def test_a_split_model_is_saved_and_resumed(ran, estimator):
    split, rejoined = ran.logits(f"split-{estimator}"), ran.logits(f"rejoined-{estimator}")
    assert all(torch.equal(split[key], rejoined[key]) for key in split)
    model = PeftModel.from_pretrained(tiny_llama(intermediate_size=37), ran.folder / f"split-{estimator}")
    for key, layer in enumerate(masked_layers(model).values()):
        scaled = 2.0 * magnitude(layer) + split[str(key)]
        assert torch.equal(layer.learned_mask("default"), mode(scaled, 2))


def test_a_split_model_ends_with_its_best_mask(ran):
    model = PeftModel.from_pretrained(tiny_llama(intermediate_size=37), ran.folder / "best" / "checkpoint-2")
    for index, layer in enumerate(masked_layers(model).values()):
        theta = layer.maskpro_theta["default"]
        assert torch.equal(ran.logits("best")[str(index)], theta)
        assert not torch.equal(ran.logits("split-simple")[str(index)], theta)


def test_processes_with_different_starts_stop_before_the_checkpoint(ran):
    assert all(told["split"].startswith("after step 2 process 1 does not have the masks") for told in ran.told)
    assert not list((ran.folder / "parted").glob("checkpoint-*"))


def magnitude(layer) -> torch.Tensor:
    """The mask that the runs started from."""
    return mode(group_members(layer.get_base_layer().weight.detach().abs(), 4), 2).float()


def test_fsdp_on_cpus_is_refused(ran):
    assert all(told["refused"].startswith("accelerate ignores fsdp on CPUs") for told in ran.told)
