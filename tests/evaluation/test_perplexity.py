import json
import math
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import MaskProConfig, perplexity
from hf_maskpro.evaluation import ZERO_SHOT, find_tasks, mixed_windows, protocol, task_scores, tasks, windows
from hf_maskpro.starts import start_token_of

from ..conftest import tiny_gpt2, tiny_llama


TEXT = " ".join(f"w{(i * i) % 32}" for i in range(50))


@pytest.fixture
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def starting(starting_checkpoint):
    return AutoTokenizer.from_pretrained(starting_checkpoint)


def reference(model, tokenizer, text, seq_len, stride=None, head=()):
    """The definition, token by token: each has as its context what its window has before it, from its head on."""
    ids = tokenizer(text, add_special_tokens=not head).input_ids
    length = seq_len - len(head)
    losses = []
    for t in range(len(ids) if stride else len(ids) // length * length):
        start = stride * max(0, math.ceil((t + 1 - length) / stride)) if stride else t // length * length
        context = [*head, *ids[start:t]]
        if context:
            with torch.no_grad():
                last = model(input_ids=torch.tensor([context])).logits[0, -1]
            losses.append(-last.double().log_softmax(-1)[ids[t]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("stride", [None, 1, 5, 8, 15])
@pytest.mark.parametrize("tokens", [16, 40, 50])
def test_perplexity_equals_its_definition(tokenizer, stride, tokens):
    model, text = tiny_llama(), " ".join(TEXT.split()[:tokens])
    expected = reference(model, tokenizer, text, 16, stride)
    assert perplexity(model, tokenizer, text, seq_len=16, stride=stride) == pytest.approx(expected, rel=1e-6)
    assert perplexity(model, tokenizer, TEXT, 16, tokens, stride=stride) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stride", [None, 1, 5, 8, 15])
@pytest.mark.parametrize("tokens", [15, 40, 50])
def test_every_window_begins_as_the_tokenizer_begins_a_text(starting, stride, tokens):
    model, text = tiny_llama(), " ".join(TEXT.split()[:tokens])
    expected = reference(model, starting, text, 16, stride, head=[starting.bos_token_id])
    assert perplexity(model, starting, text, seq_len=16, stride=stride) == pytest.approx(expected, rel=1e-6)
    assert perplexity(model, starting, TEXT, 16, tokens, stride=stride, batch_size=3) == pytest.approx(expected)
    spelt_out = f"{starting.bos_token} {text}"
    assert perplexity(model, starting, spelt_out, 16, stride=stride) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stride", [None, 5])
def test_the_papers_windows_have_no_start_token_but_the_first(starting, stride):
    expected = reference(tiny_llama(), starting, TEXT, 16, stride)
    measured = perplexity(tiny_llama(), starting, TEXT, 16, stride=stride, start_token=False)
    assert measured == pytest.approx(expected, rel=1e-6)
    assert measured != perplexity(tiny_llama(), starting, TEXT, 16, stride=stride)


@pytest.mark.parametrize("stride", [None, 5])
def test_a_start_token_that_the_tokenizer_does_not_add_changes_nothing(tokenizer, stride):
    assert tokenizer.bos_token_id is not None
    assert start_token_of(tokenizer) is None
    plain, asked = (
        perplexity(tiny_llama(), tokenizer, TEXT, 16, stride=stride, start_token=on) for on in (False, True)
    )
    assert plain == asked
    ids = tokenizer(TEXT).input_ids
    assert windows(tokenizer, TEXT, 16).tolist() == [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]


def test_windows_begin_with_the_start_token_and_hold_all_of_the_text(starting):
    assert start_token_of(starting) == starting.bos_token_id
    cut, papers = windows(starting, TEXT, 16), windows(starting, TEXT, 16, start_token=False)
    ids = starting(TEXT).input_ids
    assert cut.shape == (3, 16)
    assert cut[:, 0].tolist() == 3 * [starting.bos_token_id]
    assert cut[:, 1:].flatten().tolist() == ids[1:46]
    assert papers.flatten().tolist() == ids[:48]


def sources(*sizes):
    """Windows whose first token tells the source, and whose second its place in it."""
    return [torch.tensor([[i, j, 0, 0] for j in range(size)]) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(("weights", "tokens"), [([2, 1, 1], None), ([5, 3, 0.5], 9000), ([1, 1, 1], 2400)])
def test_the_weights_of_a_mixture_hold(weights, tokens):
    mixed = mixed_windows(sources(600, 300, 900), weights, tokens)
    counts = mixed[:, 0].bincount()
    for count, weight in zip(counts, weights, strict=True):
        assert count / len(mixed) == pytest.approx(weight / sum(weights), rel=0.02)
    assert len(mixed) == pytest.approx(1200 if tokens is None else tokens / 4, abs=3)
    # A source is gone through again only when all of it is there.
    for i, size in enumerate((600, 300, 900)):
        times = mixed[mixed[:, 0] == i, 1].bincount(minlength=size)
        assert times.max() - times.min() <= 1
        assert tokens is not None or times.max() == 1
    # Every stretch of it is a mixture, too.
    for stretch in mixed[:, 0].chunk(4):
        assert (stretch.bincount() / len(stretch) - counts / len(mixed)).abs().max() < 0.1


def test_without_weights_a_mixture_is_all_of_its_sources():
    given = sources(7, 50, 12)
    for tokens in (None, 1000):
        assert sorted(mixed_windows(given, tokens=tokens).tolist()) == sorted(torch.cat(given).tolist())
    assert mixed_windows(given, tokens=4 * 23)[:, 0].bincount().tolist() == [2, 16, 4]


def test_a_mixture_is_a_function_of_its_seed():
    given, state = sources(30, 50), torch.get_rng_state()
    first, again, other = (mixed_windows(given, [1, 1], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_weights_of_a_mixture():
    for weights in ([1], [1, 1, 1], [1, 0], [1, -1], [1, math.nan]):
        with pytest.raises(ValueError, match="give a positive number for each of the 2 sources"):
            mixed_windows(sources(5, 5), weights)
    with pytest.raises(ValueError, match=r"source 2 of 2 gets no window at the shares \[100, 1\]"):
        mixed_windows(sources(5, 5), [100, 1])


def test_perplexity_records_no_graph(tokenizer):
    model, recorded = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    perplexity(model, tokenizer, TEXT, seq_len=16)
    assert recorded
    assert not any(recorded)


def test_protocols_differ(tokenizer, starting):
    apart, overlapping = (perplexity(tiny_llama(), tokenizer, TEXT, 16, stride=stride) for stride in (None, 8))
    assert abs(apart / overlapping - 1) > 1e-4
    assert protocol(tokenizer, TEXT, 16) == "non-overlapping windows of 16 tokens, 48 tokens"
    assert protocol(tokenizer, TEXT, 16, 45, stride=8) == "windows of 16 tokens at a stride of 8, 45 tokens"
    assert protocol(starting, TEXT, 16) == (
        "non-overlapping windows of 16 tokens, each from the start token on, 45 tokens"
    )
    assert protocol(starting, TEXT, 16, 45, stride=8) == (
        "windows of 16 tokens at a stride of 8, each from the start token on, 45 tokens"
    )
    assert protocol(starting, TEXT, 16, start_token=False) == protocol(tokenizer, TEXT, 16)


@pytest.mark.parametrize("stride", [None, 5])
def test_perplexity_does_not_depend_on_the_batch(tokenizer, stride):
    model = tiny_llama()
    one = perplexity(model, tokenizer, TEXT, seq_len=16, stride=stride)
    for batch_size in (2, 3, 64):
        batched = perplexity(model, tokenizer, TEXT, seq_len=16, stride=stride, batch_size=batch_size)
        assert batched == pytest.approx(one, rel=1e-6)


def test_an_adapter_is_measured_at_its_mode(tokenizer):
    model = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=1.0)).train()
    text = "w1 w2 w3 " * 20
    assert perplexity(model, tokenizer, text, seq_len=16) == perplexity(model, tokenizer, text, seq_len=16)
    assert model.training


def test_bad_input(tokenizer):
    for stride in (None, 8):
        with pytest.raises(ValueError, match="the text has 2 tokens, fewer than one window of 16"):
            perplexity(tiny_llama(), tokenizer, "w1 w2", seq_len=16, stride=stride)
    with pytest.raises(ValueError, match="seq_len is 1"):
        perplexity(tiny_llama(), tokenizer, "w1 w2", seq_len=1)
    for stride in (0, 16):
        with pytest.raises(ValueError, match=f"stride is {stride}, outside 1 to seq_len - 1 = 15"):
            perplexity(tiny_llama(), tokenizer, TEXT, seq_len=16, stride=stride)
    with pytest.raises(ValueError, match="windows of 128 tokens exceed the model's 64 positions"):
        perplexity(tiny_gpt2(), tokenizer, TEXT, seq_len=128)
    with pytest.raises(ValueError, match="batch_size is 0"):
        perplexity(tiny_llama(), tokenizer, TEXT, seq_len=16, batch_size=0)


def accuracy(model, tokenizer, rows):
    """The share of rows whose right choice is the likelier one, without the harness."""
    hits = []
    for row in rows:
        question = tokenizer(row["question"], return_tensors="pt").input_ids
        with torch.no_grad():
            last = model(input_ids=question).logits[0, -1]
        choices = last[[tokenizer.convert_tokens_to_ids(choice) for choice in row["choices"]]]
        hits.append(choices.argmax().item() == row["answer"])
    return sum(hits) / len(hits)


def test_an_adapter_and_its_merged_model_score_the_same(checkpoint, tokenizer, task, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = get_peft_model(base, MaskProConfig()).eval()
    model.save_pretrained(tmp_path / "adapter")
    rows = [json.loads(line) for line in task.with_suffix(".jsonl").read_text().splitlines()]
    expected = accuracy(model, tokenizer, rows)
    masked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    scores = task_scores(masked, tokenizer, [str(task)])
    assert scores["order"]["acc"] == pytest.approx(expected)
    assert 0 < expected < 1
    assert scores["order"]["acc_stderr"] > 0
    assert task_scores(masked.merge_and_unload(), tokenizer, [str(task)], batch_size=3) == scores
    few = task_scores(model, tokenizer, [str(task)], limit=4)["order"]["acc"]
    assert few == pytest.approx(accuracy(model, tokenizer, rows[:4]))


def test_the_seven_tasks_of_the_papers(tokenizer, monkeypatch):
    """All of them are tasks of the harness; their data is on the Hub, so the scores here are made up."""
    names, manager = find_tasks(["zero-shot"])
    assert names == list(ZERO_SHOT)
    assert set(names) <= set(manager.all_subtasks)
    results = {name: {"alias": name, "acc,none": i / 7, "acc_norm,none": 1.0} for i, name in enumerate(names)}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **options: {"results": results})
    scores = task_scores(tiny_llama(), tokenizer, ["zero-shot"])
    assert scores["race"] == {"acc": 1 / 7, "acc_norm": 1.0}
    assert scores["zero-shot"] == {"acc": pytest.approx(3 / 7)}


def test_tasks_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nonsense is neither a task of lm-evaluation-harness nor a task file"):
        find_tasks(["piqa", "nonsense"])
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is no YAML file: while parsing"):
        find_tasks([str(tmp_path / "bad.yaml")])
    tasks._task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-maskpro\[eval\]'"):
        find_tasks(["piqa"])
