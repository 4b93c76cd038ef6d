"""Training on text: what a dataset's rows become."""

from itertools import islice

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    T5ForConditionalGeneration,
)

from hf_maskpro import MaskProConfig, MaskProTrainer, sparsify
from hf_maskpro.evaluation import windows
from hf_maskpro.learning.dataset import Repeated, TextWindows
from hf_maskpro.tuner import masked_layers

from ..conftest import VOCABULARY, tiny_gpt2, tiny_llama
from .test_trainer import arguments, rows


TEXTS = [" ".join(VOCABULARY[(3 * i + j) % 32] for j in range(5 + i % 7)) for i in range(150)]
CHAT = "{% for turn in messages %}<pad> {{ turn.role }} {{ turn.content }} {% endfor %}"


def trainer(
    folder, dataset, model=tiny_llama, data_collator=None, eval_dataset=None, processing_class=None, **options
):
    masked = get_peft_model(model(), MaskProConfig())
    args = arguments(
        folder, "simple", **{"max_steps": 3, "per_device_train_batch_size": 4, "max_length": 16} | options
    )
    return MaskProTrainer(
        masked, args, train_dataset=dataset, eval_dataset=eval_dataset, processing_class=processing_class,
        data_collator=data_collator,
    )  # fmt: skip


def as_rows(kind, **columns):
    """The same rows, as each kind of dataset."""
    dataset = Dataset.from_dict(columns)
    return {"list": dataset.to_list(), "dataset": dataset, "stream": dataset.to_iterable_dataset()}[kind]


@pytest.fixture(params=["list", "dataset", "stream"])
def kind(request):
    return request.param


@pytest.fixture(params=["checkpoint", "starting_checkpoint"])
def tokenizer(request):
    """One that adds no start token to a text, and one that does."""
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def test_text_becomes_the_windows_that_it_is_evaluated_in(tmp_path, kind, tokenizer):
    ids = range(len(TEXTS))
    learner = trainer(tmp_path, as_rows(kind, text=TEXTS, id=ids), processing_class=tokenizer, max_length=12)
    got = list(learner.train_dataset)
    assert torch.stack([row["input_ids"] for row in got]).equal(windows(tokenizer, "\n\n".join(TEXTS), 12))
    assert all(row["labels"].equal(row["input_ids"]) for row in got)
    assert learner.train().global_step == 3


def test_conversations_go_through_the_chat_template(tmp_path, kind, tokenizer):
    tokenizer.chat_template = CHAT
    turns = [[{"role": "w1", "content": text}, {"role": "w2", "content": "w3 w4"}] for text in TEXTS]
    learner = trainer(tmp_path, as_rows(kind, messages=turns), processing_class=tokenizer)
    text = "".join(f"<pad> w1 {text} <pad> w2 w3 w4 " for text in TEXTS)
    got = torch.stack([row["input_ids"] for row in learner.train_dataset])
    # A start token that the template writes is there once, also where the tokenizer adds one.
    assert got.equal(windows(tokenizer, text, 16))
    assert learner.train().global_step == 3


def test_a_stream_is_read_no_further_than_it_is_trained_on(tmp_path, checkpoint):
    def endless():
        while True:
            yield {"text": TEXTS[0]}

    stream = IterableDataset.from_generator(endless)
    learner = trainer(tmp_path, stream, processing_class=AutoTokenizer.from_pretrained(checkpoint))
    assert learner.train().global_step == 3


