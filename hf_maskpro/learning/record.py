"""What stays of a run beside the mask: its settings in the adapter, its plot, its card."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..tuner import MaskProConfig
from ..tuner.card import CARD_FILE, card_for_repository, load_card, save_card
from ..tuner.files import private_folder
from .objectives import objective_weights


def objective_name(args: TrainingArguments) -> str:
    """What a run minimises, in words."""
    weights = objective_weights(args.objective)
    softened = "distillation" in weights and args.distillation_temperature != 1
    temperature = f" at temperature {args.distillation_temperature:g}" if softened else ""
    return " + ".join(f"{w:g} {name}" if len(weights) > 1 else name for name, w in weights.items()) + temperature


def record_training(
    config: MaskProConfig, args: TrainingArguments, batch: int, steps: int, settings: dict[str, Any]
) -> None:
    """Note in an adapter how its mask is learned, by so many sequences a batch, its estimator's own settings last."""
    # The text is known to who began the run.
    known = config.start.get("training", {})
    config.start["training"] = {name: known[name] for name in ("text", "seq_len") if name in known} | {
        "estimator": args.estimator,
        "objective": objective_name(args),
        "steps": steps,
        "sequences_per_step": batch * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "schedule": SchedulerType(args.lr_scheduler_type).value,
        "warmup_steps": args.warmup_steps,
        "logit_scale": config.logit_scale,
        "seed": args.seed,
        **settings,
    }


def card_path(folder: str, adapter_name: str) -> Path:
    """Where PEFT saves an adapter, and so its card: all but `"default"` in a folder of their own."""
    return Path(folder) / ("" if adapter_name == "default" else adapter_name) / CARD_FILE


def add_to_card(
    path: Path,
    args: TrainingArguments,
    repo_id: str | None,
    tags: str | list[str] | None = None,
    **metadata: str | list[str] | None,
) -> None:
    """Add tags and other metadata to the card that saving the adapter wrote."""
    card = load_card(path)
    for name, value in metadata.items():
        if value is not None:
            card.data[name] = value
    more = [tags] if isinstance(tags, str) else tags or []
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *more]))
    if repo_id is not None:
        name = path.relative_to(args.output_dir).as_posix()
        card = card_for_repository(card, HfApi(token=args.hub_token), repo_id, name, args.hub_revision)
    save_card(card, path)


def plot_run(state: TrainerState, path: Path) -> None:
    """Plot the loss in training, and the share of groups whose mode has left the start, against steps."""
    from matplotlib.figure import Figure

    logs = [entry for entry in state.log_history if "loss" in entry]
    if not logs:
        return
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in logs]
    axes.plot(steps, [entry["loss"] for entry in logs])
    axes.set(xlabel="step", ylabel="training loss")
    changed = axes.twinx()
    changed.plot(steps, [100 * entry["changed"] for entry in logs], color="tab:orange")
    changed.set(ylabel="groups changed, %")
    with private_folder(path.parent) as folder:
        figure.savefig(folder / path.name, dpi=120)
