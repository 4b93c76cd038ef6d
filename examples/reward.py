"""
Raise a metric that has no gradient, by forward passes alone: how much of what the dense
model wrote is a pruned one's first choice, too, on beginnings that it has not seen.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from hf_maskpro import MaskProTrainer, MaskProTrainingArguments
from hf_maskpro.evaluation import windows


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model", required=True, help="base model: a local folder or a Hub id"
)
parser.add_argument("--adapter", required=True, help="mask adapter to start from")
parser.add_argument(
    "--text", required=True, help="text file, of whose pieces the model writes on"
)
parser.add_argument("--output", required=True, help="folder for the adapter")
parser.add_argument("--max-steps", type=int, default=60)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--examples", type=int, default=1024)
options = parser.parse_args()

BEGINNING, LENGTH = 32, 32
base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(options.model)
text = Path(options.text).read_text(encoding="utf-8")
beginnings = windows(tokenizer, text, BEGINNING)[: options.examples]
continued = [
    base.generate(
        some,
        attention_mask=torch.ones_like(some),
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
    )
    for some in beginnings.split(options.batch_size)
]
written = torch.cat(continued)
# Neighbours in the text are alike, so halves, and not every second one.
learned_from, held_out = written.tensor_split(2)


def accuracy(model, batch):
    """The share of what the dense model wrote that is the model's first choice."""
    ids = batch["input_ids"]
    choices = model(input_ids=ids).logits[:, BEGINNING - 1 : -1].argmax(-1)
    return (choices == ids[:, BEGINNING:]).float().mean(1)


def measured(model):
    model.eval()
    with torch.no_grad():
        some = held_out.split(options.batch_size)
        return torch.cat([accuracy(model, {"input_ids": ids}) for ids in some])


model = PeftModel.from_pretrained(base, options.adapter, is_trainable=True)
before = measured(model)
arguments = MaskProTrainingArguments(
    options.output,
    estimator="residual",
    max_steps=options.max_steps,
    per_device_train_batch_size=options.batch_size,
    save_strategy="no",
    report_to=[],
)
MaskProTrainer(
    model,
    arguments,
    train_dataset=[{"input_ids": row} for row in learned_from],
    data_collator=default_data_collator,
    reward_fn=accuracy,
).train()
model.save_pretrained(options.output)
gain = measured(model) - before
error = gain.std() / len(gain) ** 0.5
print(f"held out {before.mean():.4f}, {gain.mean():+.4f}, standard error {error:.4f}")
