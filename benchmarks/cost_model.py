"""
Memory, time and traffic of learning a mask, on paper: tables of docs/scaling.md and of the README. Bytes a weight are
counted, from what is stored. Of time two rates and the seconds of a mask step are measured, on an H200. `--check`
prints what the model says beside what was measured and is in none of its constants. Attention and waiting for the host
are left out.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


ASSETS = Path(__file__).parents[1] / "docs" / "assets"
POINTS = json.loads((ASSETS / "cost_model.json").read_text())
GPU = json.loads((ASSETS / "h200.json").read_text())
STEP = GPU["mask_step"]
# Operations a second of a decoder layer's matrix products, four of attention's size and three of the MLP's, alone.
_PRODUCTS = [
    (product, 4 if product["out_features"] == product["in_features"] else 2 - (product["in_features"] > 4096))
    for product in GPU["products_bf16"]
    if product["tokens"] == 8192
]
RATE = (
    sum(times * 2 * each["out_features"] * each["in_features"] * each["tokens"] for each, times in _PRODUCTS)
    / sum(times * each["dense_ms"] for each, times in _PRODUCTS)
    * 1000
)
# Bytes a second of a large copy.
COPY = STEP["copy_gb_per_s"] * 1e9
PACKED = 1 / 12
DEVICES = (1, 8, 64, 1024)
TOKENS = 32 * 128


@dataclass(frozen=True)
class Decoder:
    """A Llama's shape."""

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int

    @property
    def layer(self) -> int:
        """Weights of a decoder layer's linear layers, all of which are masked."""
        return self.hidden * (2 * self.hidden + 2 * self.key_value + 3 * self.intermediate)

    @property
    def targets(self) -> int:
        return self.layers * self.layer

    @property
    def weights(self) -> int:
        return self.targets + 2 * self.vocabulary * self.hidden

    @property
    def activations(self) -> int:
        """Numbers that a token leaves in a decoder layer: in and out of products, norms, rotations and gates."""
        return 14 * self.hidden + 5 * self.intermediate

    def forward(self, tokens: int, operations: int = 2) -> float:
        """Seconds of so many operations a weight and token: of products, and of moving numbers of two bytes twice."""
        products = operations * (self.targets + self.vocabulary * self.hidden) * tokens / RATE
        return products + operations / 2 * 2 * 2 * self.layers * self.activations * tokens / COPY


MODELS = {
    "1B": Decoder(22, 2048, 5632, 256, 32000),
    "7B": Decoder(32, 4096, 11008, 4096, 32000),
    "70B": Decoder(80, 8192, 28672, 1024, 32000),
    "405B": Decoder(126, 16384, 53248, 1024, 128256),
}


@dataclass(frozen=True)
class Estimator:
    """
    What a step keeps beside the base weights at its peak, in bytes a target weight, what it computes, a weight and
    token, and how many bytes a target weight its optimizer reads and writes.
    """

    name: str
    added: float
    operations: int
    moved: int = 0
    draws: bool = True
    processes: bool = True
    sends: int = 0

    def memory(self, weights: int, targets: int) -> float:
        """Bytes, of which the base model takes two a weight."""
        return 2 * weights + self.added * targets


def residual(logits: int) -> Estimator:
    return Estimator(_name("residual", logits), logits + PACKED, 2)


def _pull(logits: int) -> int:
    """A gradient is made of weight and logits; its norm and that of the loss's are taken, and it is added."""
    return 2 + 7 * logits


# The gradient is copied to float32, squared, and averaged by rows and by columns; the masked weight is read again.
_CURVATURE = 6 + 8 + 8 + 2


def lean(logits: int) -> Estimator:
    """Beside the logits two moments of a byte; it runs with gradient checkpointing."""
    moved = 3 * logits + 4 + _pull(logits) + _CURVATURE
    return Estimator(_name("lean simple", logits), logits + 2 + PACKED, 8, moved, processes=False)


def simple(logits: int) -> Estimator:
    """Logits, two moments and the gradient."""
    moved = 7 * logits + _pull(logits) + _CURVATURE
    return Estimator(_name("simple", logits), 4 * logits + PACKED, 6, moved, sends=logits)


def proxsparse(logits: int) -> Estimator:
    """A float32 copy of the weights with two moments and a gradient; the proximal operator goes over it once more."""
    return Estimator(_name("proxsparse", logits), 16 + logits + PACKED, 6, 28 + 8, draws=False, processes=False)


def maskllm(logits: int) -> Estimator:
    """The same of one and a half gates a weight, from which the forward pass mixes six masks a group."""
    return Estimator(_name("maskllm", logits), 24 + logits + PACKED, 6, 42 + 12, draws=False, processes=False)


def _name(estimator: str, logits: int) -> str:
    return f"{estimator}, {'bfloat16' if logits == 2 else 'float32'} logits"


ESTIMATORS = tuple(make(2) for make in (residual, lean, simple, proxsparse, maskllm))


def seconds(model: Decoder, estimator: Estimator, processes: int) -> float:
    """
    A step of 32 x 128 tokens in each of so many processes. `residual` has its baseline cached, and moves the logits
    once for every process's mask.
    """
    scale = model.targets / STEP["target_weights"]
    updates = processes if estimator.operations == 2 else 1
    masks = scale * (STEP["compiled_sample_s"] + updates * STEP["compiled_update_s"]) * estimator.draws
    return model.forward(TOKENS, estimator.operations) + masks + estimator.moved * model.targets / COPY


