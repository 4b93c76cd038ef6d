"""What `test_processes` runs in several processes at once, by torchrun."""

import json
import signal
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.cli import main as hf_maskpro
from hf_maskpro.learning.estimator import Estimator
from hf_maskpro.tuner import MaskProLayer

from ..conftest import tiny_llama
from .test_trainer import arguments, rows


RUNS = {
    "scaled": {"estimator": "residual", "max_steps": 50, "learning_rate": 0.5},
    "raw": {"estimator": "residual", "max_steps": 10, "advantage": "raw", "learning_rate": 5.0, "baseline": "step"},
    "bfloat16": {"estimator": "residual", "max_steps": 6, "learning_rate": 0.5},
    "simple": {"estimator": "simple", "max_steps": 50},
}
SHARDED = ("residual", "simple")


def trainer_of(name: str, folder: Path, **options) -> MaskProTrainer:
    """A trainer of a tiny model, with two examples in a forward pass."""
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    model = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=2.0, logits_dtype=dtype))
    args = arguments(folder, **RUNS[name] | {"per_device_train_batch_size": 2, "logging_steps": 5} | options)
    return MaskProTrainer(model, args, train_dataset=rows(64, ragged=True))


def logits_of(trainer: MaskProTrainer) -> dict[str, torch.Tensor]:
    found = [theta.detach() for theta in trainer.adapter.thetas()]
    whole = [theta.full_tensor() if isinstance(theta, DTensor) else theta for theta in found]
    return {str(i): theta.contiguous() for i, theta in enumerate(whole)}


def sharded(estimator: str, folder: Path, **options) -> MaskProTrainer:
    """A trainer of a model that FSDP splits between processes."""
    options |= {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "learning_rate": 1.0, "eval_steps": 2}
    args = arguments(folder, estimator, per_device_train_batch_size=2, baseline="step", **options)
    if args.fsdp:
        # accelerate splits models on GPUs alone; torch does on CPUs as well.
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # Of layers with 37 rows processes have unlike parts.
    model = tiny_llama(intermediate_size=37)
    model = get_peft_model(model, MaskProConfig(logit_scale=2.0, target_modules=["q_proj", "up_proj"]))
    return MaskProTrainer(model, args, train_dataset=rows(64), eval_dataset=rows(8))


def run_sharded(folder: Path, rank: int) -> str:
    """Runs of whole and of split models; returns how the last one stops, in which processes part."""
    for estimator in SHARDED:
        whole = sharded(estimator, folder / f"whole-{estimator}")
        # Of a split model the loss is its own, whose sums round otherwise, and residuals are small differences.
        with patch("hf_maskpro.learning.trainer.language_modeling_by_spans", return_value=None):
            whole.train()
        save_file(logits_of(whole), folder / f"whole-{estimator}-{rank}.safetensors")
        split = {"fsdp": True, "fsdp_config": {"version": 2}}
        trainer = sharded(estimator, folder / f"split-{estimator}", **split)
        trainer.train()
        trainer.save_model()
        save_file(logits_of(trainer), folder / f"split-{estimator}-{rank}.safetensors")
        trainer = sharded(estimator, folder / f"split-{estimator}", **split)
        trainer.train(resume_from_checkpoint=str(folder / f"split-{estimator}" / "checkpoint-2"))
        assert isinstance(trainer.adapter.thetas()[0], DTensor)
        save_file(logits_of(trainer), folder / f"rejoined-{estimator}-{rank}.safetensors")
    # The worst, which is the earlier one: there is something to go back to.
    best = {"eval_strategy": "steps", "load_best_model_at_end": True, "greater_is_better": True}
    trainer = sharded("simple", folder / "best", **split, **best)
    trainer.train()
    assert trainer.state.best_global_step == 2
    save_file(logits_of(trainer), folder / f"best-{rank}.safetensors")
    trainer = sharded("simple", folder / "parted", **split)
    trainer.add_callback(HasAnotherMask)
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    return "not at all"


class Traffic(TorchDispatchMode):
    """The bytes that this process gives to each collective operation."""

    def __init__(self):
        super().__init__()
        self.given: list[int] = []
        # Of these what goes into comparing the processes.
        self.hashes: list[int] = []

    def __enter__(self):
        self.check = Estimator.check_processes

        def check(estimator, step):
            before = len(self.given)
            self.check(estimator, step)
            self.hashes += self.given[before:]

        Estimator.check_processes = check
        return super().__enter__()

    def __exit__(self, *error):
        Estimator.check_processes = self.check
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            assert func.name() == "c10d::allgather_", func
            self.given += [tensor.nbytes for tensor in args[1]]
        return func(*args, **(kwargs or {}))


