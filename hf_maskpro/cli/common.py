"""What several verbs need once they run: models, texts, adapters."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import typer
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

# Importing it lets PEFT save adapters whole.
from .. import hub  # noqa: F401
from ..deploy import new_folder
from ..evaluation import windows
from ..learning.dataset import dataset_by_name
from ..starts import initialize_masks, needs_data, random_windows
from ..starts.calibration import in_batches
from ..subset.native import multiplies_in
from ..tuner import RULES, split_init_mask
from ..tuner.experts import expert_parameters
from .inputs import check_model, read_text
from .options import did_you_mean
from .output import say_next, short_names
from .verb import line_of


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
    with read_by_others(model):
        loaded = AutoModelForCausalLM.from_pretrained(str(path.resolve()) if path.is_dir() else model, **options)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_to_run(
    model: str, gguf_file: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """[`load_model`], but in float32 where it is to run on a CPU that has no instructions for its own dtype."""
    loaded, tokenizer = load_model(model, gguf_file, dtype)
    # What is quantized keeps what its kernels take.
    is_plain = not getattr(loaded, "is_quantized", False)
    if dtype == "auto" and loaded.device.type == "cpu" and is_plain and not multiplies_in(loaded.dtype):
        warnings.warn(f"this CPU has no instructions for {loaded.dtype}; the model runs in float32", stacklevel=1)
        loaded = loaded.float()
    return loaded, tokenizer


def load_tokenizer(model: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """A base model's tokenizer; the first thing to ask for, since it tells soon whether there is such a model."""
    check_model(model, gguf_file)
    with read_by_others(model):
        return AutoTokenizer.from_pretrained(model, **({"gguf_file": gguf_file} if gguf_file else {}))


def load_config(model: str, gguf_file: str | None = None) -> PreTrainedConfig:
    """A base model's configuration, which tells what does not go with the model before that is loaded."""
    with read_by_others(model):
        return AutoConfig.from_pretrained(model, **({"gguf_file": gguf_file} if gguf_file else {}))


@contextmanager
def read_by_others(name: str) -> Iterator[None]:
    """Whatever is wrong in what the user names is no bug, though what reads it may fail as if it were one."""
    try:
        yield
    # Those say themselves what could not be read.
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name} cannot be read: {reason:.300}") from error


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


def load_adapter(
    base: PreTrainedModel, folder: Path, is_trainable: bool = False, config: PeftConfig | None = None
) -> PeftModel:
    """An adapter over a base model; `config` if it is not to be that of the folder."""
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable, config=config)
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error


def check_layers(base: PreTrainedModel, targets: list[str] | str | None, excluded: list[str] | str | None) -> None:
    """Refuse layers that a model has not. PEFT takes some of a list that are there, and only warns of the latter."""
    names = [name for name, _ in base.named_modules()]
    names += [f"{name}.{key}" for name, module in base.named_modules() for key in expert_parameters(module)]
    for option, whole in ("--target-modules", targets), ("--exclude-modules", excluded):
        for given in [whole] if isinstance(whole, str) else whole or []:
            # As PEFT reads them.
            pattern = given if isinstance(whole, str) else rf"(?:.*\.)?{re.escape(given)}"
            if given != "all-linear" and not any(re.fullmatch(pattern, name) for name in names):
                raise ValueError(
                    f"{option} {given} matches no layer of {base.name_or_path}; give ends of names, or a regular "
                    "expression of whole ones." + did_you_mean(given, {name.rpartition(".")[2] for name in names})
                )