def traffic(model: Decoder, estimator: Estimator, processes: int) -> float:
    """Bytes that a process sends in a step: two scalars and a count, or the gradients of all logits around a ring."""
    if processes == 1:
        return 0
    return 2 * (processes - 1) / processes * estimator.sends * model.targets if estimator.sends else 24


def block_memory(model: Decoder, tokens: int = 8 * 256, calibration: int = 128 * 256) -> dict[str, float]:
    """
    Bytes of learning one decoder layer after another, without the other layers' weights: bfloat16 weights and their
    masked copies, logits and two moments in float32, the gradient of the largest linear layer, activations of a batch
    with a backward pass, and for all of the calibration text what enters the layer, and what is to leave it.
    """
    largest = model.hidden * model.intermediate
    return {
        "weights and masked copies": 4 * model.layer,
        "logits and moments": 12 * model.layer,
        "gradient of one linear layer": (4 + 2 + 2) * largest,
        "activations": 2 * tokens * model.activations,
        "calibration text": 2 * 2 * calibration * model.hidden,
    }


@dataclass(frozen=True)
class Check:
    """What the model says of something that was measured, and is in none of its constants."""

    what: str
    unit: str
    computed: float
    measured: float


def checks() -> list[Check]:
    """Every measured point."""
    found = []
    for make in (residual, lean, simple, proxsparse, maskllm):
        for logits in (2, 4):
            if (name := make(logits).name) in POINTS["added_bytes_per_weight"]:
                measured = POINTS["added_bytes_per_weight"][name]
                found.append(Check(f"a step of {name}", "bytes a target weight", make(logits).added, measured))
    process = POINTS["process"]
    whole = lean(2).memory(process["weights"], process["targets"]) / 1e9
    found.append(Check("a whole process of lean simple, 1.1B", "GB", whole, process["bytes"] / 1e9))
    forward = MODELS["7B"].forward(TOKENS)
    found.append(Check("a forward pass of 7B on an H200", "seconds", forward, STEP["forward_s"]))
    cpu, run = POINTS["cpu"], POINTS["run"]
    # Forward and backward, three times a forward pass, and a mask.
    step = 3 * cpu["forward_s"] * run["tokens"] / cpu["tokens"] + cpu["mask_step_s"]
    what = f"{run['steps']} steps of simple on 2 CPU cores, from a forward pass and a mask step there"
    found.append(Check(what, "seconds", run["steps"] * step, run["seconds"]))
    return found


def check_table() -> str:
    """The second table of docs/scaling.md."""
    lines = ["| what | unit | computed | measured | measured / computed |", "|---|---|---:|---:|---:|"]
    for each in checks():
        digits = 3 if each.measured < 1 else 0 if each.measured > 100 else 2
        figures = [
            f"{each.computed:.{digits}f}",
            f"{each.measured:.{digits}f}",
            f"{each.measured / each.computed:.2f}",
        ]
        lines.append(f"| {each.what} | {each.unit} | {' | '.join(figures)} |")
    return "\n".join(lines)


def table() -> str:
    """The table of docs/scaling.md."""
    lines = [
        "| model | estimator | memory, GB | seconds a step on 1 | 8 | 64 | 1,024 | bytes sent a step |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, model in MODELS.items():
        for estimator in ESTIMATORS:
            memory = estimator.memory(model.weights, model.targets) / 1e9
            counts = DEVICES if estimator.processes else DEVICES[:1]
            times = [f"{seconds(model, estimator, count):,.2f}" for count in counts]
            times += ["refused"] * (len(DEVICES) - len(counts))
            sent = f"{traffic(model, estimator, DEVICES[-1]):,.0f}" if estimator.processes else ""
            lines.append(f"| {name} | {estimator.name} | {memory:,.1f} | {' | '.join(times)} | {sent} |")
    return "\n".join(lines)


def memory_table() -> str:
    """The table of the README."""
    rows = {
        "`residual`, bfloat16 logits": residual(2).added,
        "`residual`, float32 logits": residual(4).added,
        "`simple`, bfloat16 logits, `optimizer_in_backward`": lean(2).added,
        # Logits and gradient, and beside them a float32 number for every four weights, or two moments of a byte.
        "`simple`, bfloat16 logits, Adafactor": 2 * 2 + 1 + PACKED,
        "`simple`, bfloat16 logits, 8-bit AdamW": 2 * 2 + 2 + PACKED,
        "`simple`, bfloat16 logits, AdamW": simple(2).added,
        "`simple`, float32 logits, AdamW": simple(4).added,
        "`proxsparse`, bfloat16 logits": proxsparse(2).added,
        "`maskllm`, bfloat16 logits": maskllm(2).added,
    }
    models = {name: MODELS[name] for name in ("1B", "7B", "70B")}
    lines = [f"| learner | bytes beside a masked weight | {' | '.join(models)} |", "|---|---:|---:|---:|---:|"]
    for name, added in rows.items():
        memory = [f"{(2 * model.weights + added * model.targets) / 1e9:,.1f}" for model in models.values()]
        lines.append(f"| {name} | {added:.2f} | {' | '.join(memory)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="print computed beside measured")
    if parser.parse_args().check:
        print(check_table())
        return
    print(table())
    print(f"\n{memory_table()}")
    print("\n| one decoder layer at a time, GB |", " | ".join(MODELS), "|")
    parts = {name: block_memory(model) for name, model in MODELS.items()}
    for part in parts["1B"]:
        print(f"| {part} |", " | ".join(f"{known[part] / 1e9:.1f}" for known in parts.values()), "|")
    print("| together |", " | ".join(f"{sum(known.values()) / 1e9:.1f}" for known in parts.values()), "|")


if __name__ == "__main__":
    main()
