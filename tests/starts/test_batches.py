"""What a batch of calibration text may be."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_llama


IDS = torch.randint(2, 34, (4, 12), generator=torch.Generator().manual_seed(1))
ROWS = Dataset.from_dict({"input_ids": IDS.tolist(), "text": ["w1 w2"] * 4})


def calibrated(batches, init_mask="wanda"):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask=init_mask))
    initialize_masks(model, batches)
    return model


@pytest.mark.parametrize(
    ("batches", "found"),
    [
        (IDS, "a batch is a Tensor"),
        (["w1 w2", "w3 w4"], "a batch is a str"),
        ((IDS, IDS), "a batch is a Tensor"),
        (DataLoader(TensorDataset(IDS, IDS), 2), "a batch is a list"),
        ({"input_ids": IDS}, "the dataloader is a mapping, perhaps one batch"),
        (BatchEncoding({"input_ids": IDS}), "the dataloader is a mapping, perhaps one batch"),
        (ROWS, "'input_ids' of a batch is a list"),
        (ROWS.with_format("torch"), "'text' of a batch is a str"),
        (ROWS.remove_columns("text").with_format("torch"), r"'input_ids' of a batch has the shape \[12\]"),
        (DataLoader(ROWS.with_format("torch"), 2), "'text' of a batch is a list"),
        ([{"input_ids": None, "use_cache": False}], "a batch has no tensor"),
        ([{"pixel_values": torch.zeros(2, 3, 8, 8)}], "the model's forward has no argument 'pixel_values'"),
    ],
)
def test_what_is_no_batch_is_refused_in_one_line_that_says_what_one_is(batches, found):
    with pytest.raises(ValueError, match=found) as caught:
        calibrated(batches)
    assert "a batch is a mapping of arguments of the model's forward to tensors" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("init_mask", ["wanda", "sparsegpt+swaps", "gblm"])
def test_any_mapping_that_forward_takes_is_a_batch(init_mask):
    first = calibrated([{"input_ids": IDS, "labels": IDS}], init_mask)
    embedded = tiny_llama().get_input_embeddings()(IDS).detach()
    for batch in (
        BatchEncoding({"input_ids": IDS}),
        # Llama's forward takes what it does not name.
        {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)},
        {"inputs_embeds": embedded, "labels": IDS},
        {"position_ids": None, "use_cache": True, "input_ids": IDS, "attention_mask": None, "labels": None},
    ):
        other = calibrated([batch], init_mask)
        for name, layer in masked_layers(other).items():
            assert layer.maskpro_mask["default"].equal(masked_layers(first)[name].maskpro_mask["default"])
        assert other.peft_config["default"].start["calibration"] == {"sequences": 4, "tokens": 48}


def test_a_gradient_needs_labels_where_there_is_no_text():
    with pytest.raises(ValueError, match="a batch of inputs_embeds has no loss; give it labels"):
        calibrated([{"inputs_embeds": torch.randn(2, 5, 16)}], "pruner-zero")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, inputs, labels=None):
        scores = self.second(self.first(inputs).relu())
        return SimpleNamespace(loss=None if labels is None else F.cross_entropy(scores, labels), scores=scores)


class HandsOn(nn.Module):
    """Hands what it does not know on to one that takes nothing else."""

    def __init__(self):
        super().__init__()
        self.inner = Classifier()

    def forward(self, inputs, **others):
        return self.inner(inputs, **others)


@pytest.mark.parametrize("init_mask", ["wanda", "gblm"])
@pytest.mark.parametrize("make", [Classifier, HandsOn])
def test_a_model_that_knows_no_cache_is_calibrated(make, init_mask):
    torch.manual_seed(0)
    model = get_peft_model(make(), MaskProConfig(init_mask=init_mask, target_modules=["first", "second"]))
    initialize_masks(model, [{"inputs": torch.randn(8, 16), "labels": torch.arange(8) % 4}])
    assert model.peft_config["default"].start["calibration"]["sequences"] == 8
    assert len(masked_layers(model)) == 2
