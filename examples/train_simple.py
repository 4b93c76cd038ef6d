"""Learn a 2:4 mask by backward, from the best one without learning, on a text file."""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import (
    MaskProConfig,
    MaskProTrainer,
    MaskProTrainingArguments,
    initialize_masks,
)
from hf_maskpro.evaluation import windows


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model", required=True, help="base model: a local folder or a Hub id"
)
parser.add_argument("--text", required=True, help="text file to learn from")
parser.add_argument(
    "--output", required=True, help="folder for the adapter and its checkpoints"
)
parser.add_argument("--max-steps", type=int, default=120)
parser.add_argument("--seq-len", type=int, default=512)
options = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
base.to("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(options.model)
inputs = windows(
    tokenizer, Path(options.text).read_text(encoding="utf-8"), options.seq_len
)

model = get_peft_model(base, MaskProConfig(n=2, m=4, init_mask="sparsegpt+swaps"))
initialize_masks(model, [{"input_ids": batch} for batch in inputs[:64].split(8)])

arguments = MaskProTrainingArguments(
    output_dir=options.output,
    estimator="simple",
    max_steps=options.max_steps,
    per_device_train_batch_size=2,
    logging_steps=10,
    report_to=[],
)
dataset = [{"input_ids": window, "labels": window} for window in inputs]
MaskProTrainer(model, arguments, train_dataset=dataset).train()
model.save_pretrained(options.output)
