"""What several verbs need: models, texts, output."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..deploy import new_folder
from ..evaluation import windows
from ..starts import initialize_masks, needs_data
from ..tuner import RULES, split_init_mask


console = Console()

Model = Annotated[str, typer.Option(help="Base model: a local folder or a Hub id.")]
GgufFile = Annotated[str | None, typer.Option(help="GGUF file in that folder, dequantized to bfloat16.")]
Text = Annotated[Path | None, typer.Option(help="Text file to learn from.")]
Dataset = Annotated[
    str | None, typer.Option(help="Dataset to learn from, streamed: a folder or Hub id, NAME or NAME:CONFIG.")
]
PatternN = Annotated[int, typer.Option("--n", help="Weights kept in every group.")]
PatternM = Annotated[int, typer.Option("--m", help="Size of a group.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter's repository.")]
Subfolder = Annotated[str | None, typer.Option(help="The adapter's folder in its repository.")]
StartToken = Annotated[
    bool, typer.Option(help="Begin every window with the start token, where the tokenizer adds one to a text.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Make conversations of the text's paragraphs, by the tokenizer's chat template.")
]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it is in use.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a failure into one line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError, SafetensorError) as error:
        # PEFT says of everything that goes wrong that it cannot find a file; why is in the cause.
        causes = [_line(error)] + ([_line(error.__cause__)] if isinstance(error.__cause__, OSError) else [])
        typer.echo(f"error: {': '.join(dict.fromkeys(causes))}", err=True)
        sys.exit(1)


def _line(error: BaseException) -> str:
    """The line of an error that tells most: of the Hub's it is what the server says, and not the number."""
    if isinstance(error, HfHubHTTPError) and error.server_message:
        return f"{error.server_message} ({error.response.url})"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def load_model(model: str, gguf_file: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model in its own dtype, on the GPU if there is one, and its tokenizer."""
    tokenizer = load_tokenizer(model, gguf_file)
    options: dict[str, Any] = {"dtype": "auto"}
    if gguf_file:
        options = {
            "dtype": torch.bfloat16,
            "gguf_file": gguf_file,
            "quantization_config": GgufConfig(dequantize=True),
        }
    path = Path(model)
    loaded = AutoModelForCausalLM.from_pretrained(str(path.resolve()) if path.is_dir() else model, **options)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_tokenizer(model: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """A base model's tokenizer; the first thing to ask for, since it tells soon whether there is such a model."""
    check_model(model, gguf_file)
    return AutoTokenizer.from_pretrained(model, **({"gguf_file": gguf_file} if gguf_file else {}))


def check_model(model: str, gguf_file: str | None) -> None:
    """Refuse what can be neither a model's folder nor a Hub id."""
    path = Path(model)
    if path.is_dir():
        if gguf_file and not (path / gguf_file).is_file():
            raise ValueError(f"{path / gguf_file} does not exist; name a GGUF file in the model's folder.")
        if not gguf_file and not (path / "config.json").is_file():
            raise ValueError(f"{model} has no config.json; pass a model's folder or a Hub id.")
    elif path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"{model} is not a model folder; pass a model's folder or a Hub id.")


@contextmanager
def checkpoint(model: str, gguf_file: str | None, output: Path) -> Iterator[str]:
    """A base model as a safetensors checkpoint; for a GGUF file that is a temporary folder beside the output."""
    check_model(model, gguf_file)
    if gguf_file is None:
        yield model
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".new-") as folder:
        loaded, tokenizer = load_model(model, gguf_file)
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del loaded
        yield folder


