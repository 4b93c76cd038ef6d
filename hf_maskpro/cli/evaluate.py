"""The verb that measures."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .inputs import (
    adapter_folder,
    check_datasets,
    check_extra,
    check_model,
    check_no_place,
    check_on_hub,
    check_texts,
)
from .options import EVALUATION, FILES, TEXT, Dtype, GgufFile, Json, Revision, StartToken, Subfolder
from .output import console, short_names, show


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
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Text file to measure perplexity on; repeat it for several.", rich_help_panel=TEXT
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Dataset to measure perplexity on, its test split: NAME or NAME:CONFIG; repeat it for several.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text file of the kind that the mask was learned from: the others are elsewhere.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER", help="Mask adapter: a local folder or a Hub id.", rich_help_panel=FILES),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure several models, side by side.", rich_help_panel=EVALUATION)
    ] = False,
    seq_len: Annotated[
        int, typer.Option(min=2, metavar="N", help="Length of a window, in tokens.", rich_help_panel=TEXT)
    ] = 512,
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
        typer.Option(min=2, metavar="N", help="Use no more of a text than this, in tokens.", rich_help_panel=TEXT),
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
        typer.Option(
            min=1,
            metavar="N",
            help="Sequences per forward pass: 1 window, 8 of a task unless given.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    record: Annotated[
        bool, typer.Option("--record", help="Put the results into the adapter's card.", rich_help_panel=FILES)
    ] = False,
    dtype: Dtype = "auto",
    gguf_file: GgufFile = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Measure perplexity on texts, of a mask also against the dense model, and accuracy on tasks."""
    paths = [*(text or []), *([home] if home is not None else [])]
    if not paths and not dataset and tasks is None:
        raise ValueError("nothing to measure: pass --text FILE, --dataset NAME or --tasks NAMES.")
    if home in (text or []):
        raise ValueError(f"{home} is both --home and --text; a text at home is not elsewhere, so name it once.")
    if record and (compare or adapter is None or not Path(adapter).is_dir()):
        raise ValueError("--record writes into an adapter's folder: pass one with --adapter, and no --compare.")
    if limit is not None and tasks is None:
        raise ValueError(f"--limit is {limit}, of the examples of a task; pass --tasks, or drop it.")
    # Those that are compared may be adapters.
    if adapter is None and not compare:
        check_no_place(revision, subfolder)
    if stride is not None and stride >= seq_len:
        raise ValueError(f"--stride is {stride}, outside 1 to --seq-len - 1 = {seq_len - 1}; lower it.")
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(f"--max-tokens is {max_tokens}, less than one window of --seq-len, {seq_len}; raise it.")
    check_texts(paths)
    check_datasets(dataset or [])
    if tasks is not None:
        check_extra("lm_eval", "--tasks", "eval")
    if compare:
        if len(sources or []) < 2 or adapter is not None:
            raise ValueError("--compare takes two or more checkpoints or adapters, and no --adapter.")
    elif sources:
        raise ValueError(f"{sources[0]} is one too many: pass --model {sources[0]}, or --compare to compare several.")
    elif model is None:
        raise ValueError("no model to measure: pass --model, or --compare with several.")
    if model is not None:
        check_model(model, gguf_file)
    if adapter is not None:
        adapter_folder(adapter, revision, subfolder)
    from .. import evaluation
    from ..tuner import saved_config
    from .common import load_adapter, load_config, load_to_run, load_tokenizer, read_by_others, read_sources

    texts = read_sources(paths, dataset, max_tokens or float("inf"), split="test")
    names = tasks.split(",") if tasks is not None else []
    if names:
        found, manager = evaluation.find_tasks(names)
        # Of tasks whose data cannot be had, nothing is measured before.
        with read_by_others(str(tasks)):
            manager.load_task_or_group(found)

    def measure(base: str, mask: str | None) -> dict[str, Any]:
        file = gguf_file if base == model else None
        tokenizer = load_tokenizer(base, file)
        # Too short a text, or too long a window, is found out before the model is loaded.
        if texts:
            evaluation.check_length(load_config(base, file), seq_len)
        protocols = {
            path: f"{path}, {evaluation.protocol(tokenizer, content, seq_len, max_tokens, stride, start_token)}"
            for path, content in texts.items()
        }
        loaded, _ = load_to_run(base, file, dtype)
        if mask is not None:
            loaded = load_adapter(loaded, adapter_folder(mask, revision, subfolder))
        figures: dict[str, Any] = {"model": base, "adapter": mask}
        how = (seq_len, max_tokens, True, stride, batch_size or 1, start_token)
        # Side by side, the dense model is one of those that are compared.
        if mask is not None and not compare:
            figures |= evaluation.against_dense(
                loaded, tokenizer, texts, str(home) if home is not None else None, *how
            )
        else:
            figures["texts"] = {
                path: {"perplexity": evaluation.perplexity(loaded, tokenizer, content, *how)}
                for path, content in texts.items()
            }
        for path, how_measured in protocols.items():
            figures["texts"][path]["protocol"] = how_measured
        if len(texts) == 1:
            # Nobody said that it is elsewhere.
            figures.pop("elsewhere", None)
        if names:
            figures["tasks"] = evaluation.task_scores(loaded, tokenizer, names, batch_size or 8, limit)
            if limit is not None:
                figures["limit"] = limit
        return figures

    pairs = _compared(sources or [], model, subfolder) if compare else [(str(model), adapter)]
    # A wrong adapter is not found out after the others were measured.
    for _, mask in pairs:
        if mask is not None:
            saved_config(adapter_folder(mask, revision, subfolder))
    results = [measure(*pair) for pair in pairs]
    if record:
        _record(Path(str(adapter)) / (subfolder or ""), home, results[0])
    if compare:
        rows = [_lifted(each) for each in results]
        if not as_json:
            _show_side_by_side(sources or [], [_flat(row) for row in rows])
        return {"models": rows}
    figures = _lifted(results[0])
    if as_json:
        return figures
    if measured := figures.pop("texts", {}):
        _show_side_by_side(list(short_names(list(measured)).values()), list(measured.values()))
    show(_flat(figures))
    return figures


