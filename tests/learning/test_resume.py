"""A run ends as if nothing had happened to it, or says why it cannot."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model
from transformers import LlamaForCausalLM, TrainerCallback

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.learning.checkpoints import UNFINISHED, discard, newest_checkpoint, place_checkpoint

from ..conftest import tiny_llama
from .test_trainer import arguments, rows, thetas


def killed(folder, kills, *runs):
    command = [sys.executable, "-W", "ignore", "-m", "tests.learning.killable", folder, kills, *runs]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.partition(":")[0] for line in done.stdout.splitlines() if "kills" in line] == list(runs)
    return done.stdout


def test_a_killed_run_ends_with_the_same_bits(tmp_path, checkpoint, text):
    killed(tmp_path, 2, "simple,short,2", f"hf-maskpro,{checkpoint},{text}")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["rows,2", "stream,1", "short,2"])
@pytest.mark.parametrize("estimator", ["simple", "residual", "maskllm", "proxsparse", "lean"])
def test_a_run_killed_at_twenty_moments_ends_with_the_same_bits(tmp_path, estimator, data):
    killed(tmp_path, 20, f"{estimator},{data.replace('2', '1') if estimator == 'lean' else data}")


@pytest.mark.slow
def test_the_command_killed_at_twenty_moments_ends_with_the_same_bits(tmp_path, checkpoint, text):
    killed(tmp_path, 20, f"hf-maskpro,{checkpoint},{text}")


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C interrupts, which is not so where a shell has started Python in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stops(MaskProTrainer):
    """Does something in the third step."""

    def training_step(self, *args):
        loss = super().training_step(*args)
        if self.state.global_step == 2:
            self.stop()
        return loss

    def stop(self):
        """Nothing yet."""


def learner(folder, dataset, base=tiny_llama, **options):
    torch.manual_seed(0)
    model = get_peft_model(base(), MaskProConfig(init_mask="random", logit_scale=2.0))
    options = {
        "max_steps": 5, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 4,
        "train_sampling_strategy": "sequential",
    } | options  # fmt: skip
    return Stops(model, arguments(folder, **{"estimator": "simple"} | options), train_dataset=dataset)


def checkpoints(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run learns that is let alone."""
    trainer = learner(tmp_path_factory.mktemp("alone"), rows(), save_strategy="no")
    trainer.train()
    assert any(theta.abs().max() > 0 for theta in thetas(trainer.model))
    return thetas(trainer.model)


def resumed(folder, dataset):
    """What is learned by the end of a run that goes on."""
    trainer = learner(folder, dataset)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    return thetas(trainer.model)


def same(mine, theirs):
    return all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_a_run_over_a_model_with_added_tokens_resumes(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")

    def resized():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(40, mean_resizing=False)
        return model

    added = [{name: ids.where(ids != 2, 38) for name, ids in row.items()} for row in rows()]
    whole = learner(tmp_path / "run", added, resized)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    again = learner(tmp_path / "run", added, resized)
    again.train(resume_from_checkpoint=True)
    assert any(theta.any() for theta in thetas(again.model))
    assert same(thetas(again.model), thetas(whole.model))


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, alone, number, error):
    """Also where the processes that read the data get it, and SIGTERM twice, as from a scheduler and from torchrun."""

    def stop():
        readers = [str(child.pid) for child in multiprocessing.active_children()]
        for _ in range(2 if number == signal.SIGTERM else 1):
            subprocess.run(["kill", f"-{number:d}", *readers], check=True)
            signal.raise_signal(number)

    before = signal.getsignal(number)
    trainer = learner(tmp_path, rows(), dataloader_num_workers=1)
    trainer.stop = stop
    with pytest.raises(error) as ended:
        trainer.train()
    assert ended.type is KeyboardInterrupt or ended.value.code == 143
    assert signal.getsignal(number) is before
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    assert same(resumed(tmp_path, rows()), alone)


def test_a_second_interruption_ends_it_at_once(tmp_path):
    trainer = learner(tmp_path, rows(), save_steps=1)
    trainer.stop = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_without_checkpoints_a_signal_ends_it_at_once(tmp_path):
    trainer = learner(tmp_path, rows(), save_strategy="no")
    trainer.stop = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert checkpoints(tmp_path) == []


