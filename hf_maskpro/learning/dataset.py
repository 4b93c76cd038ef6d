"""What a trainer is given to learn from, as rows that the model's forward takes."""

from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import has_length

from ..starts import start_token_of
from ..starts.batches import forward_arguments
from ..starts.calibration import begin_windows
from ..starts.text import check_length, tokens_after_start


# Tokenised at once: a text each would be slow, and the first step of a stream waits for them all.
ROWS_AT_ONCE = 100
# A mistake in what makes the rows shows in a few of them.
ROWS_LOOKED_AT = 8


def dataset_by_name(name: str, split: str = "train") -> Any:
    """
    A dataset from a folder or the Hub, streamed.

    Args:
        name (`str`): A folder or Hub id, NAME or NAME:CONFIG.
        split (`str`, defaults to `"train"`): Which part of it.

    Raises:
        `ConnectionError`: if it is no folder, and the Hub cannot be reached.
        `ImportError`: if datasets is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"dataset {name} needs the datasets package: pip install 'hf-maskpro[datasets]'.") from error
    folder, _, config = name.partition(":")
    try:
        return load_dataset(folder, config or None, split=split, streaming=True)
    except ConnectionError as error:
        raise ConnectionError(f"{folder} is not a folder here, and the Hub cannot be reached: {error}") from error


class TextWindows(IterableDataset):
    """
    A dataset's rows of text, one after the other, in windows that are filled to the last token; what is left over at
    the end is not used. It is read and tokenised as it is gone through.

    Args:
        dataset (`Iterable[dict]`): The rows.
        column (`str`): `"text"`, texts that a blank line is put between, or `"messages"`, conversations that the
            tokenizer's chat template is applied to.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer. Every window begins with its start token, where it adds
            one to a text.
        max_length (`int`): Length of a window, in tokens.
        model (`nn.Module`): The model, which is to know the tokens.

    Raises:
        `ValueError`: if the rows fill no window, their text is none, or has tokens that the model does not know.
    """

    def __init__(
        self, dataset: Any, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int, model: nn.Module
    ):
        self.dataset, self.column, self.tokenizer, self.max_length = dataset, column, tokenizer, max_length
        self.base_config = _config_of(model)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the rows as a trainer would have it in an epoch, if they are shuffled."""
        _set_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        start_id = start_token_of(self.tokenizer)
        length = self.max_length - (start_id is not None)
        worker = get_worker_info()
        rows = iter(self.dataset)
        # A stream of shards shares them out among workers. Of anything else each reads all, and takes its share.
        if worker is not None and not hasattr(self.dataset, "num_shards"):
            rows = islice(rows, worker.id, None, worker.num_workers)
        left = torch.empty(0, dtype=torch.int64)
        is_first, filled = True, False
        while some := list(islice(rows, ROWS_AT_ONCE)):
            known = tokens_after_start(self.tokenizer, self._text(some), start_id, is_first)
            is_first = False
            ids = torch.cat([left, torch.tensor(known, dtype=torch.int64)])
            if self.base_config is not None:
                check_tokens(self.base_config, ids)
            whole = len(ids) // length * length
            for window in begin_windows(ids[:whole].view(-1, length), start_id):
                filled = True
                yield {"input_ids": window, "labels": window}
            left = ids[whole:]
        if not filled and worker is None:
            raise ValueError(
                f"the dataset has {len(left)} tokens, fewer than one window of {self.max_length}; lower max_length."
            )

    def _text(self, rows: list[dict[str, Any]]) -> str:
        if self.column == "messages":
            return "".join(str(self.tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in rows)
        texts = [row["text"] for row in rows if row["text"]]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"the dataset's column 'text' holds a {type(wrong[0]).__name__}, not a text.")
        return "".join(f"{text}\n\n" for text in texts)


class Repeated(IterableDataset):
    """
    A stream without an end: when the dataset is through it is begun again, so that a place in it is a number of rows.
    One that gives nothing the next time ends.

    Args:
        dataset (`torch.utils.data.IterableDataset`): The rows.
        ends_on_error (`bool`):
            End where the dataset fails, and keep the `error`: other processes wait for what this one reads, and would
            wait for ever. What a worker reads fails all the same.
    """

    def __init__(self, dataset: IterableDataset, ends_on_error: bool = False):
        self.dataset, self.ends_on_error = dataset, ends_on_error
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._rows()
        except Exception as error:
            if not self.ends_on_error or get_worker_info() is not None:
                raise
            self.error = error

    def _rows(self) -> Iterator[Any]:
        for epoch in count():
            _set_epoch(self.dataset, epoch)
            is_empty = True
            for row in self.dataset:
                is_empty = False
                yield row
            if is_empty:
                return


