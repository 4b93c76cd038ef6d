"""
Peak memory of a training step per target weight: the slope over three model sizes, minus that of a bare forward pass
of the same batch. The first step, which loads or compiles the kernels, is not counted. The published layout adds a
float32 logit and a byte of mask to the bfloat16 weight: 5 bytes. `lean` is `simple` with its optimizer in the backward
pass and gradient checkpointing. `--billion` measures instead a whole process that makes a random Llama of 1.1 billion
weights and trains it for two such steps.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments
from hf_maskpro.cli import quickstart_row


# Layers are added, not widened, so that what belongs to the layer at work is the same in all sizes.
LAYERS = (8, 16, 24)
TOKENS = (4, 64)
LLAMA = {"vocab_size": 128, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
# TinyLlama's shape.
BILLION = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
BILLION_LAYERS, BILLION_TOKENS = 22, (1, 512)


class ForgetFirstStep(TrainerCallback):
    """Starts the count of peak memory anew after the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            forget_peak()


def forget_peak() -> None:
    # What compiling left behind goes when Python next looks for cycles, which is sooner in a larger model.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux sets VmHWM back to what is in use.
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else quickstart_row.peak_bytes()


def worker(job: str, dtype: str, layers: int, pattern: str) -> None:
    """Run one job in this process and print its peak memory and target weights."""
    print(json.dumps(run(job, dtype, LlamaConfig(**LLAMA, num_hidden_layers=layers), TOKENS, pattern)))


def run(
    job: str, dtype: str, config: LlamaConfig, tokens: tuple[int, int], pattern: str, whole: bool = False
) -> dict[str, int]:
    """Peak memory in bytes, of the steps after the first or of the whole process, and target weights."""
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(config.vocab_size, tokens)
    weights = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm" not in n
    )
    if job == "forward":
        for _ in range(2):
            forget_peak()
            with torch.no_grad():
                model(input_ids=ids.to(model.device), labels=ids.to(model.device), use_cache=False)
    else:
        n, m = map(int, pattern.split(":"))
        model = get_peft_model(model, MaskProConfig(n=n, m=m, init_mask="random", logits_dtype=dtype))
        args = MaskProTrainingArguments(
            tempfile.gettempdir(),  # where nothing is saved
            estimator="simple" if job == "lean" else job,
            optimizer_in_backward=job == "lean",
            max_steps=2 if whole else 3,
            per_device_train_batch_size=tokens[0],
            baseline="auto",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
        callbacks = [] if whole else [ForgetFirstStep()]
        MaskProTrainer(model, args, train_dataset=data, callbacks=callbacks).train()
    return {"peak": peak_bytes(), "weights": weights}


def slope(job: str, dtype: str, pattern: str, repeats: int, bar: tqdm) -> tuple[float, list[float]]:
    """Bytes per target weight by least squares, and how far each size is from the line, in bytes per weight."""
    peaks, sizes = [], []
    for layers in LAYERS:
        runs = []
        for _ in range(repeats):
            # Freed memory goes back at once, so that the peak is what was in use.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            command = [sys.executable, __file__, "--worker", job, dtype, str(layers), pattern]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
            bar.update()
        peaks.append(statistics.median(run["peak"] for run in runs))
        sizes.append(runs[0]["weights"])
    x, y = torch.tensor(sizes).double(), torch.tensor(peaks).double()
    centred = x - x.mean()
    rate = float((centred * y).sum() / (centred**2).sum())
    off = (y - y.mean() - rate * centred) / x
    return rate, off.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--other-patterns", nargs="*", default=["4:8", "8:16"], help="for residual alone")
    parser.add_argument("--billion", action="store_true", help="peak memory of lean on a model of that size")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job, dtype, layers, pattern = args.worker
        worker(job, dtype, int(layers), pattern)
        return
    if args.billion:
        config = LlamaConfig(**BILLION, num_hidden_layers=BILLION_LAYERS)
        found = run("lean", "bfloat16", config, BILLION_TOKENS, "2:4", whole=True)
        print(json.dumps(found) if args.json else f"{found['weights']:,} target weights: {found['peak'] / 1e9:.2f} GB")
        return
    jobs = [(job, dtype, "2:4") for job in ("residual", "simple", "lean") for dtype in ("bfloat16", "float32")]
    jobs += [("residual", "bfloat16", pattern) for pattern in args.other_patterns]
    with tqdm(total=(1 + len(jobs)) * len(LAYERS) * args.repeats) as bar:
        bare, _ = slope("forward", "bfloat16", "2:4", args.repeats, bar)
        rows = []
        for job, dtype, pattern in jobs:
            rate, off = slope(job, dtype, pattern, args.repeats, bar)
            rows.append(
                {
                    "estimator": job,
                    "logits_dtype": dtype,
                    "pattern": pattern,
                    "total_bytes_per_weight": rate,
                    "added_bytes_per_weight": rate - bare,
                    "off_the_line": max(map(abs, off)),
                }
            )
    nested: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["pattern"] == "2:4":
            nested.setdefault(str(row["estimator"]), {})[str(row["logits_dtype"])] = float(
                row["added_bytes_per_weight"]
            )
    result = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "bare_forward_bytes_per_weight": bare,
        "published_added_bytes_per_weight": 5.0,
        "bytes_per_weight": nested,
        "rows": rows,
    }
    if args.json:
        print(json.dumps(result))
        return
    table = Table(
        title=f"peak memory per target weight on {result['device']}; a bare forward pass takes {bare:.2f} bytes"
    )
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