class InterruptedAtTheEnd(TrainerCallback):
    """Ctrl-C while a run finishes."""

    def on_train_end(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    trainer = learner(tmp_path, rows())
    trainer.add_callback(InterruptedAtTheEnd)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-5"]


class Stream(torch.utils.data.IterableDataset):
    """Rows that fail at one of them, or come to be looked at and once more."""

    def __init__(self, fails_at=None, once=False):
        self.fails_at, self.once, self.passes = fails_at, once, 0

    def __iter__(self):
        self.passes += 1
        for i, row in enumerate(rows() if not self.once or self.passes <= 2 else []):
            if i == self.fails_at:
                raise OSError("the connection was reset")
            yield row


def test_data_that_fail_leave_a_checkpoint_of_the_last_step(tmp_path, alone):
    with pytest.raises(OSError, match="the connection was reset"):
        learner(tmp_path, Stream(fails_at=14)).train()
    # The next batch is asked for while a step runs, so the third is not begun.
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert same(resumed(tmp_path, Stream()), alone)


def test_data_that_fail_before_the_first_step_leave_nothing(tmp_path):
    with pytest.raises(OSError, match="the connection was reset"):
        learner(tmp_path, Stream(fails_at=2)).train()
    assert checkpoints(tmp_path) == []


def test_a_stream_that_ends_too_soon_leaves_a_checkpoint(tmp_path):
    stream = Stream(once=True)
    with pytest.warns(UserWarning, match="the data ended after step 8 of max_steps=40"):
        assert learner(tmp_path, stream, max_steps=40, save_steps=30).train().global_step == 8
    assert checkpoints(tmp_path) == ["checkpoint-8"]


class HasFewEpochs(TrainerCallback):
    """Fails where a run would never end."""

    def __init__(self):
        self.epochs = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs += 1
        assert self.epochs < 3


def test_a_finished_run_over_a_stream_ends_when_it_is_resumed(tmp_path):
    learner(tmp_path, Stream(), max_steps=2).train()
    trainer = learner(tmp_path, Stream(), max_steps=2)
    trainer.add_callback(HasFewEpochs)
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
    # A run whose state is another's would begin again, or go on elsewhere.
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    without = {name: value for name, value in state.items() if name != "global_step"}
    for wrong in (without, state | {"global_step": 1}, state | {"global_step": "2"}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"has the global_step .*resume from an earlier"):
            trainer.train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize("to_disk", [False, True])
def test_offloaded_logits_are_refused(tmp_path, to_disk):
    trainer = learner(tmp_path, rows())
    disk_offload(trainer.model, tmp_path / "offloaded") if to_disk else cpu_offload(trainer.model)
    with pytest.raises(ValueError, match=r"has logits that are offloaded.*; load the model without device_map"):
        MaskProTrainer(trainer.model, trainer.args, train_dataset=rows())


@pytest.mark.parametrize("estimator", ["simple", "residual"])
def test_a_model_that_is_spread_over_devices_learns_what_a_whole_one_does(tmp_path, estimator):
    """By the hooks that `device_map` brings; of devices there is only one here."""

    def spread():
        names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
        return dispatch_model(tiny_llama(), dict.fromkeys(names, "cpu"), force_hooks=True)

    learned = []
    for make in (tiny_llama, spread):
        trainer = learner(tmp_path / make.__name__, rows(), make, estimator=estimator, save_strategy="no")
        hooked = [module for module in trainer.model.modules() if "_hf_hook" in vars(module)]
        assert bool(hooked) == (make is spread)
        trainer.train()
        learned.append(thetas(trainer.model))
    assert any(theta.any() for theta in learned[0])
    assert same(*learned)


def test_a_checkpoint_that_lacks_a_file_is_passed_over(tmp_path, alone):
    learner(tmp_path, rows(), save_steps=2).train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    for step in (5, 4):
        (tmp_path / f"checkpoint-{step}" / "scheduler.pt").unlink()
    assert same(resumed(tmp_path, rows()), alone)
    for step in (5, 4, 2):
        (tmp_path / f"checkpoint-{step}" / "scheduler.pt").unlink()
    trainer = learner(tmp_path, rows())
    with pytest.raises(ValueError, match="has no whole checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "files.json").unlink()
    with pytest.raises(ValueError, match=r"has no files.json, .*; start a new run, or in Python"):
        trainer.train(resume_from_checkpoint=True)


def placed(run, step, content):
    written = run / UNFINISHED / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "logits").write_text(content)
    place_checkpoint(written, run / written.name)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    placed(tmp_path, 1, "whole")
    placed(tmp_path, 2, "whole")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "logits").write_text("who")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-2" / "files.json").write_text("[" * 10**5)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_run_is_not_resumed_from_what_another_left_in_its_folder(tmp_path):
    placed(tmp_path, 9, "another's")
    placed(tmp_path, 2, "mine")
    placed(tmp_path, 3, "mine")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-9" / "logits").read_text() == "another's"
    # Nor is one that goes on from an earlier step than the last.
    placed(tmp_path, 2, "again")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_what_a_checkpoint_replaces_goes_when_its_place_is_on_the_disk(tmp_path, monkeypatch):
    placed(tmp_path, 1, "old")
    seen, names = [], ("checkpoint-1", f"{UNFINISHED}/replaced/checkpoint-1")

    def fsync(descriptor):
        if os.path.sameopenfile(descriptor, folder):
            seen.append([(tmp_path / name / "logits").read_text() for name in names])

    folder = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(os, "fsync", fsync)
    placed(tmp_path, 1, "new")
    os.close(folder)
    assert seen == [["new", "old"]]


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_a_checkpoint_whose_successor_is_not_placed_is_put_back(tmp_path, monkeypatch, error):
    placed(tmp_path, 1, "old")

    def rename(self, target):
        if self.parent.name == UNFINISHED:
            raise error
        return rename_path(self, target)

    rename_path = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)):
        placed(tmp_path, 1, "new")
    # What the next run does, if nobody could do it then.
    discard(tmp_path / UNFINISHED)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "logits").read_text() == "old"


def test_the_bar_shows_loss_and_changed_groups(tmp_path, capsys):
    learner(tmp_path, rows(), disable_tqdm=False, logging_steps=1, save_strategy="no").train()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "5/5" in last
    assert "changed=" in last
    assert "loss=" in last


@pytest.mark.parametrize(
    ("where", "package"), [("tensorboard", "tensorboardX"), pytest.param("trackio", "trackio", marks=pytest.mark.slow)]
)
def test_what_is_logged_goes_where_it_is_reported_to(tmp_path, monkeypatch, where, package):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip(package)
    learner(tmp_path, rows(), report_to=[where], logging_steps=1, save_strategy="no").train()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"train/loss" in written
    assert b"train/changed" in written
