"""TRL's trainers that compare with a reference: they add it as an adapter of the same configuration."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from hf_maskpro import MaskProConfig
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_llama


PAIRS = [{"prompt": "w1 w2 w3", "chosen": " w3 w4 w5", "rejected": " w9 w8"}]
LABELLED = [
    {"prompt": "w1 w2 w3", "completion": " w3 w4 w5", "label": True},
    {"prompt": "w1 w2 w3", "completion": " w9 w8", "label": False},
]
PROMPTS = [{"prompt": "w1 w2 w3"}]
GENERATE = {"num_generations": 2, "max_completion_length": 4}


def reward(completions, **_):
    return [float(i) for i in range(len(completions))]


@pytest.mark.parametrize(
    ("method", "rows", "settings", "options"),
    [
        ("DPO", PAIRS, {}, {}),
        ("KTO", LABELLED, {}, {}),
        ("RLOO", PROMPTS, GENERATE, {"reward_funcs": reward}),
        ("GRPO", PROMPTS, GENERATE, {"reward_funcs": reward}),
    ],
)
def test_a_mask_learns_beside_a_reference(method, rows, settings, options, checkpoint, tmp_path):
    get_peft_model(tiny_llama(), MaskProConfig(init_mask="random")).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", is_trainable=True)
    for layer in masked_layers(model).values():
        # As by training that came before, in the same process.
        layer.maskpro_theta["default"].data.normal_(std=4)
    start = [layer.learned_mask("default") for layer in masked_layers(model).values()]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, eos_token="<pad>")
    args = getattr(trl, f"{method}Config")(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, learning_rate=20.0, beta=0.1, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = getattr(trl, f"{method}Trainer")(
        model, args=args, train_dataset=Dataset.from_list(2 * rows), processing_class=tokenizer, **options
    )
    trainer.train()
    layers = masked_layers(model).values()
    assert [set(layer.maskpro_theta) for layer in layers] == [{"default", "ref"}] * len(layers)
    assert all(map(torch.equal, (layer.learned_mask("ref") for layer in layers), start))
    assert not all(map(torch.equal, (layer.initial_mask("default") for layer in layers), start))
    assert not all(map(torch.equal, (layer.learned_mask("default") for layer in layers), start))