def test_a_tokenizer_without_a_padding_token_will_do(tmp_path, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = None
    dataset = as_rows("list", text=TEXTS)
    learner = trainer(tmp_path, dataset, eval_dataset=dataset, processing_class=tokenizer)
    learner.train()
    assert learner.evaluate()["eval_loss"] > 0


def test_evaluation_takes_text_too(tmp_path, kind, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    one = as_rows(kind, text=TEXTS)
    whole = trainer(tmp_path, None, eval_dataset=one, processing_class=tokenizer).evaluate()["eval_loss"]
    several = {"text": one, "ids": rows()}
    metrics = trainer(tmp_path, None, eval_dataset=several, processing_class=tokenizer).evaluate()
    assert metrics["eval_text_loss"] == pytest.approx(whole)
    assert metrics["eval_ids_loss"] != pytest.approx(whole)


def test_rows_of_input_ids_are_left_alone(tmp_path, kind, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = [row["input_ids"].tolist() for row in rows()]
    dataset = as_rows(kind, input_ids=ids, labels=ids, text=["w1"] * len(ids))
    learner = trainer(tmp_path, dataset, processing_class=tokenizer)
    assert learner.train_dataset is dataset
    assert isinstance(learner.data_collator, DataCollatorWithPadding)


def test_a_collator_of_ones_own_is_given_the_rows(tmp_path, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def collate(some):
        ids = torch.tensor([tokenizer(row["text"]).input_ids[:5] for row in some])
        return {"input_ids": ids, "labels": ids}

    dataset = as_rows("list", text=TEXTS)
    learner = trainer(tmp_path, dataset, data_collator=collate, remove_unused_columns=False)
    assert learner.train_dataset is dataset
    assert learner.train().global_step == 3


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"question": TEXTS, "answer": TEXTS}, {}, "the columns question, answer; it needs one of text, messages and"),
        ({"labels": [1], "idx": [1]}, {}, "the columns labels, idx; it needs"),
        ({"text": [TEXTS]}, {}, "the dataset's column 'text' holds a list, not a text"),
        ({"text": TEXTS}, {"processing_class": None}, "'text' has to be tokenised; pass processing_class=tokenizer"),
        ({"messages": [[]]}, {}, "no chat template"),
        ({"text": ["w1 w2", "", "w3"]}, {}, "has 3 tokens, fewer than one window of 16; lower max_length"),
        ({"text": TEXTS}, {"max_length": 128, "model": tiny_gpt2}, "the model's 64 positions; lower max_length"),
        ({"text": TEXTS}, {"max_length": 1}, "max_length is 1; a window needs at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, checkpoint, kind, columns, options, message):
    options = {"processing_class": AutoTokenizer.from_pretrained(checkpoint)} | options
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, as_rows(kind, **columns), **options).train()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "the dataset has no rows"),
        ([{"input_ids": [3]}, {"input_ids": [4]}], "rows have fewer than 2 tokens"),
        ([{"input_ids": [3, 40]}], "the token 40, and the model a vocabulary of 34; tokenise with its tokenizer"),
        ([{"input_ids": [3, 4], "labels": [3, -100]}] * 9, "all labels of the dataset's rows are -100"),
    ],
)
def test_rows_that_teach_nothing_are_refused_in_one_line(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, dataset)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("cls", [T5ForConditionalGeneration, LlamaForSequenceClassification])
def test_text_alone_is_nothing_to_learn_from_where_no_next_token_is_predicted(tmp_path, checkpoint, cls):
    sizes = {"vocab_size": 34, "hidden_size": 16, "d_model": 16, "intermediate_size": 32, "d_ff": 32, "d_kv": 8}
    layers = {"num_hidden_layers": 1, "num_layers": 1, "num_attention_heads": 2, "num_heads": 2, "pad_token_id": 0}
    config = cls.config_class(**sizes, **layers)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=f"{cls.__name__} does not predict a text's next token"):
        trainer(tmp_path, [{"text": text} for text in TEXTS], lambda: cls(config), processing_class=tokenizer)
    if cls is LlamaForSequenceClassification:
        # A mask that is not learned only looks at it.
        masked = sparsify(cls(config), tokenizer, [{"text": " ".join(TEXTS)}], "wanda", max_length=16)
        assert all(layer.learned_mask("default").any() for layer in masked_layers(masked).values())


def test_rows_without_labels_may_come_first(tmp_path):
    some = [{"input_ids": [3, 4], "labels": [3, -100]}] * 9 + [{"input_ids": [3, 4], "labels": [3, 4]}]
    assert trainer(tmp_path, some).train_dataset is some


@pytest.mark.parametrize("labels", [0, [4], [3, -100, -100, -100]])
def test_labels_that_are_not_of_the_same_text_count_from_the_first_on(tmp_path, labels):
    some = [{"input_ids": [3, 4, 5], "labels": labels}] * 9
    assert trainer(tmp_path, some).train_dataset is some


def test_text_of_another_models_tokenizer_is_refused(tmp_path, kind, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens("w99")
    with pytest.raises(ValueError, match=f"the token {len(tokenizer) - 1}, and the model a vocabulary of 34"):
        trainer(tmp_path, as_rows(kind, text=["w1 w99"] * 50), processing_class=tokenizer).train()


class Documents:
    """Rows that come one after the other, and are no dataset."""

    def __iter__(self):
        return iter(as_rows("list", text=TEXTS))


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_workers_read_all_of_a_text_together(checkpoint, shards):
    dataset = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=shards) if shards else Documents()
    read = TextWindows(dataset, "text", AutoTokenizer.from_pretrained(checkpoint), 4, tiny_llama())
    alone, shared = (sum(1 for _ in DataLoader(read, batch_size=None, num_workers=n)) for n in (0, 2))
    # Each worker may leave less than a window.
    assert alone - 2 <= shared <= alone


def test_a_stream_of_text_is_shuffled_anew_when_it_is_begun_again(checkpoint):
    stream = as_rows("stream", text=TEXTS).shuffle(seed=0, buffer_size=200)
    rows = Repeated(TextWindows(stream, "text", AutoTokenizer.from_pretrained(checkpoint), 16, tiny_llama()))
    count = len(list(rows.dataset))
    ids = torch.stack([row["input_ids"] for row in islice(rows, 2 * count)])
    assert not ids[:count].equal(ids[count:])
