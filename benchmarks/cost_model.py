"""
Memory, time and traffic of learning a mask, on paper: the table of docs/scaling.md. Constants are measured: bytes per
weight by `memory.py`, rates of an H200 by `mask_step.py`, both in docs/assets. Activations and waiting are left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path


ASSETS = Path(__file__).parents[1] / "docs" / "assets"
POINTS = json.loads((ASSETS / "cost_model.json").read_text())
STEP = json.loads((ASSETS / "h200.json").read_text())["mask_step"]
# Operations a second that a whole forward pass of 32 x 128 tokens sustains.
RATE = 2 * STEP["target_weights"] * 32 * 128 / STEP["forward_s"]
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


MODELS = {
    "1B": Decoder(22, 2048, 5632, 256, 32000),
    "7B": Decoder(32, 4096, 11008, 4096, 32000),
    "70B": Decoder(80, 8192, 28672, 1024, 32000),
    "405B": Decoder(126, 16384, 53248, 1024, 128256),
}


@dataclass(frozen=True)
class Estimator:
    """What a step keeps beside the base weights, in bytes a target weight, and computes, a weight and token."""

    name: str
    added: float
    operations: int
    logit_bytes: int
    sends_gradients: bool

    def memory(self, weights: int, targets: int) -> float:
        """Bytes, of which the base model takes two a weight."""
        return 2 * weights + self.added * targets


# By layout where nothing else is there at the peak: logits, packed mask and, of the lean one, a byte of moment.
RESIDUAL = Estimator("residual, bfloat16 logits", 2 + PACKED, 2, 2, False)
LEAN = Estimator("lean simple, bfloat16 logits", 2 + 1 + PACKED, 8, 2, False)
SIMPLE = Estimator("simple, bfloat16 logits", POINTS["added_bytes_per_weight"]["simple, bfloat16 logits"], 6, 2, True)
ESTIMATORS = (RESIDUAL, LEAN, SIMPLE)


def seconds(model: Decoder, estimator: Estimator, processes: int) -> float:
    """
    A step of 32 x 128 tokens in each of so many processes. `residual` has its baseline cached, and moves the logits
    once for every process's mask.
    """
    arithmetic = estimator.operations * model.weights * TOKENS / RATE
    scale = model.targets / STEP["target_weights"]
    updates = 1 if estimator.sends_gradients or estimator is LEAN else processes
    return arithmetic + scale * (STEP["compiled_sample_s"] + updates * STEP["compiled_update_s"])


def traffic(model: Decoder, estimator: Estimator, processes: int) -> float:
    """Bytes that a process sends in a step: two scalars and a count, or the gradients of all logits around a ring."""
    if processes == 1:
        return 0
    return 2 * (processes - 1) / processes * estimator.logit_bytes * model.targets if estimator.sends_gradients else 24


def block_memory(model: Decoder, tokens: int = 8 * 256, calibration: int = 128 * 256) -> dict[str, float]:
    """
    Bytes of learning one decoder layer after another, without the other layers' weights: bfloat16 weights and their
    masked copies, logits and two moments in float32, the gradient of the largest linear layer, activations of a batch
    with a backward pass, and for all of the calibration text what enters the layer, dense and masked, and its target.
    """
    largest = model.hidden * model.intermediate
    return {
        "weights and masked copies": 4 * model.layer,
        "logits and moments": 12 * model.layer,
        "gradient of one linear layer": (4 + 2 + 2) * largest,
        "activations": 2 * tokens * (14 * model.hidden + 5 * model.intermediate),
        "calibration text": 3 * 2 * calibration * model.hidden,
    }


def table() -> str:
    """The table of docs/scaling.md."""
    lines = [
        "| model | estimator | memory, GB | seconds a step on 1 | 8 | 64 | 1,024 | bytes sent a step |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, model in MODELS.items():
        for estimator in ESTIMATORS:
            memory = estimator.memory(model.weights, model.targets) / 1e9
            # The lean one runs in a single process.
            counts = DEVICES[:1] if estimator is LEAN else DEVICES
            times = [f"{seconds(model, estimator, count):,.2f}" for count in counts]
            times += ["refused"] * (len(DEVICES) - len(counts))
            sent = "" if estimator is LEAN else f"{traffic(model, estimator, DEVICES[-1]):,.0f}"
            lines.append(f"| {name} | {estimator.name} | {memory:,.1f} | {' | '.join(times)} | {sent} |")
    return "\n".join(lines)


def main() -> None:
    print(table())
    print("\n| one decoder layer at a time, GB |", " | ".join(MODELS), "|")
    parts = {name: block_memory(model) for name, model in MODELS.items()}
    for part in parts["1B"]:
        print(f"| {part} |", " | ".join(f"{known[part] / 1e9:.1f}" for known in parts.values()), "|")
    print("| together |", " | ".join(f"{sum(known.values()) / 1e9:.1f}" for known in parts.values()), "|")


if __name__ == "__main__":
    main()
