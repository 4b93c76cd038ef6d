"""
What there is to know of this library on a GPU, in at most eight minutes, without a network and from a source tree: the
tests marked gpu, masks against those of the CPU, the products of packed weights, a mask step, dense against sparse
models, two short trainings, memory, and where the time of a step goes. Each part runs in a process of its own with its
own limit of time, so that none spoils the next; what it has found until then goes into one JSON file and one table. On
a CPU it runs in miniature, which shows that it runs.
"""

import argparse
import copy
import io
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


# What a part has found so far, each time more, and in words under `says`.
Figures = Iterator[dict[str, Any]]

ROOT = Path(__file__).parents[1]
# Of the largest output, how far a product with packed weights may be from the dense one.
ROUNDING = 0.02
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}


def warm_up() -> None:
    """Import once what all parts need, which takes longer than some of them; they are forked from here."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("hf_maskpro", "hf_maskpro.cli.bench", "mask_step", "memory", "profile_step"):
        import_module(name)


def script(name: str, *arguments: str) -> Any:
    """The JSON of another script of this folder."""
    sys.argv = [name, *arguments, "--json"]
    with redirect_stdout(io.StringIO()) as printed:
        import_module(name).main()
    return json.loads(printed.getvalue().strip().splitlines()[-1])


def device(small: bool) -> Figures:
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "torchao"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    if small:
        yield {"device": f"cpu, {torch.get_num_threads()} threads", "versions": versions, "says": "in miniature"}
        return
    properties = torch.cuda.get_device_properties(0)
    figures = {
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "versions": versions,
    }
    yield figures | {"says": f"{properties.name}, torch {torch.__version__}"}


def tests(small: bool) -> Figures:
    import pytest

    class Count:
        found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.found[report.outcome].append(report.nodeid)

    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    code = pytest.main([*options, *files], plugins=[Count()])
    found = Count.found
    counts = {outcome: len(names) for outcome, names in found.items()}
    yield counts | {"says": ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)}
    if found["failed"]:
        raise AssertionError(f"{len(found['failed'])} failed: {', '.join(found['failed'])}")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise AssertionError(f"pytest ended with code {int(code)}")
    if not small and not found["passed"]:
        raise AssertionError("no test ran")


def masks(small: bool) -> Figures:
    """Groups whose mask on the GPU, compiled, is not that of the CPU, and logits that an update moves otherwise."""
    from hf_maskpro.subset import compiling, mode, pack, sample_codes, score_and_update

    rows, groups = 1024, 1024
    figures: dict[str, Any] = {}
    total = differ = 0
    for n, m, dtype in ((2, 4, torch.float32), (2, 4, torch.bfloat16), (4, 8, torch.float32)):
        distribution: Any = "plackett_luce" if n <= 2 else "conditional_poisson"
        torch.manual_seed(0)
        theta = (3 * torch.randn(m, rows, groups)).to(dtype).transpose(0, 1)
        packed = pack(mode(theta, n), n, m)
        found = []
        for where in ("cuda", "cpu"):
            # Eager on the CPU, which gives the masks of its compiled kernels and needs no compiler.
            compiling.SMALLEST_COMPILED = 1 if where == "cuda" else 1 << 62
            moved, words = theta.to(where, copy=True), packed.to(where)
            drawn = sample_codes(moved, words, 5.0, n, 7, 3, distribution)
            score_and_update(moved, words, 5.0, n, 0.125, 7, 3, distribution)
            found.append((drawn.cpu(), moved.cpu()))
        (drawn, moved), (expected, moved_there) = found
        figures[f"{n}:{m} {str(dtype).removeprefix('torch.')}"] = {
            "groups": drawn.numel(),
            "masks_that_differ": int((drawn != expected).sum()),
            "shall_be_equal": n <= 2,
            "logits_that_differ": int((moved != moved_there).sum()),
            "largest_difference": (moved.float() - moved_there.float()).abs().max().item(),
        }
        differ, total = differ + int((drawn != expected).sum()), total + drawn.numel()
        yield figures | {"says": f"{differ:,} of {total:,} masks differ from the CPU's"}
    wrong = [name for name, row in figures.items() if row["shall_be_equal"] and row["masks_that_differ"]]
    if wrong:
        raise AssertionError(f"masks that should be those of the CPU differ: {', '.join(wrong)}")


def products(small: bool) -> Figures:
    """Products with packed weights, for several sizes of what a program takes, against dense ones, as CUDA graphs."""
    from torch.nn.functional import linear
    from triton.runtime.errors import OutOfResources

    from hf_maskpro.deploy import packed_triton
    from hf_maskpro.deploy.packed import pack

    # Of bfloat16 the interpreter has no products.
    dtype, where = (torch.float16, "cpu") if small else (torch.bfloat16, "cuda")
    ones, fews = [(8, 256, 4), (8, 128, 4), (4, 256, 2), (4, 128, 1), (8, 128, 1), (16, 256, 8)], [(32, 64, 4)]
    fews += [(64, 64, 4), (32, 128, 8), (16, 64, 4)]
    rows, best = [], dict.fromkeys((1, 4, 16), float("inf"))
    for (outputs, inputs), tokens in product([(40, 96)] if small else SHAPES, best):
        # Drawn on the CPU: after a failed capture the generator of the GPU refuses to draw.
        groups = torch.randn(outputs, inputs // 4, 4).to(where)
        weight = groups.scatter_(2, groups.abs().topk(2, largest=False).indices, 0).flatten(1).to(dtype)
        # So many layers that their weights do not stay in the cache of the chip.
        weights = [weight.clone() for _ in range(1 if small else 8)]
        packed = [pack(weight) for weight in weights]
        x = torch.randn(tokens, inputs).to(where, dtype)
        expected = linear(x, weight)
        dense = timed(partial(linear, x), [(weight,) for weight in weights], small)
        tiles: dict[str, Any] = {}
        for tile in (ones if tokens == 1 else fews)[: 1 if small else None]:
            packed_triton.ONE_TILE = packed_triton.FEW_TILE = tile
            operands = [(*pair, None) for pair in packed]
            try:
                found = packed_triton.linear(x, *operands[0])
                taken = timed(partial(packed_triton.linear, x), operands, small)
            except (OutOfResources, RuntimeError) as error:
                tiles[str(tile)] = {"ratio": 0.0, "failed": str(error).strip().partition("\n")[0]}
                continue
            tiles[str(tile)] = {
                "seconds": taken,
                "ratio": dense / taken,
                "gb_per_s": 0.5625 * weight.nbytes / taken / 1e9,
                "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
            }
        row = {"out_features": outputs, "in_features": inputs, "tokens": tokens, "dense_seconds": dense}
        rows.append(row | {"tiles": tiles})
        best[tokens] = min(best[tokens], max(tile["ratio"] for tile in tiles.values()))
        says = ", ".join(f"{ratio:.2f} at {tokens}" for tokens, ratio in best.items() if ratio < float("inf"))
        yield {"rows": rows, "says": f"times as fast as dense, the worst shape by its best tile: {says} tokens"}
    found = [tile["difference"] for row in rows for tile in row["tiles"].values() if "difference" in tile]
    if not all(difference <= ROUNDING for difference in found):
        raise AssertionError(f"products are not the dense ones within {ROUNDING}: {max(found):.2g}")


def timed(function: Callable[..., Any], operands: list[tuple], small: bool) -> float:
    """Seconds of a call, replayed with others as one CUDA graph; on a CPU as it is."""
    if small:
        begun = time.perf_counter()
        function(*operands[0])
        return time.perf_counter() - begun
    from hf_maskpro.deploy import bench

    # Enough of them to be long beside the launch of the graph and the wait for it.
    calls = operands * (64 // len(operands))
    replay = bench.captured(lambda: [function(*others) for others in calls][-1])
    return statistics.median(bench.in_turns(replay, replay, 10)[0]) / len(calls)


def mask_step(small: bool, logits_dtype: str) -> Figures:
    if small:
        model = ["--model", tiny_model(), "--repeats", "1", "--without", "published"]
        eager()
    else:
        model = ["--seven-b", "--without", "published", "eager"]
    figures = script("mask_step", *model, "--patterns", "2:4", "--logits-dtype", logits_dtype)
    row = figures["patterns"]["2:4"]
    yield figures | {"says": f"{1e3 * row['compiled_s']:.1f} ms, {row['times_floor']:.1f} times the floor"}


def eager() -> None:
    from hf_maskpro.subset import Kernel

    Kernel.compiles = False


def tiny_model() -> str:
    """The folder of a random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tempfile.mkdtemp()
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


