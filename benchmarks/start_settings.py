"""
What two settings of `sparsegpt+swaps` do: how far the Gram matrix is drawn towards its diagonal, and how far what is
approached lies towards the dense model's outputs. Every pair of values is a mask, measured at home and elsewhere.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from peft import get_peft_model

import protocol
from hf_maskpro import MaskProConfig, initialize_masks, starts
from hf_maskpro.cli.common import load_to_run
from hf_maskpro.evaluation import against_dense, windows
from hf_maskpro.starts import random_windows, start_token_of


# By name, since its function of the same name stands for it in the package.
walk = import_module("hf_maskpro.starts.walk")


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--shrinkage", type=float, nargs="+", default=[walk.SHRINKAGE])
    parser.add_argument("--towards", type=float, nargs="+", default=[starts.TOWARDS_DENSE])
    parser.add_argument("--work", type=Path, default=Path("start-settings"), help="folder for texts")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each held-out text")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    args = parser.parse_args()
    base, elsewhere = protocol.prepare(args.text, args.elsewhere, args.model, args.work)
    texts = {path.name: path.read_text(encoding="utf-8") for path in (args.work / "held_out.txt", *elsewhere)}
    calibration = (args.work / "calibration.txt").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for walk.SHRINKAGE, starts.TOWARDS_DENSE in [(a, b) for a in args.shrinkage for b in args.towards]:
        model, tokenizer = load_to_run(base)
        start = start_token_of(tokenizer)
        ids = windows(tokenizer, calibration, protocol.CALIBRATION_SEQ_LEN)
        model = get_peft_model(model, MaskProConfig(init_mask="sparsegpt+swaps"))
        initialize_masks(model, random_windows(ids, protocol.SAMPLES, protocol.CALIBRATION_SEQ_LEN, 42, start))
        figures = against_dense(model, tokenizer, texts, "held_out.txt", protocol.SEQ_LEN, args.max_tokens)
        rows.append({"shrinkage": walk.SHRINKAGE, "towards": starts.TOWARDS_DENSE, **figures})
        print(rows[-1], file=sys.stderr)
    if args.json:
        print(json.dumps(rows))
        return
    print(protocol.describe(args.text, elsewhere, args.model, args.max_tokens) + "\n")
    print("| shrinkage | towards the dense model | times dense elsewhere | at home |\n|---:|---:|---:|---:|")
    for row in rows:
        print(f"| {row['shrinkage']} | {row['towards']} | {row['elsewhere']:.2f} | {row['at_home']:.2f} |")


if __name__ == "__main__":
    main()
