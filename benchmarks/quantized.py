"""
A mask of SmolLM2-135M-Instruct that is learned over weights in int8: perplexity of held-out text before and after some
steps of `simple` from Wanda's mask, and the memory of the whole process. `--lean` moves the logits, in bfloat16, in
the backward pass; `--full` learns over the bfloat16 weights. Text is Python's language reference.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments, initialize_masks, perplexity
from hf_maskpro.cli.quickstart import _topics, write_smollm2
from hf_maskpro.cli.quickstart_row import peak_bytes
from hf_maskpro.evaluation import windows
from hf_maskpro.starts import random_windows


HELD_OUT, TOKENS, SEQ_LEN = 5, 2048, 256


def measure(folder: str, steps: int, lean: bool, full: bool) -> dict[str, float]:
    """Learn, in this process."""
    begun = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if not full:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(base.model, Int8WeightOnlyConfig())
    config = MaskProConfig(init_mask="wanda", logits_dtype="bfloat16" if lean else "float32")
    model = get_peft_model(base, config)
    topics = _topics()
    inputs = windows(tokenizer, "\n\n".join(topics[HELD_OUT:]), SEQ_LEN)
    held_out = "\n\n".join(topics[:HELD_OUT])
    initialize_masks(model, random_windows(inputs, 16, SEQ_LEN, seed=0))
    before = perplexity(model, tokenizer, held_out, SEQ_LEN, TOKENS)
    arguments = MaskProTrainingArguments(
        tempfile.gettempdir(),  # where nothing is saved
        estimator="simple",
        optimizer_in_backward=lean,
        max_steps=steps,
        per_device_train_batch_size=2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"input_ids": window, "labels": window} for window in inputs]
    trainer = MaskProTrainer(model, arguments, train_dataset=data)
    # stdout is for the one JSON object.
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {
        "steps": steps,
        "perplexity_before": before,
        "perplexity_after": perplexity(model, tokenizer, held_out, SEQ_LEN, TOKENS),
        "peak_bytes": peak_bytes(),
        "seconds": time.monotonic() - begun,
        "processor_seconds": time.process_time(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a model; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--lean", action="store_true")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    if args.model:
        print(json.dumps(measure(args.model, args.steps, args.lean, args.full)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_smollm2(Path(folder))
        print(json.dumps(measure(folder, args.steps, args.lean, args.full)))


if __name__ == "__main__":
    main()
