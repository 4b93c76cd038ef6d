"""Time of `generate` on an unmerged mask adapter against the dense model, side by side in one process."""

import argparse
import json
import statistics
import time

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a local folder or a Hub id")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device).eval()

    models = {"dense": load(), "adapter": get_peft_model(load(), MaskProConfig()).eval()}
    prompt = torch.arange(10, 26, device=device).unsqueeze(0)
    length = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name, model in models.items():
            begun = time.perf_counter()
            model.generate(input_ids=prompt, do_sample=False, **length)
            if repeat:
                seconds[name].append(time.perf_counter() - begun)
    ratios = [adapter / dense for dense, adapter in zip(seconds["dense"], seconds["adapter"], strict=True)]
    figures = {
        "dense_s": statistics.median(seconds["dense"]),
        "adapter_s": statistics.median(seconds["adapter"]),
        "ratio": statistics.median(ratios),
    }
    if args.json:
        print(json.dumps(figures))
        return
    table = Table(title=f"generate {args.new_tokens} tokens, medians of {args.repeats} pairs on {device}")
    for name in figures:
        table.add_column(name)
    table.add_row(*(f"{value:.3g}" for value in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