def _set_epoch(dataset: Any, epoch: int) -> None:
    # As a trainer does, for those that shuffle.
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


def _config_of(model: nn.Module) -> PreTrainedConfig | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.config if isinstance(base, PreTrainedModel) else None


def _has_labels(row: Mapping[str, Any]) -> bool:
    if "labels" not in row:
        return True
    labels = torch.as_tensor(row["labels"]).flatten()
    # One label a token: the first is no token's next one. A class, or another sequence, counts from the first on.
    is_text = len(labels) == torch.as_tensor(row["input_ids"]).numel()
    return bool((labels[is_text:] != -100).any())


def check_rows(dataset: Any, model: nn.Module) -> None:
    """
    Look at the first rows of a dataset, which hold tokens, and where they have no labels at the others too.

    Raises:
        `ValueError`: if they have nothing to learn from, or tokens that the model does not know.
    """
    found = [torch.as_tensor(row["input_ids"]).flatten() for row in islice(dataset, ROWS_LOOKED_AT)]
    if all(len(ids) < 2 for ids in found):
        raise ValueError("the dataset's rows have fewer than 2 tokens, of which none is predicted; pass longer ones.")
    # Not every dataset says by itself where it ends.
    if not any(map(_has_labels, islice(dataset, len(dataset)))):
        raise ValueError(
            "all labels of the dataset's rows are -100, so there is nothing to learn from; look at what masks them."
        )
    if (config := _config_of(model)) is not None:
        check_tokens(config, torch.cat(found))


def check_predicts_text(model: nn.Module) -> None:
    """
    Raises:
        `ValueError`: if a window of text as its own labels is nothing to learn from: an encoder-decoder would copy it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, PreTrainedModel) and (base.config.is_encoder_decoder or not base.can_generate()):
        raise ValueError(
            f"{type(base).__name__} does not predict a text's next token, so text alone does not say what it is to "
            "learn; pass rows with labels, or a data_collator that makes them."
        )


def check_tokens(config: PreTrainedConfig, ids: torch.Tensor) -> None:
    """
    Raises:
        `ValueError`: if tokens are not of the model's vocabulary.
    """
    size = config.get_text_config().vocab_size
    if wrong := ids[(ids < 0) | (ids >= size)].tolist():
        raise ValueError(
            f"the data have the token {wrong[0]}, and the model a vocabulary of {size:,}; tokenise with its tokenizer."
        )


def rows_of(dataset: Any, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> Any:
    """
    A dataset as a trainer takes it: the windows of its text, all at once unless it is a stream, or itself if it has
    what the model's forward takes. Of several, by name, each.

    Raises:
        `ValueError`: if it has neither, no rows, nothing to learn in the first ones, or nobody can tokenise its text.
    """
    if isinstance(dataset, dict):
        rows = {name: rows_of(each, model, tokenizer, max_length) for name, each in dataset.items()}
        return dataset if all(rows[name] is dataset[name] for name in dataset) else rows
    # What can be gone through only once would lose the row that is looked at.
    if dataset is None or isinstance(dataset, Iterator):
        return dataset
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("the dataset has no rows; there is nothing to learn from.")
    # What else rows may be is for a collator to know.
    if not isinstance(row, Mapping):
        return dataset
    if (forward_arguments(model).keys() - {"labels"}) & row.keys():
        # A stream may not be there again, and its first row may be an odd one.
        if "input_ids" in row and has_length(dataset):
            check_rows(dataset, model)
        return dataset
    column = "messages" if "messages" in row else "text"
    if column not in row:
        raise ValueError(
            f"the dataset has the columns {', '.join(row)}; it needs one of text, messages and input_ids."
        )
    if tokenizer is None:
        raise ValueError(f"the dataset's column {column!r} has to be tokenised; pass processing_class=tokenizer.")
    if column == "messages" and tokenizer.chat_template is None:
        raise ValueError("the dataset has messages, and the tokenizer no chat template; pass a column 'text' instead.")
    check_length(model.config, max_length, "lower max_length")
    windows = TextWindows(dataset, column, tokenizer, max_length, model)
    return list(windows) if has_length(dataset) else windows
