"""The verbs that make, measure, merge and look into adapters."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from huggingface_hub import snapshot_download
from peft import get_peft_model
from safetensors import safe_open

from .. import deploy, evaluation
from ..subset import unpack_codes
from ..subset.codec import word_layout
from ..tuner import MaskProConfig
from .common import (
    Dataset,
    GgufFile,
    Json,
    Model,
    Output,
    Overwrite,
    Text,
    calibrate,
    learning_windows,
    load_adapter,
    load_model,
    read_text,
    show,
)


def init(
    model: Model,
    output: Output,
    method: Annotated[Literal["magnitude", "random", "wanda"], typer.Option(help="The one-shot rule.")] = "wanda",
    text: Text = None,
    dataset: Dataset = None,
    n: Annotated[int, typer.Option(help="Weights kept in every group.")] = 2,
    m: Annotated[int, typer.Option(help="Size of a group.")] = 4,
    seq_len: Annotated[int, typer.Option(min=2, help="Length of a calibration window, in tokens.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration windows.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the random mask and of the choice of windows.")] = 42,
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a one-shot mask as an adapter."""
    config = MaskProConfig(n=n, m=m, init_mask=method)
    deploy.check_free(output, overwrite)
    if text is not None:
        read_text(text)
    base, tokenizer = load_model(model, gguf_file)
    torch.manual_seed(seed)
    inputs = learning_windows(tokenizer, text, dataset, seq_len, None) if method == "wanda" else None
    masked = get_peft_model(base, config)
    if inputs is not None:
        calibrate(masked, inputs, samples, seed)
    with deploy.new_folder(output, overwrite) as folder:
        masked.save_pretrained(folder)
    typer.echo(f"{output}: a {config.pattern} {method} mask over {config.target_weights:,} weights")


def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Text file to measure perplexity on.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Mask adapter: a local folder or a Hub id.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Length of a window, in tokens.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Use no more of the text than this, in tokens.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = None,
    gguf_file: GgufFile = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, and accuracy on tasks."""
    if text is None and tasks is None:
        raise ValueError("nothing to measure: pass --text FILE or --tasks NAMES.")
    content = read_text(text) if text is not None else None
    loaded, tokenizer = load_model(model, gguf_file)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    figures: dict[str, Any] = {"model": model, "adapter": adapter}
    if content is not None:
        count = evaluation.windows(tokenizer, content, seq_len, max_tokens).numel()
        figures |= {
            "perplexity": evaluation.perplexity(loaded, tokenizer, content, seq_len, max_tokens, progress=True),
            "protocol": f"{text}, non-overlapping windows of {seq_len} tokens, {count} tokens",
        }
    if tasks is not None:
        figures |= evaluation.task_scores(loaded, tokenizer, tasks.split(","))
    show(figures, as_json)


def merge(
    model: Model,
    adapter: Annotated[str, typer.Option(help="Mask adapter: a local folder or a Hub id.")],
    output: Output,
    gguf_file: GgufFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an ordinary sparse checkpoint, checked."""
    deploy.check_free(output, overwrite)
    base, tokenizer = load_model(model, gguf_file)
    masked = load_adapter(base, adapter)
    pattern = masked.peft_config["default"].pattern
    report = deploy.merge(masked, tokenizer, output, overwrite)
    zeros = sum(report.values()) / len(report)
    show({"output": str(output), "pattern": pattern, "layers": len(report), "zeros": zeros}, as_json)


def inspect(
    source: Annotated[str, typer.Argument(help="An adapter or a checkpoint: a local folder or a Hub id.")],
    n: Annotated[int, typer.Option(help="Pattern to check a checkpoint for: weights kept.")] = 2,
    m: Annotated[int, typer.Option(help="Pattern to check a checkpoint for: size of a group.")] = 4,
    as_json: Json = False,
) -> None:
    """Show what an adapter or checkpoint holds."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ValueError(f"{source} is not a folder; pass an adapter's or checkpoint's folder or a Hub id.")
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    if (folder / "adapter_config.json").is_file():
        show(_inspect_adapter(folder), as_json)
    elif (folder / "config.json").is_file():
        show(_inspect_checkpoint(folder, n, m), as_json)
    else:
        raise ValueError(f"{source} holds neither adapter_config.json nor config.json.")


def _inspect_checkpoint(folder: Path, n: int, m: int) -> dict[str, Any]:
    try:
        report = deploy.check_sparsity(folder, n, m)
    except ValueError as error:
        return {"kind": "checkpoint", "pattern": None, "why": str(error)}
    zeros = sum(report.values()) / len(report)
    return {"kind": "checkpoint", "pattern": f"{n}:{m}", "layers": len(report), "zeros": zeros}


def _inspect_adapter(folder: Path) -> dict[str, Any]:
    raw = json.loads((folder / "adapter_config.json").read_text())
    if raw.get("peft_type") != "MASKPRO":
        raise ValueError(f"{folder} is a {raw.get('peft_type')} adapter, not a mask adapter.")
    config = MaskProConfig.from_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    digits, size = word_layout(config.n, config.m)
    masked = []
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, the handle is no dict
            if name.endswith(".maskpro_mask"):
                packed = tensors.get_tensor(name)
                try:
                    unpack_codes(packed, config.n, config.m, packed.shape[-1] // size * digits * config.m)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                masked.append(name.removeprefix("base_model.model.").removesuffix(".maskpro_mask"))
    lineage = config.lineage or []
    if lineage and (missing := sorted(set(lineage[-1]["groups_changed"]) - set(masked))):
        raise ValueError(f"the adapter file has no mask for {missing[0]}.")
    changed = [sum(stage["groups_changed"].values()) / len(stage["groups_changed"]) for stage in lineage]
    return {
        "kind": "mask adapter",
        "pattern": config.pattern,
        "base_model": config.base_model_name_or_path,
        "layers": len(masked),
        "target_weights": config.target_weights,
        "file_bytes": file.stat().st_size,
        "bits_per_weight": 8 * file.stat().st_size / config.target_weights if config.target_weights else None,
        "holds_logits": config.save_logits,
        "started_from": [stage["init_mask"] for stage in lineage],
        "groups_changed": changed,
    }
