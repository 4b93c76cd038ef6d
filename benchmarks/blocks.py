"""
Time and memory of learning the masks of decoder layers of a 7B model, one after the other, from weights on the disk.
The random model has so many such layers; its weights are mapped from their file, and read when a layer runs. Counted
is anonymous memory: what is mapped from a file a machine can take back. `magnitude+blocks` is the start.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from cost_model import MODELS, Decoder, block_memory
from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.starts import blocks


VOCABULARY = 256


class Peak(Thread):
    """The most anonymous memory of this process, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, Event()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def save_random(shape: Decoder, layers: int, folder: str) -> None:
    """Write a random model of bfloat16 weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_attention_heads=shape.hidden // 128, num_key_value_heads=shape.key_value // 128, num_hidden_layers=layers,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=MODELS, default="7B")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=blocks.STEPS, help="fewer show the memory, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    shape, blocks.STEPS = MODELS[args.shape], args.steps
    batches = [{"input_ids": torch.randint(VOCABULARY, (1, args.seq_len))} for _ in range(args.windows)]
    with tempfile.TemporaryDirectory() as folder:
        save_random(shape, args.layers, folder)
        before = anonymous_bytes()
        base = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
        loaded = anonymous_bytes()
        model = get_peft_model(base, MaskProConfig(init_mask="magnitude+blocks", inference_mode=True))
        peak = Peak()
        peak.start()
        begun, processor = time.monotonic(), time.process_time()
        initialize_masks(model, batches)
        found = {
            "target_weights": args.layers * shape.layer,
            "steps_per_layer": blocks.STEPS,
            "tokens_per_step": args.seq_len,
            "calibration_tokens": args.windows * args.seq_len,
            "threads": torch.get_num_threads(),
            "seconds": time.monotonic() - begun,
            "processor_seconds": time.process_time() - processor,
            "loaded_bytes": loaded - before,
            "peak_bytes": peak.bytes - before,
            "computed_bytes": sum(block_memory(shape, args.seq_len, args.windows * args.seq_len).values()),
        }
        peak.ended.set()
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name.replace('_', ' '):>20} {value:,.0f}")


if __name__ == "__main__":
    main()