class Parts(TrainerCallback):
    """Moves a logit of one process alone."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            layer = next(layer for layer in model.modules() if isinstance(layer, MaskProLayer))
            layer.maskpro_theta["default"].data[0, 0, 0] += 1e-3


class HasAnotherMask(TrainerCallback):
    """One process has another starting mask."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            layer = next(layer for layer in model.modules() if isinstance(layer, MaskProLayer))
            layer.maskpro_mask["default"].copy_(layer.maskpro_mask["default"].flip(0))


class IsStopped(TrainerCallback):
    """Has one process alone be asked to stop, in the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            signal.raise_signal(signal.SIGTERM)


class IsStoppedAfterItsStep(TrainerCallback):
    """Has one process alone be asked to stop, when all have agreed to go on after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            signal.raise_signal(signal.SIGTERM)


class FailingRows(list):
    """Rows of which one process gets six."""

    def __getitem__(self, index):
        self.asked = vars(self).get("asked", 0) + 1
        if self.asked > 6 and PartialState().process_index == 1:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class FailingStream(torch.utils.data.IterableDataset):
    """Rows that one process reads for all, of each of which there are six."""

    def __iter__(self):
        yield from rows(6 * PartialState().num_processes)
        raise OSError("the disk is gone")


def run_failing(folder: Path) -> list:
    """How runs end whose data fail, after which step, and what is left then."""
    ends = []
    for dataset in (FailingRows(rows(64)), FailingStream()):
        run = folder / type(dataset).__name__
        trainer = trainer_of("scaled", run, max_steps=4, save_strategy="steps", save_steps=4, baseline="step")
        trainer.train_dataset = dataset
        try:
            trainer.train()
        except (OSError, RuntimeError) as error:
            ends.append([str(error), trainer.state.global_step, [path.name for path in run.glob("checkpoint-*")]])
    return ends


def run_command(folder: Path, model: str, text: str) -> str:
    """What the command prints in this process, where it learns twice into one folder."""
    printed = StringIO()
    for more in ([], ["--overwrite"]):
        sys.argv = ["hf-maskpro", "train", "--model", model, "--text", text, "--output", str(folder), "--json", *more]
        sys.argv += ["--init-mask", "magnitude", "--seq-len", "32", "--max-steps", "2", "--use-cpu"]
        with redirect_stdout(printed), suppress(SystemExit):
            hf_maskpro()
    return printed.getvalue()


def main(folder: Path, masks: int, model: str, text: str) -> None:
    options = {"gradient_accumulation_steps": masks}
    told = {}
    seeds, draw = [], MaskProLayer._seed
    MaskProLayer._seed = lambda self: (seeds.append(draw(self)), seeds[-1])[1]
    for name in RUNS:
        trainer = trainer_of(name, folder / name, masks_per_step=1 if name == "simple" else masks, **options)
        rank = trainer.args.process_index
        with Traffic() if name == "raw" else nullcontext() as traffic:
            trainer.train()
        if traffic:
            told |= {"bytes": traffic.given, "hashes": traffic.hashes}
        save_file(logits_of(trainer), folder / f"{name}-{rank}.safetensors")
    told["seeds"] = seeds[:10]

    run = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "masks_per_step": masks, **options}
    trainer = trainer_of("scaled", folder / "whole", **run)
    trainer.train()
    save_file(logits_of(trainer), folder / f"whole-{rank}.safetensors")
    told["stopped"] = []
    for asks in (IsStoppedAfterItsStep(), IsStopped()):
        trainer = trainer_of("scaled", folder / "stopped", **run)
        trainer.add_callback(asks)
        try:
            trainer.train(resume_from_checkpoint=bool(told["stopped"]))
        except SystemExit:
            told["stopped"].append(trainer.state.global_step)
    trainer = trainer_of("scaled", folder / "stopped", **run)
    trainer.train(resume_from_checkpoint=True)
    save_file(logits_of(trainer), folder / f"resumed-{rank}.safetensors")

    told["printed"] = run_command(folder / "command", model, text)
    told["failed"] = run_failing(folder)
    told["split"] = run_sharded(folder, rank)
    try:
        trainer_of("simple", folder, fsdp=True)
    except ValueError as error:
        told["refused"] = str(error)

    trainer = trainer_of("raw", folder, masks_per_step=masks, **options)
    trainer.add_callback(Parts())
    try:
        trainer.train()
    except RuntimeError as error:
        told["parted"] = f"{trainer.state.global_step} {error}"
    # The last: one process ends, and the other is to hear of it.
    trainer = trainer_of("raw", folder / "reader", dataloader_num_workers=1, save_strategy="steps", save_steps=1)
    trainer.train_dataset = FailingStream()
    try:
        trainer.train()
    except (OSError, RuntimeError) as error:
        told["reader"] = [type(error).__name__, [path.name for path in (folder / "reader").glob("checkpoint-*")]]
    (folder / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
