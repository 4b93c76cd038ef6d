"""
Peak memory of `hf-maskpro merge` and of `check_sparsity` on a checkpoint of random bfloat16 weights, once in one file
and once in shards, or by `--layout` in the one alone: shaped as a Llama, or with `--experts` as a mixture that stores
its experts one by one. Files are mapped, and what is mapped is the system's to drop: anonymous memory is without it,
resident memory with it. Writes twice the checkpoint's size to `--folder`, and deletes it again. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_maskpro import MaskProConfig
from hf_maskpro.subset import pack_codes
from hf_maskpro.tuner import MaskProLayer
from hf_maskpro.tuner.base import masks_digest


LAYOUTS = ("one file", "shards")


def config_of(gigabytes: float) -> LlamaConfig:
    """Llama-3.2-3B's layers, as many as it takes; a small one's below a gigabyte."""
    hidden, intermediate, heads = (3072, 8192, 24) if gigabytes >= 1 else (1024, 2816, 8)
    rest = 32_000 * hidden
    layer = hidden * (2 * hidden + 2 * hidden // heads * 8 + 3 * intermediate)
    layers = max(1, round((gigabytes * 1e9 / 2 - rest) / layer))
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def mixture_of(gigabytes: float) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's layers, as many as it takes; with fewer experts below a gigabyte."""
    experts = 128 if gigabytes >= 1 else 8
    layers = max(1, round(gigabytes * 1e9 / 2 / (experts * 3 * 2048 * 768)))
    return Qwen3MoeConfig(
        vocab_size=32_000,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=8,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def stored(name: str, shape: torch.Size) -> dict[str, torch.Size]:
    """The tensors that a parameter is stored as: of experts one or two for each."""
    prefix, _, parameter = name.rpartition(".")
    if not prefix.endswith(".experts"):
        return {name: shape}
    parts = ["gate_proj", "up_proj"] if parameter == "gate_up_proj" else [parameter]
    rows = shape[1] // len(parts)
    return {
        f"{prefix}.{number}.{part}.weight": torch.Size([rows, shape[2]])
        for number in range(shape[0])
        for part in parts
    }


def write_checkpoint(folder: Path, config: PreTrainedConfig, shards: bool) -> int:
    """Write a checkpoint tensor by tensor, every layer a shard of its own or all in one file; its size in bytes."""
    folder.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shapes: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            shapes |= stored(name, tensor.shape)
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if shards and name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors" if shards else "model.safetensors", []).append(name)
    for file, names in files.items():
        write_safetensors(folder / file, {name: shapes[name] for name in names})
    if shards:
        index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_safetensors(file: Path, shapes: dict[str, torch.Size]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(data).to_bytes(8, "little") + data)
        for shape in shapes.values():
            out.write((torch.randn(shape, dtype=torch.bfloat16) / 50).flatten().view(torch.uint8).numpy())


def write_adapter(folder: Path, config: PreTrainedConfig) -> None:
    """A random 2:4 mask adapter."""
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), MaskProConfig())
    codes = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.int32)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskProLayer):
            choice = torch.randint(6, (module.out_features, module.in_features // 4))
            masks[f"{name}.maskpro_mask"] = pack_codes(codes[choice], 2, 4)
    folder.mkdir()
    save_file(masks, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    saved = model.peft_config["default"]
    weights = sum(module.base_weight.numel() for module in model.modules() if isinstance(module, MaskProLayer))
    digest = masks_digest(masks, masks.__getitem__)
    saved.record_stage({}, 0.0, weights, digest, sum(mask.nbytes for mask in masks.values()))
    saved.save_pretrained(str(folder))


def memory_of(process: subprocess.Popen) -> Iterator[tuple[int, int]]:
    """The process's anonymous and resident memory in bytes, looked at a hundred times a second."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        # A process that has ended, and is not waited for yet, has none.
        if "RssAnon" in fields:
            yield 1024 * int(fields["RssAnon"].split()[0]), 1024 * int(fields["VmHWM"].split()[0])
        time.sleep(0.01)


def peak_of(command: list[str]) -> dict[str, float]:
    """Peak bytes and seconds of a command."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        anonymous, resident = map(max, zip(*memory_of(process), strict=True))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed.")
    return {"anonymous": anonymous, "resident": resident, "seconds": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--experts", action="store_true", help="a mixture of experts")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="of the checkpoint; both unless given")
    parser.add_argument("--folder", help="where to write; the system's temporary folder unless given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    config = mixture_of(args.gigabytes) if args.experts else config_of(args.gigabytes)
    rows = []
    idle = peak_of([sys.executable, "-c", "import hf_maskpro"])["anonymous"]
    for layout in args.layout or LAYOUTS:
        with tempfile.TemporaryDirectory(dir=args.folder) as parent:
            base, adapter, merged = (Path(parent) / name for name in ("base", "adapter", "merged"))
            size = write_checkpoint(base, config, layout == "shards")
            write_adapter(adapter, config)
            merge = [sys.executable, "-m", "hf_maskpro_cli", "merge", "--model", str(base)]
            check = f"import hf_maskpro; hf_maskpro.check_sparsity({str(merged)!r}, 2, 4)"
            for job, command in {
                "merge": [*merge, "--adapter", str(adapter), "--output", str(merged)],
                "check_sparsity": [sys.executable, "-c", check],
            }.items():
                rows.append({"layout": layout, "job": job, "checkpoint_bytes": size, **peak_of(command)})
    if args.json:
        print(json.dumps({"import_alone": idle, "rows": rows}))
        return
    table = Table(title=f"peak memory; importing the package alone takes {idle / 1e9:.2f} GB")
    for name in ("layout", "job", "checkpoint, GB", "anonymous, GB", "resident, GB", "seconds"):
        table.add_column(name)
    for row in rows:
        gigabytes = (f"{row[name] / 1e9:.2f}" for name in ("checkpoint_bytes", "anonymous", "resident"))
        table.add_row(row["layout"], row["job"], *gigabytes, f"{row['seconds']:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
