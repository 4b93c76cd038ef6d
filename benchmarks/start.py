"""What a starting mask takes, against one plain forward pass of the dense model over the same tokens."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.cli.common import load_model
from hf_maskpro.cli.quickstart import write_smollm2
from hf_maskpro.evaluation import windows
from hf_maskpro.starts import random_windows, start_token_of
from hf_maskpro.starts.calibration import SAMPLES, SEQ_LEN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--model", help="a local folder or a Hub id; SmolLM2-135M-Instruct if absent")
    parser.add_argument("--method", nargs="+", default=["wanda", "sparsegpt", "sparsegpt+swaps"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, tokenizer = load_model(args.model or write_smollm2(Path(folder)))
    ids = windows(tokenizer, args.text.read_text(encoding="utf-8"), SEQ_LEN)
    batches = random_windows(ids, SAMPLES, SEQ_LEN, 0, start_token_of(tokenizer))
    batches = [{key: value.to(base.device) for key, value in batch.items()} for batch in batches]
    rows: list[dict[str, Any]] = []
    for method in args.method:
        forward, start = [], []
        for _ in range(args.repeats):
            begun = time.perf_counter()
            with torch.no_grad():
                for batch in batches:
                    base(**batch, use_cache=False)
            forward.append(time.perf_counter() - begun)
            model = get_peft_model(base, MaskProConfig(init_mask=method))
            begun = time.perf_counter()
            initialize_masks(model, batches)
            start.append(time.perf_counter() - begun)
            base = model.unload()
        ratio = statistics.median(a / b for a, b in zip(start, forward, strict=True))
        row = {"method": method, "forward": statistics.median(forward), "start": statistics.median(start)}
        rows.append(row | {"ratio": ratio})
        print(rows[-1], file=sys.stderr)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{SAMPLES} windows of {SEQ_LEN} tokens; medians of {args.repeats}, in one process\n")
    print("| method | start, s | forward pass, s | ratio |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['method']} | {row['start']:.1f} | {row['forward']:.1f} | {row['ratio']:.1f} |")


if __name__ == "__main__":
    main()
