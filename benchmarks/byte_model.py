"""
A small model of another architecture, for benchmarks that take `--model`: a GPT-2 of four layers of 128, trained
briefly on the bytes of the first four fifths of a text.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import protocol
from hf_maskpro.deploy import new_folder
from hf_maskpro.evaluation import perplexity, windows


BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="text to learn from; a fifth is held out")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--max-steps", type=int, default=1500)
    parser.add_argument("--json", action="store_true", help="print the perplexity as JSON, not as a line")
    args = parser.parse_args()
    learned, held_out = protocol.split(args.text)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=protocol.SEQ_LEN,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    ids = windows(tokenizer, learned, protocol.SEQ_LEN)
    with new_folder(args.output) as folder:
        trained = TrainingArguments(
            str(folder),
            max_steps=args.max_steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=2e-3,
            warmup_steps=50,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model, trained, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
        model.to("cpu", torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    found = perplexity(model.eval(), tokenizer, held_out, protocol.SEQ_LEN, 32 * protocol.SEQ_LEN)
    print(json.dumps({"perplexity": found}) if args.json else f"perplexity of a byte, held out: {found:.3f}")


if __name__ == "__main__":
    main()