def bench(small: bool, form: Any) -> Figures:
    """Decoder layers of 7B shape, dense against sparse; in miniature a model against itself."""
    from transformers import LlamaConfig

    from hf_maskpro.deploy import bench as benchmark

    if small:
        benchmark.SHAPES["7b"] = LlamaConfig(**TINY)
        model = benchmark.random_model("7b", device="cpu")
        compared = benchmark.compare(model, copy.deepcopy(model), [32], [2], 2)
    else:
        benchmark.check_device(form == "fp8")
        dense, sparse, left = benchmark.sparse_pair(benchmark.random_model("7b"), form)
        if left.keys() - {"lm_head.weight"}:
            raise AssertionError(f"these stayed dense: {left}")
        prefill = [512] if form == "packed" else list(benchmark.PREFILL_TOKENS)
        compared = benchmark.compare(dense, sparse, prefill, list(benchmark.BATCH_SIZES), 10)
    rows = []
    for row in compared:
        rows.append(row)
        faster = [row for row in rows if row.get("sparse") == "faster"]
        yield {"rows": rows, "says": f"sparse is faster in {len(faster)} of {len(rows)} rows"}
    if failed := [row["failed"] for row in rows if "failed" in row]:
        raise AssertionError(f"{len(failed)} of {len(rows)} rows failed: {failed[0]}")


