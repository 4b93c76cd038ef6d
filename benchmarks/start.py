"""
What a starting mask takes, against one plain forward pass of the dense model over the same tokens. With `--layer` the
model is one decoder layer of that shape, of random weights, and so are the tokens: a layer of a larger model. Memory
is that of the process, on a GPU what is allocated there.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.cli.common import load_to_run
from hf_maskpro.cli.quickstart import write_smollm2
from hf_maskpro.evaluation import windows
from hf_maskpro.starts import random_windows, start_token_of
from hf_maskpro.starts.calibration import SAMPLES, SEQ_LEN
from memory import forget_peak, peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="text to calibrate on")
    source.add_argument("--layer", type=int, nargs=2, metavar=("HIDDEN", "INTERMEDIATE"), help="as 4096 11008")
    parser.add_argument("--model", help="a local folder or a Hub id; SmolLM2-135M-Instruct if absent")
    parser.add_argument("--method", nargs="+", default=["wanda", "sparsegpt", "sparsegpt+swaps"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    args = parser.parse_args()
    if args.layer:
        base = random_layer(*args.layer)
        batches = random_windows(torch.randint(base.config.vocab_size, (16 * SAMPLES * SEQ_LEN,)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            base, tokenizer = load_to_run(args.model or write_smollm2(Path(folder)))
        ids = windows(tokenizer, args.text.read_text(encoding="utf-8"), SEQ_LEN)
        batches = random_windows(ids, SAMPLES, SEQ_LEN, 0, start_token_of(tokenizer))
    batches = [{key: value.to(base.device) for key, value in batch.items()} for batch in batches]
    rows: list[dict[str, Any]] = []
    for method in args.method:
        forward, start = [], []
        for _ in range(args.repeats):
            # The first batch warms up what the others use.
            timed(partial(forward_pass, base, batches[:1]))
            forward.append(timed(partial(forward_pass, base, batches)))
            model = get_peft_model(base, MaskProConfig(init_mask=method))
            forget_peak()
            start.append(timed(partial(initialize_masks, model, batches)))
            base = model.unload()
        ratio = statistics.median(a / b for a, b in zip(start, forward, strict=True))
        row = {"method": method, "forward": statistics.median(forward), "start": statistics.median(start)}
        rows.append(row | {"ratio": ratio, "peak_bytes": peak_bytes()})
        print(rows[-1], file=sys.stderr)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{SAMPLES} windows of {SEQ_LEN} tokens; medians of {args.repeats}, in one process\n")
    print("| method | start, s | forward pass, s | ratio | peak memory |\n|---|---:|---:|---:|---:|")
    for row in rows:
        seconds = f"{row['start']:.1f} | {row['forward']:.1f} | {row['ratio']:.1f}"
        print(f"| {row['method']} | {seconds} | {row['peak_bytes'] / 2**30:.1f} GiB |")


@torch.no_grad()
def forward_pass(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        model(**batch, use_cache=False)


def timed(job: Callable[[], object]) -> float:
    begun = time.perf_counter()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def random_layer(hidden: int, intermediate: int) -> LlamaModel:
    """A model of one decoder layer and no head, of random weights in bfloat16."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
    )
    torch.manual_seed(0)
    return LlamaModel(config).bfloat16().to("cuda" if torch.cuda.is_available() else "cpu").eval()


if __name__ == "__main__":
    main()
