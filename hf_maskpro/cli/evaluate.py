"""The verb that measures."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .options import EVALUATION, FILES, TEXT, GgufFile, Json, Revision, StartToken, Subfolder
from .output import console, show


def evaluate(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DIR]...", help="With --compare: checkpoints, and mask adapters over --model."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Base model: a local folder or a Hub id.", rich_help_panel=FILES),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file to measure perplexity on.", rich_help_panel=TEXT)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER", help="Mask adapter: a local folder or a Hub id.", rich_help_panel=FILES),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Measure several models, side by side.")] = False,
    seq_len: Annotated[
        int, typer.Option(min=2, metavar="N", help="Length of a window, in tokens.", rich_help_panel=TEXT)
    ] = 2048,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens from one window to the next: windows do not overlap unless given.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Use no more of the text than this, in tokens.", rich_help_panel=TEXT),
    ] = None,
    start_token: StartToken = True,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness or task files, separated by commas; zero-shot: seven of them.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Use no more examples of a task than this.", rich_help_panel=EVALUATION),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Sequences per forward pass: 1 window, 8 of a task unless given."),
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    record: Annotated[bool, typer.Option("--record", help="Put the results into the adapter's card.")] = False,
    gguf_file: GgufFile = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, and accuracy on tasks."""
    if text is None and tasks is None:
        raise ValueError("nothing to measure: pass --text FILE or --tasks NAMES.")
    if record and (compare or adapter is None or not Path(adapter).is_dir()):
        raise ValueError("--record writes into an adapter's folder: pass one with --adapter, and no --compare.")
    from .. import evaluation
    from ..tuner import saved_config
    from .common import adapter_folder, load_adapter, load_model, read_text

    content = read_text(text) if text is not None else None
    names = tasks.split(",") if tasks is not None else []
    if names:
        evaluation.find_tasks(names)

    def measure(base: str, mask: str | None) -> dict[str, Any]:
        loaded, tokenizer = load_model(base, gguf_file if base == model else None)
        if mask is not None:
            loaded = load_adapter(loaded, adapter_folder(mask, revision, subfolder))
        figures: dict[str, Any] = {"model": base, "adapter": mask}
        if content is not None:
            protocol = evaluation.protocol(tokenizer, content, seq_len, max_tokens, stride, start_token)
            perplexity = evaluation.perplexity(
                loaded, tokenizer, content, seq_len, max_tokens, True, stride, batch_size or 1, start_token
            )
            figures |= {"perplexity": perplexity, "protocol": f"{text}, {protocol}"}
        if names:
            figures["tasks"] = evaluation.task_scores(loaded, tokenizer, names, batch_size or 8, limit)
            if limit is not None:
                figures["limit"] = limit
        return figures

    if compare:
        pairs = _compared(sources or [], model, adapter)
    elif sources:
        raise ValueError(f"{sources[0]} is one too many: pass --model {sources[0]}, or --compare to compare several.")
    elif model is None:
        raise ValueError("no model to measure: pass --model, or --compare with several.")
    else:
        pairs = [(model, adapter)]
    # A wrong adapter is not found out after the others were measured.
    for _, mask in pairs:
        if mask is not None:
            saved_config(adapter_folder(mask, revision, subfolder))
    results = [measure(*pair) for pair in pairs]
    if record:
        _record(Path(str(adapter)) / (subfolder or ""), text, results[0])
    if compare:
        _show_side_by_side(sources or [], results, as_json)
    else:
        show(results[0] if as_json else _flat(results[0]), as_json)


def _record(folder: Path, text: Path | None, figures: dict[str, Any]) -> None:
    """Put perplexity and accuracies into an adapter's card."""
    from .. import hub

    if text is not None:
        protocol = figures["protocol"].removeprefix(f"{text}, ")
        hub.record_evaluation(folder, text.name, "perplexity", figures["perplexity"], protocol)
    protocol = "lm-evaluation-harness" + (f", {figures['limit']} examples" if "limit" in figures else "")
    for task, scores in figures.get("tasks", {}).items():
        for metric, value in scores.items():
            if "_stderr" not in metric:
                hub.record_evaluation(folder, Path(task).stem, metric, value, protocol)


def _compared(sources: list[str], model: str | None, adapter: str | None) -> list[tuple[str, str | None]]:
    """Base model and adapter of everything that --compare names."""
    from transformers.utils import find_adapter_config_file

    from .common import check_on_hub

    if len(sources) < 2 or adapter is not None:
        raise ValueError("--compare takes two or more checkpoints or adapters, and no --adapter.")
    pairs: list[tuple[str, str | None]] = []
    for source in sources:
        if not Path(source).is_dir():
            check_on_hub(source, "config.json", "a folder")
        if not find_adapter_config_file(source):
            pairs.append((source, None))
        elif model is None:
            raise ValueError(f"{source} is an adapter; pass its base model with --model.")
        else:
            pairs.append((model, source))
    return pairs


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as the rows of a table, where tasks have no standard errors."""
    scores = {
        f"{task} {metric}": value
        for task, metrics in figures.get("tasks", {}).items()
        for metric, value in metrics.items()
        if "_stderr" not in metric
    }
    return {name: value for name, value in figures.items() if name != "tasks"} | scores


def _show_side_by_side(sources: list[str], figures: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures))
        return
    rows = [_flat(each) for each in figures]
    table = Table("", *(Column(source, overflow="fold") for source in sources))
    for name in rows[0]:
        if name not in ("model", "adapter", "protocol"):
            table.add_row(name, *(f"{row[name]:,.4g}" for row in rows))
    console.print(table)
    for protocol in dict.fromkeys(row["protocol"] for row in rows if "protocol" in row):
        console.print(f"Perplexity: {protocol}.")
