"""Learn a 2:4 mask with TRL's SFTTrainer, from Wanda's, on the lines of a text file."""

import argparse
from itertools import islice

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from hf_maskpro import MaskProConfig, initialize_masks


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--model", required=True, help="base model: a local folder or a Hub id"
)
parser.add_argument("--text", required=True, help="text file, one example a line")
parser.add_argument(
    "--output", required=True, help="folder for the adapter and its checkpoints"
)
parser.add_argument("--max-steps", type=int, default=200)
parser.add_argument("--max-length", type=int, default=128)
options = parser.parse_args()

dataset = load_dataset("text", data_files=options.text, split="train")
arguments = SFTConfig(
    output_dir=options.output,
    max_steps=options.max_steps,
    max_length=options.max_length,
    per_device_train_batch_size=8,
    learning_rate=0.3,
    warmup_steps=10,
    adam_beta2=0.98,
    max_grad_norm=0.0,
    bf16=torch.cuda.is_available(),
    report_to=[],
)
trainer = SFTTrainer(
    model=options.model,
    args=arguments,
    train_dataset=dataset.filter(lambda row: row["text"].strip()),
    peft_config=MaskProConfig(n=2, m=4, init_mask="wanda"),
)
initialize_masks(trainer.model, islice(trainer.get_train_dataloader(), 32))
trainer.train()
trainer.save_model()
