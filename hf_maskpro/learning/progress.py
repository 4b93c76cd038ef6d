"""The progress bar of a run."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class MaskProgress(ProgressCallback):
    """A `Trainer`'s bar, with the last loss and the share of groups that have changed at its end."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ):
        super().on_log(args, state, control, logs, **kwargs)
        if self.training_bar is not None and "changed" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}", changed=f"{logs['changed']:.2%}")