def training(small: bool, estimator: str) -> Figures:
    """Steps on a random model of 1.1 billion weights and a few random windows, which it can learn by heart."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import memory
    from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments

    config = LlamaConfig(**TINY) if small else LlamaConfig(**memory.BILLION, num_hidden_layers=memory.BILLION_LAYERS)
    steps, tokens = (4, 32) if small else (200, 512)
    torch.manual_seed(0)
    with torch.device("cpu" if small else "cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(model, MaskProConfig())
    windows = torch.randint(config.vocab_size, (4, tokens)).tolist()
    arguments = MaskProTrainingArguments(
        tempfile.mkdtemp(),
        estimator=estimator,
        max_steps=steps,
        per_device_train_batch_size=1,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    memory.forget_peak()
    trainer = MaskProTrainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in windows])
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    figures = {
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": memory.peak_bytes(),
    }
    says = f"{1e3 * seconds / steps:.0f} ms a step, compiling included; loss {losses[0]:.2f} to {losses[-1]:.2f}"
    yield figures | {"says": f"{says}; {figures['peak_bytes'] / 1e9:.1f} GB"}


def start(small: bool) -> Figures:
    """The best starting mask of a 7B-shaped decoder layer, whole."""
    shape = ("128", "128") if small else ("4096", "11008")
    (row,) = script("start", "--layer", *shape, "--method", "sparsegpt+swaps")
    says = f"{row['start']:.1f} s, {row['ratio']:.1f} times a forward pass; {row['peak_bytes'] / 1e9:.1f} GB"
    yield row | {"says": says}


def bytes_per_weight(small: bool) -> Figures:
    """Peak memory of a training step per target weight, by two sizes, with that of the weight."""
    from transformers import LlamaConfig

    import memory

    shape, sizes = (TINY, (1, 2)) if small else (memory.LLAMA, (8, 24))
    dtype = "bfloat16"
    figures: dict[str, float] = {}
    for job in ("forward", "residual") if small else ("forward", "residual", "simple", "lean"):
        few, many = (
            memory.run(job, dtype, LlamaConfig(**(shape | {"num_hidden_layers": layers})), memory.TOKENS, "2:4")
            for layers in sizes
        )
        figures[f"{job} {dtype}"] = (many["peak"] - few["peak"]) / (many["weights"] - few["weights"])
        yield figures | {"says": ", ".join(f"{name} {value:.2f}" for name, value in figures.items())}


def profile(small: bool) -> Figures:
    if small:
        eager()
    model = ["--model", tiny_model(), "--steps", "1"] if small else ["--seven-b", "--logits-dtype", "bfloat16"]
    figures = script("profile_step", *model)
    parts = {name: seconds for name, seconds in figures["step"].items() if name != "peak_bytes"}
    says = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in parts.items())
    yield figures | {"says": says}


# What to run, most wanted first, and the seconds that it may take: together more than there are.
PARTS: dict[str, tuple[Callable[..., Figures], tuple[str, ...], int]] = {
    "device": (device, (), 30),
    "tests": (tests, (), 90),
    "packed products": (products, (), 60),
    "mask step, float32 logits": (mask_step, ("float32",), 60),
    "bench, packed": (bench, ("packed",), 40),
    "bench, bfloat16": (bench, ("semi-structured",), 60),
    "masks against the CPU": (masks, (), 60),
    "mask step, bfloat16 logits": (mask_step, ("bfloat16",), 60),
    "start of a 7B layer": (start, (), 60),
    "200 steps of residual": (training, ("residual",), 60),
    "bench, FP8": (bench, ("fp8",), 60),
    "200 steps of simple": (training, ("simple",), 60),
    "bytes per weight": (bytes_per_weight, (), 60),
    "profile of a step": (profile, (), 60),
}


def work(name: str, small: bool, folder: Path) -> None:
    """Run a part in this process, which nobody else's depends on."""
    # What it starts, such as compilers, ends with it.
    os.setsid()
    sys.stdout = sys.stderr = (folder / "log").open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    sys.path.insert(0, str(ROOT))
    function, arguments, _ = PARTS[name]
    for figures in function(small, *arguments):
        write(folder / "figures", figures)


