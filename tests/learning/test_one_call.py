"""The whole way in one call, against the pieces that it is made of."""

import json
import re
import sys

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import MaskProConfig, MaskProTrainer, initialize_masks, sparsify
from hf_maskpro.evaluation import windows
from hf_maskpro.starts import random_windows, start_token_of
from hf_maskpro.tuner import masked_layers

from .test_trainer import arguments


def masks(model):
    return [layer.mode_codes("default") for layer in masked_layers(model).values()]


@pytest.mark.parametrize("name", ["checkpoint", "starting_checkpoint"])
@pytest.mark.parametrize("max_steps", [0, 5])
def test_one_call_does_what_its_pieces_do(tmp_path, request, text, name, max_steps):
    folder = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"max_length": 64, "learning_rate": 2.0, "seed": 7}
    args = arguments(tmp_path, "simple", max_steps=max_steps, per_device_train_batch_size=2, **options)
    inputs = windows(tokenizer, text.read_text(), 64)
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), MaskProConfig(init_mask="wanda"))
    initialize_masks(reference, random_windows(inputs, seq_len=64, seed=7, start_token=start_token_of(tokenizer)))
    start = masks(reference)
    if max_steps > 0:
        MaskProTrainer(reference, args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in inputs]).train()

    dataset = Dataset.from_dict({"text": [text.read_text()]})
    for rows in (dataset.to_list(), dataset.to_iterable_dataset())[: 1 if max_steps else 2]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        options |= {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True}
        masked = sparsify(model, tokenizer, rows, init_mask="wanda", max_steps=max_steps, **options)
        assert all(map(torch.equal, masks(masked), masks(reference)))
    assert all(map(torch.equal, start, masks(reference))) == (max_steps == 0)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_epochs_are_refused(checkpoint):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="num_train_epochs is 1, and a run is measured in max_steps here"):
        sparsify(model, tokenizer, [{"text": "w1 w2"}], num_train_epochs=1)


def test_settings_are_the_trainers(tmp_path, checkpoint, text):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    rows = [{"text": text.read_text()}]
    options = {"estimator": "residual", "baseline": "step", "save_strategy": "steps", "use_cpu": True}
    masked = sparsify(
        model, tokenizer, rows, "magnitude", n=1, m=4, max_steps=2, max_length=32, output_dir=tmp_path, **options
    )
    config = masked.peft_config["default"]
    assert (config.pattern, config.init_mask) == ("1:4", "magnitude")
    assert config.start["training"]["estimator"] == "residual"
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_dataset_may_be_named(tmp_path, checkpoint, text, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [{"text": line} for line in text.read_text().split(".")]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    options = {"init_mask": "magnitude", "max_steps": 1, "max_length": 32, "use_cpu": True}
    masked = sparsify(model, tokenizer, str(tmp_path / "data"), output_dir=str(tmp_path / "run"), **options)
    assert masked.peft_config["default"].start["training"]["steps"] == 1
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="me/texts is not a folder here, and the Hub cannot be reached"):
        MaskProTrainer(masked, None, train_dataset="me/texts", processing_class=tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    args = arguments(tmp_path, "simple", max_steps=1)
    with pytest.raises(ImportError, match=re.escape("me/texts needs the datasets package: pip install 'hf-maskpro[")):
        MaskProTrainer(masked, args, train_dataset="me/texts", processing_class=tokenizer)
