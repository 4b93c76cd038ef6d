"""What `test_sharded` runs in several processes at once, by torchrun: a model that FSDP splits between them."""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hf_maskpro import MaskProConfig, MaskProTrainer

from ..conftest import tiny_llama
from .test_trainer import arguments, rows


def trainer_of(folder: Path, estimator: str, fsdp: bool, **options) -> MaskProTrainer:
    model = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=2.0))
    options = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "logging_steps": 2} | options
    if estimator == "residual":
        options["baseline"] = "step"
    if fsdp:
        # accelerate splits models on GPUs alone; torch does on CPUs as well.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    args = arguments(folder, estimator, per_device_train_batch_size=2, **options)
    return MaskProTrainer(model, args, train_dataset=rows(64))


def logits_of(trainer):
    thetas = [theta.detach() for theta in trainer.adapter.thetas()]
    thetas = [theta.full_tensor() if isinstance(theta, DTensor) else theta for theta in thetas]
    return {str(i): theta.contiguous() for i, theta in enumerate(thetas)}


def main(folder: Path) -> None:
    for estimator in ("residual", "simple"):
        trainer = trainer_of(folder / estimator, estimator, True)
        trainer.train()
        assert isinstance(trainer.adapter.thetas()[0], DTensor)
        rank = trainer.args.process_index
        save_file(logits_of(trainer), folder / f"{estimator}-{rank}.safetensors")
        trainer.save_model()
        trainer = trainer_of(folder / estimator, estimator, True)
        trainer.train(resume_from_checkpoint=str(folder / estimator / "checkpoint-3"))
        save_file(logits_of(trainer), folder / f"resumed-{estimator}-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