def write(path: Path, figures: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(figures, indent=1))
    temporary.replace(path)


def run(name: str, small: bool, limit: float, context: BaseContext) -> dict[str, Any]:
    """The outcome of a part, whatever becomes of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        process = context.Process(target=work, args=(name, small, folder))  # type: ignore[attr-defined]
        begun = time.perf_counter()
        process.start()
        process.join(limit)
        outcome = "over time" if process.is_alive() else "failed" if process.exitcode else "passed"
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            # It has ended, or has no group of its own yet.
            process.kill()
        process.join()
        result: dict[str, Any] = {"outcome": outcome, "seconds": time.perf_counter() - begun, "limit_seconds": limit}
        figures, log = folder / "figures", folder / "log"
        if figures.is_file():
            result |= json.loads(figures.read_text())
        if outcome == "passed":
            return result
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        result["log"] = lines[-60:]
        last = lines[-1] if lines else ""
        if outcome == "over time":
            return result | {"says": f"over time, so far: {result['says']}" if "says" in result else last}
        return result | {"says": f"{last}; so far: {result['says']}" if "says" in result else last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="where the figures go")
    parser.add_argument("--minutes", type=float, default=8, help="after which no part goes on")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="only these")
    parser.add_argument("--small", action="store_true", help="in miniature, on the CPU, although there is a GPU")
    args = parser.parse_args()
    ends = time.perf_counter() + 60 * args.minutes
    # A process that has asked CUDA itself has no children that can use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if args.small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    small = not torch.cuda.is_available()
    if small:
        os.environ["TRITON_INTERPRET"] = "1"
    warm_up()
    context: BaseContext = multiprocessing.get_context("fork")
    result: dict[str, Any] = {"command": "benchmarks/gpu.py", "in_miniature": small, "parts": {}}
    table = Table("part", "outcome", "seconds", "what was found", title="in miniature, on a CPU" if small else None)
    console = Console(width=120)
    for name in args.parts:
        if small and PARTS[name][0] is masks:
            # It would compare the CPU with itself.
            continue
        limit = min(PARTS[name][2], ends - time.perf_counter())
        if limit <= 0:
            part = {"outcome": "not run", "seconds": 0.0, "says": "no time was left"}
        else:
            console.print(f"{name} ...")
            part = run(name, small, limit, context)
            if "re-initialize CUDA in forked subprocess" in " ".join(part.get("log", [])):
                context = multiprocessing.get_context("spawn")
                part = run(name, small, limit, context)
        result["parts"][name] = part
        table.add_row(name, part["outcome"], f"{part['seconds']:.0f}", part["says"])
        write(args.output, result)
    console.print(table)
    console.print(f"All figures: {args.output}")
    if any(part["outcome"] != "passed" for part in result["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
