"""Learn a 2:4 mask with `transformers.Trainer`: any backward pass trains it."""

import argparse
from itertools import islice
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.evaluation import windows


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model", required=True, help="base model: a local folder or a Hub id"
)
parser.add_argument("--text", required=True, help="text file to learn from")
parser.add_argument(
    "--output", required=True, help="folder for the adapter and its checkpoints"
)
parser.add_argument("--max-steps", type=int, default=200)
parser.add_argument("--seq-len", type=int, default=128)
options = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(options.model)
inputs = windows(
    tokenizer, Path(options.text).read_text(encoding="utf-8"), options.seq_len
)

model = get_peft_model(base, MaskProConfig(n=2, m=4, init_mask="wanda"))
# The defaults of TrainingArguments suit weights; these suit logits.
arguments = TrainingArguments(
    output_dir=options.output,
    max_steps=options.max_steps,
    per_device_train_batch_size=8,
    learning_rate=0.3,
    warmup_steps=10,
    adam_beta2=0.98,
    max_grad_norm=0.0,
    logging_steps=10,
    report_to=[],
)
dataset = [{"input_ids": window, "labels": window} for window in inputs]
trainer = Trainer(model, arguments, train_dataset=dataset)
initialize_masks(model, islice(trainer.get_train_dataloader(), 32))
trainer.train()
model.save_pretrained(options.output)
