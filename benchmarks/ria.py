"""
Why RIA falls behind Wanda at 2:4: its two differences, the power of the input norm and the balance of columns, apart.
Its other balance, that of rows, divides all members of a group by one number and changes no mask by itself.
"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model

import protocol
from hf_maskpro import MaskProConfig, initialize_masks, perplexity, starts
from hf_maskpro.cli.common import load_to_run
from hf_maskpro.starts import Calibration, random_windows


# By what |W| is divided, the power of ||X||, and the seed of the calibration windows.
VARIANTS = [
    ("row", 1.0, 1),
    ("row", 0.5, 42),
    ("column", 1.0, 42),
    ("column", 0.5, 42),
    ("both", 1.0, 42),
    ("both", 0.5, 1),
]
MAX_TOKENS = 16_384


def scores(weight: torch.Tensor, calibration: Calibration, balance: str, power: float) -> torch.Tensor:
    assert calibration.inputs is not None
    size = weight.abs()
    by_row, by_column = size / size.sum(1, keepdim=True), size / size.sum(0)
    relative = {"row": by_row, "column": by_column, "both": by_row + by_column}[balance]
    return relative * calibration.inputs.squares.pow(power / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's raw text")
    parser.add_argument("--work", type=Path, default=Path("leaderboard"), help="folder for model and texts")
    parser.add_argument("--results", type=Path, default=Path("docs/assets/ria.json"))
    args = parser.parse_args()
    base, _ = protocol.prepare([args.text], [], None, args.work)
    described = protocol.describe([args.text], [], None, MAX_TOKENS)
    rows = protocol.read(args.results, described)
    calibration = (args.work / "calibration.txt").read_text(encoding="utf-8")
    held_out = (args.work / "held_out.txt").read_text(encoding="utf-8")
    print("| divided by the sum of its | power of the input norm | seed | perplexity |\n|---|---|---|---:|")
    for balance, power, seed in VARIANTS:
        row = {"balance": balance, "power": power, "seed": seed, "protocol": described}
        known = [other for other in rows if other | row == other]
        if not known:
            model, tokenizer = load_to_run(base)
            ids = tokenizer(calibration, return_tensors="pt", verbose=False).input_ids[0]
            masked = get_peft_model(model, MaskProConfig(init_mask="ria"))
            starts._SCORES["ria"] = lambda w, c, balance=balance, power=power: scores(w, c, balance, power)
            initialize_masks(masked, random_windows(ids, seed=seed))
            known = [row | {"perplexity": perplexity(masked, tokenizer, held_out, protocol.SEQ_LEN, MAX_TOKENS)}]
            rows += known
            protocol.write(args.results, rows)
        print(f"| {balance} | {power:g} | {seed} | {known[0]['perplexity']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
