"""Fine-tune the kept weights of a sparse checkpoint: its zeros stay zeros."""

import argparse
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_maskpro import check_sparsity
from hf_maskpro.evaluation import windows


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model",
    required=True,
    help="2:4-sparse checkpoint, as hf-maskpro merge writes it",
)
parser.add_argument("--text", required=True, help="text file to learn from")
parser.add_argument("--output", required=True, help="folder for the new checkpoint")
parser.add_argument("--max-steps", type=int, default=200)
parser.add_argument("--learning-rate", type=float, default=1e-5)
parser.add_argument("--seq-len", type=int, default=512)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(options.model)
inputs = windows(
    tokenizer, Path(options.text).read_text(encoding="utf-8"), options.seq_len
)

# A weight without a gradient never moves, nor does weight decay move a zero.
for name in check_sparsity(model, 2, 4):
    weight = model.get_parameter(name)
    weight.register_hook(partial(torch.mul, weight != 0))

arguments = TrainingArguments(
    output_dir=options.output,
    max_steps=options.max_steps,
    per_device_train_batch_size=2,
    learning_rate=options.learning_rate,
    lr_scheduler_type="cosine",
    logging_steps=10,
    save_strategy="no",
    report_to=[],
)
dataset = [{"input_ids": window, "labels": window} for window in inputs]
Trainer(model, arguments, train_dataset=dataset).train()
print(len(check_sparsity(model, 2, 4)), "layers are still 2:4")
model.save_pretrained(options.output)
tokenizer.save_pretrained(options.output)
