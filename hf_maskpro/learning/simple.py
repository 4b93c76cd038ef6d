"""`simple`: a backward pass through the exact marginals (SIMPLE, Ahmed et al., ICLR 2023)."""

from math import sqrt
from typing import Any

from transformers import TrainingArguments

from .estimator import Estimator


class Simple(Estimator):
    """
    The layers do all of it: in train mode they sample masks, and their backward sends gradient times weight through
    the exact marginals to the logits. What is its own are the settings of the optimizer.
    """

    @classmethod
    def defaults(cls, args: TrainingArguments) -> dict[str, Any]:
        # Of a run that is measured in epochs the number of steps is not known here.
        steps = args.max_steps if args.max_steps > 0 else 120
        rate = 0.2 * sqrt(120 / steps) if args.learning_rate is None else args.learning_rate
        decay = {"power": 1.0, "lr_end": rate / 10} if args.lr_scheduler_type is None else None
        return {
            "learning_rate": rate,
            "lr_scheduler_type": "polynomial",
            "lr_scheduler_kwargs": decay,
            # In a short run the rest of the schedule needs steps, too.
            "warmup_steps": args.max_steps // 5 if 0 < args.max_steps < 50 else 10,
            "adam_beta2": 0.98,
        }

    def metrics(self) -> dict[str, float]:
        return {"flipped": self.flipped_groups()}