def read_sources(
    texts: list[Path] | None, datasets: list[str] | None, tokens: float, split: str = "train"
) -> dict[str, str]:
    """
    What all texts hold, and of a split of each dataset what so many tokens are made of, by the names that the user
    gave. The first thing to ask for, since it tells soon what is empty or cannot be read.
    """
    given = [*map(str, texts or []), *(datasets or [])]
    if twice := [name for name in given if given.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice; name it once.")
    contents = {str(path): read_text(path) for path in texts or []}
    for dataset in datasets or []:
        content = "\n\n".join(_documents(dataset, split, 10 * tokens))
        if not content.strip():
            raise ValueError(f"dataset {dataset} has no text; pass one with text.")
        contents[dataset] = content
    return contents


def mixture_name(names: list[str], weights: list[float] | None) -> str:
    """The names of texts as an adapter records them: without the folders of the machine it was made on."""
    folders = {source: source.partition(":")[0] for source in names}
    ends = short_names([folder for folder in folders.values() if Path(folder).exists()])
    shown = [ends.get(folder, folder) + source.removeprefix(folder) for source, folder in folders.items()]
    if weights is not None:
        shown = [f"{name} (weight {weight:g})" for name, weight in zip(shown, weights, strict=True)]
    return ", ".join(shown)


def sources_of(method: str | None, texts: list[Path] | None, datasets: list[str] | None) -> list[str | Path | None]:
    """What a starting mask is made from, besides the model: none of it may lie in the folder to write."""
    rule = split_init_mask(method)[0] if method is not None else None
    folders = [dataset.partition(":")[0] for dataset in datasets or []]
    return [rule if rule not in RULES else None, *(texts or []), *folders]


def windows_of_each(
    tokenizer: PreTrainedTokenizerBase,
    contents: dict[str, str],
    seq_len: int,
    max_tokens: int | None,
    start_token: bool,
    chat: bool,
) -> list[torch.Tensor]:
    """The windows of each source, int64 `[windows, seq_len]`."""
    pieces = []
    for name, content in contents.items():
        content = _as_chat(tokenizer, content) if chat else content
        try:
            pieces.append(windows(tokenizer, content, seq_len, max_tokens, start_token))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return pieces


def calibration_batches(
    inputs: torch.Tensor, in_order: bool, samples: int, seq_len: int, seed: int, start_token: int | None
) -> list[dict[str, torch.Tensor]]:
    """Batches to calibrate on, from windows that the user's text was cut into."""
    if in_order:
        return random_windows(inputs, samples, seq_len, seed, start_token)
    # What lies across two windows of a mixture is no text.
    return in_batches(inputs[:samples, :seq_len])


def _as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as conversations in the tokenizer's template: the model answers every other paragraph by the next."""
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; drop --chat.")
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    pairs = zip(paragraphs[::2], paragraphs[1::2], strict=False)
    conversations = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    return "".join(str(tokenizer.apply_chat_template(turns, tokenize=False)) for turns in conversations)


def _documents(dataset: str, split: str, characters: float) -> Iterator[str]:
    """Documents of a dataset's split until there are so many characters."""
    bar = tqdm(total=characters, desc=f"reading {dataset}", unit=" characters", unit_scale=True)
    # A bar that TQDM_DISABLE turns off does not count.
    known = 0
    try:
        for row in dataset_by_name(dataset, split):
            if "text" not in row:
                raise ValueError(f"it has no column 'text', only {', '.join(row)}.")
            # Empty ones count: joined, they are the blank lines of the text.
            if row["text"] is None:
                continue
            if not isinstance(row["text"], str):
                raise ValueError(f"its column 'text' holds a {type(row['text']).__name__}, not a text.")
            yield row["text"]
            known += len(row["text"])
            bar.update(len(row["text"]))
            if known >= characters:
                return
    except StopIteration:
        # What an empty file ends in.
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset {dataset} cannot be read: {line_of(error)}") from error
    finally:
        bar.close()


def calibrate(
    masked: PeftModel,
    batches: list[dict[str, torch.Tensor]],
    text: str,
    seed: int,
    start_token: int | None,
    chat: bool = False,
) -> None:
    """Fill the starting mask, and note in the adapter what it was calibrated on."""
    config = masked.peft_config["default"]
    initialize_masks(masked, batches)
    if needs_data(config.init_mask):
        config.start["calibration"] |= {
            "text": text,
            "seed": seed,
            "start_token": start_token is not None,
            "chat": chat,
        }


def write_adapter(
    masked: PeftModel, output: Path, overwrite: bool, model: str, gguf_file: str | None, as_json: bool
) -> dict[str, Any]:
    """Write a one-shot mask and give its figures; unless these are printed, say what it is and what comes next."""
    with new_folder(output, overwrite) as folder:
        masked.save_pretrained(folder)
    config = masked.peft_config["default"]
    if not as_json:
        typer.echo(f"{output}: a {config.pattern} mask by {config.init_mask} over {config.target_weights:,} weights")
        given = ["--model", model, *(["--gguf-file", gguf_file] if gguf_file else [])]
        say_next("train", *given, "--adapter", str(output), "--text", "FILE", "--output", f"{output}-learned")
    figures = {"output": str(output), "pattern": config.pattern, "init_mask": config.init_mask}
    return figures | {"target_weights": config.target_weights}