def adapter_folder(adapter: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of a mask adapter, fetched from the Hub if it is an id."""
    path = Path(adapter) / (subfolder or "")
    if not path.is_dir():
        if path.exists() or adapter.startswith((".", "/", "~")) or adapter.count("/") > 1:
            raise ValueError(f"{path} is not an adapter's folder; pass one, or a Hub id.")
        patterns = f"{subfolder}/*" if subfolder else "adapter_*"
        path = Path(snapshot_download(adapter, revision=revision, allow_patterns=patterns)) / (subfolder or "")
    if not (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{adapter} has no {subfolder or '.'}/adapter_config.json; pass a mask adapter's folder or id."
        )
    return path


def load_adapter(base: PreTrainedModel, folder: Path, is_trainable: bool = False) -> PeftModel:
    """An adapter over a base model."""
    return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)


def read_text(path: Path) -> str:
    """The whole of a text file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass a text file.")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{path} is empty; pass a file with text.")
    return text


def text_name(text: Path | None, dataset: str | None) -> str:
    """A text's name as an adapter records it: without the folders of the machine it was made on."""
    if text is not None:
        return text.name
    name, colon, config = str(dataset).partition(":")
    return Path(name).name + colon + config if Path(name).exists() else str(dataset)


def sources_of(method: str | None, text: Path | None, dataset: str | None) -> list[str | Path | None]:
    """What a starting mask is made from, besides the model: none of it may lie in the folder to write."""
    rule = split_init_mask(method)[0] if method is not None else None
    return [rule if rule not in RULES else None, text, (dataset or "").partition(":")[0]]


def learning_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    dataset: str | None,
    seq_len: int,
    tokens: int | None,
    start_token: bool,
    chat: bool,
) -> torch.Tensor:
    """Windows of the text or dataset that the user named, int64 `[windows, seq_len]`; at most `tokens` tokens."""
    if (text is None) == (dataset is None):
        raise ValueError("pass either --text FILE or --dataset NAME.")
    if text is not None:
        content = read_text(text)
    else:
        content = "\n\n".join(_documents(str(dataset), 10 * (tokens or 1_000_000)))
        if not content:
            raise ValueError(f"dataset {dataset} has no rows; pass one with text.")
    return windows(tokenizer, _as_chat(tokenizer, content) if chat else content, seq_len, tokens, start_token)


def _as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as conversations in the tokenizer's template: the model answers every other paragraph by the next."""
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; drop --chat.")
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    pairs = zip(paragraphs[::2], paragraphs[1::2], strict=False)
    conversations = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    return "".join(str(tokenizer.apply_chat_template(turns, tokenize=False)) for turns in conversations)


def _documents(dataset: str, characters: int) -> Iterator[str]:
    """Documents of a dataset's train split until there are so many characters."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("--dataset needs the datasets package: pip install 'hf-maskpro[datasets]'.") from error
    name, _, config = dataset.partition(":")
    rows = load_dataset(name, config or None, split="train", streaming=True)
    for row in rows:
        if "text" not in row:
            raise ValueError(f"dataset {dataset} has no column 'text', only {', '.join(row)}.")
        if not row["text"]:
            continue
        yield row["text"]
        characters -= len(row["text"])
        if characters <= 0:
            return


def calibrate(masked: PeftModel, batches: list[dict[str, torch.Tensor]], text: str, seed: int) -> None:
    """Fill the starting mask, and note in the adapter what it was calibrated on."""
    config = masked.peft_config["default"]
    initialize_masks(masked, batches)
    if needs_data(config.init_mask):
        config.start["calibration"] |= {"text": text, "seed": seed}


def write_adapter(masked: PeftModel, output: Path, overwrite: bool) -> None:
    """Write a one-shot mask, and say what it is."""
    with new_folder(output, overwrite) as folder:
        masked.save_pretrained(folder)
    config = masked.peft_config["default"]
    typer.echo(f"{output}: a {config.pattern} mask by {config.init_mask} over {config.target_weights:,} weights")


def init_mask(name: str) -> str:
    """A starting mask as the configuration takes it, where a folder has a slash in its name."""
    return f"./{name}" if name not in RULES and "/" not in name and Path(name).is_dir() else name


def show(figures: dict[str, Any], as_json: bool) -> None:
    """Print figures as a table of two columns, or as one JSON object."""
    if as_json:
        typer.echo(json.dumps(figures))
        return
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    console.print(table)
