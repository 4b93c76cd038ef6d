"""What several verbs need once they run: models, texts, adapters."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import typer
from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

# Importing it lets PEFT save adapters whole.
from .. import hub  # noqa: F401
from ..deploy import new_folder
from ..evaluation import windows
from ..starts import initialize_masks, needs_data
from ..tuner import RULES, split_init_mask
from .output import say_next


# Of reading weights; a download still has its own.
logging.disable_progress_bar()


def load_model(
    model: str, gguf_file: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model in its own dtype unless told otherwise, on the GPU if there is one, and its tokenizer."""
    tokenizer = load_tokenizer(model, gguf_file)
    options: dict[str, Any] = {"dtype": dtype}
    if gguf_file:
        options = {
            "dtype": "bfloat16" if dtype == "auto" else dtype,
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
    """Refuse what is neither a model's folder nor a repository on the Hub."""
    path = Path(model)
    if not path.is_dir():
        check_on_hub(model, "config.json", "a model's folder")
    elif gguf_file and not (path / gguf_file).is_file():
        raise ValueError(f"{path / gguf_file} does not exist; name a GGUF file in the model's folder.")
    elif not gguf_file and not (path / "config.json").is_file():
        raise ValueError(f"{model} has no config.json; pass a model's folder or a Hub id.")


def check_on_hub(name: str, file: str, wanted: str, revision: str | None = None) -> None:
    """
    Refuse a name that is no repository on the Hub. Asked for a file that is not there, transformers and PEFT would ask
    again and again, and in the end say neither that it is no folder.

    Args:
        name (`str`): What the user wrote, which is no folder.
        file (`str`): A file that such repositories have.
        wanted (`str`): What it should have been.
        revision (`str`, *optional*): Branch, tag or commit.
    """
    if Path(name).exists():
        raise ValueError(f"{name} is a file; pass {wanted} or a Hub id.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name} does not exist; pass {wanted} or a Hub id.")
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision))
    except EntryNotFoundError:
        # It may hold something else, which those who read it know better.
        return
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{name} is neither a folder here nor a repository on the Hub that you may read.") from error
    except HfHubHTTPError:
        raise
    # By whatever the network fails, of which every library below has its own names.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is not a folder here, and the Hub cannot be reached: {reason}") from error


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
        if Path(adapter).is_dir():
            raise ValueError(f"{path} does not exist; pass --subfolder with a folder of {adapter}.")
        check_on_hub(adapter, "adapter_config.json", "an adapter's folder", revision)
        patterns = f"{subfolder}/*" if subfolder else "adapter_*"
        path = Path(snapshot_download(adapter, revision=revision, allow_patterns=patterns)) / (subfolder or "")
    if not (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{adapter} has no {subfolder or '.'}/adapter_config.json; pass a mask adapter's folder or id."
        )
    return path


def load_adapter(
    base: PreTrainedModel, folder: Path, is_trainable: bool = False, config: PeftConfig | None = None
) -> PeftModel:
    """An adapter over a base model; `config` if it is not to be that of the folder."""
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable, config=config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


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


def write_adapter(
    masked: PeftModel, output: Path, overwrite: bool, model: str, gguf_file: str | None, as_json: bool
) -> None:
    """Write a one-shot mask, and say what it is and what comes next."""
    with new_folder(output, overwrite) as folder:
        masked.save_pretrained(folder)
    config = masked.peft_config["default"]
    if as_json:
        figures = {"output": str(output), "pattern": config.pattern, "init_mask": config.init_mask}
        typer.echo(json.dumps(figures | {"target_weights": config.target_weights}))
        return
    typer.echo(f"{output}: a {config.pattern} mask by {config.init_mask} over {config.target_weights:,} weights")
    given = ["--model", model, *(["--gguf-file", gguf_file] if gguf_file else [])]
    say_next("train", *given, "--adapter", str(output), "--text", "FILE", "--output", f"{output}-learned")


def init_mask(name: str) -> str:
    """A starting mask as the configuration takes it, where a folder has a slash in its name; its source is there."""
    name = f"./{name}" if name not in RULES and "/" not in name and Path(name).is_dir() else name
    source = split_init_mask(name)[0]
    if source not in RULES and not Path(source).exists():
        if source.endswith((".npz", ".safetensors")):
            raise ValueError(f"{source} does not exist; pass a folder, a .npz or .safetensors file, or a Hub id.")
        check_on_hub(source, "config.json", "a folder, a .npz or .safetensors file")
    return name


def modules_of(names: str | None) -> list[str] | str | None:
    """Layers as the configuration takes them: ends of names, or a regular expression, which has other signs."""
    return names.split(",") if names is not None and re.fullmatch(r"[\w.,]+", names) else names
