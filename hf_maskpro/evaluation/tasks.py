"""Scores on tasks of lm-evaluation-harness."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from ..tuner import evaluating


ZERO_SHOT = ("hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def task_scores(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """
    Scores on tasks of lm-evaluation-harness (the `eval` extra).

    Args:
        model (`torch.nn.Module`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`list[str]`): Names of tasks, paths of the harness's task files (YAML), or `"zero-shot"` for the seven
            of the pruning papers: HellaSwag, RACE, PIQA, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA.
        batch_size (`int`, defaults to 8): Sequences per forward pass.
        limit (`int`, *optional*): Use no more examples of a task than this.

    Returns:
        `dict[str, dict[str, float]]`: The harness's metrics by task; for `"zero-shot"` also the mean of the seven
            accuracies, under that name.

    Raises:
        `ImportError`: if the extra is not installed.
        `ValueError`: if there is no such task, or a task file is no YAML.
    """
    names, manager = find_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(model):
        harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = simple_evaluate(harness, tasks=names, limit=limit, task_manager=manager)["results"]
    scores = {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results.items()
    }
    if "zero-shot" in tasks:
        scores["zero-shot"] = {"acc": sum(scores[task]["acc"] for task in ZERO_SHOT) / len(ZERO_SHOT)}
    return scores


def find_tasks(tasks: list[str]) -> tuple[list[str], Any]:
    """
    What [`task_scores`] would run; the first thing to ask for, since it tells soon what is missing.

    Args:
        tasks (`list[str]`): As for [`task_scores`].

    Returns:
        `tuple[list[str], lm_eval.tasks.TaskManager]`: Names and paths with `"zero-shot"` spelt out, and the harness's
            index of its tasks.

    Raises:
        `ImportError`: if the extra is not installed.
        `ValueError`: if there is no such task, or a task file is no YAML.
    """
    manager = _task_manager()
    names = [name for task in tasks for name in (ZERO_SHOT if task == "zero-shot" else (task,))]
    for name in names:
        if name in manager.all_tasks:
            continue
        if not Path(name).is_file():
            raise ValueError(f"{name} is neither a task of lm-evaluation-harness nor a task file.")
        try:
            yaml.compose(Path(name).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{name} is no YAML file: {' '.join(str(error).split())}.") from error
    return names, manager


@cache
def _task_manager() -> Any:
    """The harness's index of its tasks, which takes seconds to make."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks need lm-evaluation-harness: pip install 'hf-maskpro[eval]'.") from error
    return TaskManager()
