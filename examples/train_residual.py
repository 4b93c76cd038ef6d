"""
Learn a 2:4 mask by forward passes alone, from a one-shot mask made by `hf-maskpro
init`.
"""

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import MaskProTrainer, MaskProTrainingArguments
from hf_maskpro.evaluation import windows


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model", required=True, help="base model: a local folder or a Hub id"
)
parser.add_argument("--adapter", required=True, help="mask adapter to start from")
parser.add_argument("--text", required=True, help="text file to learn from")
parser.add_argument(
    "--output", required=True, help="folder for the adapter and its checkpoints"
)
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--seq-len", type=int, default=512)
options = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = PeftModel.from_pretrained(base, options.adapter, is_trainable=True)
inputs = windows(
    tokenizer, Path(options.text).read_text(encoding="utf-8"), options.seq_len
)

arguments = MaskProTrainingArguments(
    output_dir=options.output,
    estimator="residual",
    max_steps=options.max_steps,
    per_device_train_batch_size=1,
    logging_steps=10,
    save_steps=50,
    save_total_limit=2,
    report_to=[],
)
dataset = [{"input_ids": window, "labels": window} for window in inputs]
MaskProTrainer(model, arguments, train_dataset=dataset).train()
model.save_pretrained(options.output)
