import json
import math
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import MaskProConfig, perplexity
from hf_maskpro.evaluation import ZERO_SHOT, find_tasks, protocol, task_scores
from hf_maskpro.evaluation import tasks as task_module

from ..conftest import tiny_gpt2, tiny_llama


TEXT = " ".join(f"w{(i * i) % 32}" for i in range(50))


@pytest.fixture
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def reference(model, tokenizer, text, seq_len, stride=None):
    """The definition, token by token: each has as its context what its window has before it."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    losses = []
    for t in range(1, len(ids) if stride else len(ids) // seq_len * seq_len):
        start = stride * max(0, math.ceil((t + 1 - seq_len) / stride)) if stride else t // seq_len * seq_len
        if start < t:
            with torch.no_grad():
                last = model(input_ids=ids[None, start:t]).logits[0, -1]
            losses.append(-last.double().log_softmax(-1)[ids[t]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("stride", [None, 1, 5, 8, 15])
@pytest.mark.parametrize("tokens", [16, 40, 50])
def test_perplexity_equals_its_definition(tokenizer, stride, tokens):
    model, text = tiny_llama(), " ".join(TEXT.split()[:tokens])
    expected = reference(model, tokenizer, text, 16, stride)
    assert perplexity(model, tokenizer, text, seq_len=16, stride=stride) == pytest.approx(expected, rel=1e-6)
    assert perplexity(model, tokenizer, TEXT, 16, tokens, stride=stride) == pytest.approx(expected, rel=1e-6)


def test_perplexity_records_no_graph(tokenizer):
    model, recorded = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    perplexity(model, tokenizer, TEXT, seq_len=16)
    assert recorded
    assert not any(recorded)


def test_protocols_differ(tokenizer):
    apart, overlapping = (perplexity(tiny_llama(), tokenizer, TEXT, 16, stride=stride) for stride in (None, 8))
    assert abs(apart / overlapping - 1) > 1e-4
    assert protocol(tokenizer, TEXT, 16) == "non-overlapping windows of 16 tokens, 48 tokens"
    assert protocol(tokenizer, TEXT, 16, 45, stride=8) == "windows of 16 tokens at a stride of 8, 45 tokens"


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
    task_module._task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-maskpro\[eval\]'"):
        find_tasks(["piqa"])