def _record(folder: Path, home: Path | None, figures: dict[str, Any]) -> None:
    """Put perplexities, what they are at home and elsewhere, and accuracies into an adapter's card."""
    from .. import hub

    shown = short_names(list(figures["texts"]))
    protocols = {path: each["protocol"].removeprefix(f"{path}, ") for path, each in figures["texts"].items()}
    for path, measured in figures["texts"].items():
        hub.record_evaluation(folder, shown[path], "perplexity", measured["perplexity"], protocols[path])
    at_home = [path for path in protocols if path == str(home)]
    for kind, paths in ("at_home", at_home), ("elsewhere", [path for path in protocols if path not in at_home]):
        if kind in figures:
            names = ", ".join(shown[path] for path in paths)
            protocol = "; ".join(dict.fromkeys(protocols[path] for path in paths))
            hub.record_evaluation(folder, names, f"times dense, {kind.replace('_', ' ')}", figures[kind], protocol)
    protocol = "lm-evaluation-harness" + (f", {figures['limit']} examples" if "limit" in figures else "")
    for task, scores in figures.get("tasks", {}).items():
        for metric, value in scores.items():
            if "_stderr" not in metric:
                hub.record_evaluation(folder, Path(task).stem, metric, value, protocol)


def _compared(sources: list[str], model: str | None, subfolder: str | None) -> list[tuple[str, str | None]]:
    """Base model and adapter of everything that --compare names."""
    from transformers.utils import find_adapter_config_file

    pairs: list[tuple[str, str | None]] = []
    for source in sources:
        if not Path(source).is_dir():
            check_on_hub(source, "config.json", "a folder")
        if not any(find_adapter_config_file(source, subfolder=place) for place in {"", subfolder or ""}):
            pairs.append((source, None))
        elif model is None:
            raise ValueError(f"{source} is an adapter; pass its base model with --model.")
        else:
            pairs.append((model, source))
    return pairs


def _lifted(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures in which those of a single text stand by themselves."""
    if len(figures["texts"]) > 1:
        return figures
    measured: dict[str, Any] = next(iter(figures["texts"].values()), {})
    return {name: value for name, value in figures.items() if name != "texts"} | measured


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as the rows of a table, where tasks have no standard errors."""
    texts = figures.get("texts", {})
    texts = {
        f"{shown} {name}": value
        for path, shown in short_names(list(texts)).items()
        for name, value in texts[path].items()
    }
    scores = {
        f"{task} {metric}": value
        for task, metrics in figures.get("tasks", {}).items()
        for metric, value in metrics.items()
        if "_stderr" not in metric
    }
    return {name: value for name, value in figures.items() if name not in ("texts", "tasks")} | texts | scores


def _show_side_by_side(columns: list[str], figures: list[dict[str, Any]]) -> None:
    table = Table(*(Column(name, overflow="fold") for name in ("", *columns)))
    for name, value in figures[0].items():
        if isinstance(value, (int, float)):
            table.add_row(name, *(f"{each[name]:,.4g}" for each in figures))
    console.print(table)
    for protocol in dict.fromkeys(v for each in figures for name, v in each.items() if name.endswith("protocol")):
        console.print(f"Perplexity: {protocol}.")
