"""The model card of a mask adapter, made from its configuration and file alone."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment


if TYPE_CHECKING:
    from .config import MaskProConfig


# What is between them is made anew with every save; what a user writes around them stays.
BEGIN, END = "<!-- made by hf_maskpro: begin -->", "<!-- made by hf_maskpro: end -->"
PLOT = "learning.png"
REPO = "user/repo"


def write_card(folder: Path, config: "MaskProConfig", file_bytes: int) -> None:
    """
    Write the `README.md` of a saved mask adapter; the text that a user has put into one stays.

    Args:
        folder (`Path`): Where `adapter_config.json` is.
        config ([`MaskProConfig`]): As it was saved.
        file_bytes (`int`): Bytes of the saved tensors.
    """
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard("---\nlibrary_name: peft\n---\n")
    _describe(cast(ModelCardData, card.data), config)
    before, _, after = split_card(card.text)
    card.text = f"{before}{BEGIN}\n\n{_body(folder, config, file_bytes)}\n{END}{after}"
    temporary = path.with_name(f".{path.name}")
    card.save(temporary)
    temporary.replace(path)


def write_merged_card(folder: Path, config: "MaskProConfig") -> None:
    """Write the card of a checkpoint into which a mask adapter was merged."""
    base, causal = hub_id(config.base_model_name_or_path), _is_causal(config)
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation" if causal else None,
        tags=["maskpro", "n-m-sparsity", config.pattern],
    )
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    text = f"""{BEGIN}

# {config.pattern} sparse weights{of}

Of every {config.m} consecutive weights at most {config.n} are not zero, in
{len(_last_stage(config)["groups_changed"])} linear layers; what is kept is as in the base model. It is an ordinary
checkpoint:

```python
from transformers import {"AutoModelForCausalLM" if causal else "AutoModel"}

model = {"AutoModelForCausalLM" if causal else "AutoModel"}.from_pretrained("{REPO}", dtype="auto")
```

It runs at dense speed unless a runtime has kernels for this pattern.

{END}
"""
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def _is_causal(config: "MaskProConfig") -> bool:
    base_class = (config.auto_mapping or {}).get("base_model_class", "")
    return config.task_type == "CAUSAL_LM" or base_class.endswith("ForCausalLM")


def _last_stage(config: "MaskProConfig") -> dict[str, Any]:
    return (config.lineage or [{"init_mask": config.init_mask, "groups_changed": {}}])[-1]


def split_card(text: str) -> tuple[str, str, str]:
    """What a user wrote before, what is made here, and what a user wrote after it."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        return (f"{text.rstrip()}\n\n" if text.strip() else "\n"), "", "\n"
    end += len(END)
    return text[:begin], text[begin:end], text[end:]


def hub_id(name: str | None) -> str | None:
    """The name, if it can be that of a repository rather than a folder of this machine."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _describe(data: ModelCardData, config: "MaskProConfig") -> None:
    data.library_name = "peft"
    data.base_model = hub_id(config.base_model_name_or_path) or data.base_model
    data["base_model_relation"] = "adapter"
    if config.task_type == "CAUSAL_LM" or str((config.auto_mapping or {}).get("base_model_class")).endswith(
        "CausalLM"
    ):
        data.pipeline_tag = "text-generation"
    tags = ["peft", "maskpro", "n-m-sparsity", config.pattern]
    data.tags = tags + [tag for tag in data.tags or [] if tag not in tags]
    evaluations = _evaluations(config)
    if evaluations:
        data.model_name = f"{config.pattern} mask"
        data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=entry["dataset"],
                dataset_name=entry["dataset"],
                dataset_config=entry["protocol"],
                metric_type=entry["metric"],
                metric_value=entry["value"],
            )
            for entry in evaluations
        ]
    elif data.eval_results is not None:
        # They were of the mask that was here before.
        data.eval_results = data.model_name = None


def _evaluations(config: "MaskProConfig") -> list[dict[str, Any]]:
    return _last_stage(config).get("evaluations", [])


def _body(folder: Path, config: "MaskProConfig", file_bytes: int) -> str:
    lineage = config.lineage or []
    last = _last_stage(config)
    base = config.base_model_name_or_path
    template = Environment(keep_trailing_newline=True).from_string((Path(__file__).parent / "card.md").read_text())
    return template.render(
        n=config.n,
        m=config.m,
        pattern=config.pattern,
        base=hub_id(base) or (Path(base).name if base else None),
        base_id=hub_id(base),
        layers=last["groups_changed"],
        facts=_facts(config, last, file_bytes),
        stages=[{"init_mask": stage["init_mask"], "share": 100 * _mean(stage["groups_changed"])} for stage in lineage],
        plot=PLOT if (folder / PLOT).is_file() else None,
        evaluations=_evaluations(config),
        repo=REPO,
    )


def _mean(shares: dict[str, float]) -> float:
    return sum(shares.values()) / max(1, len(shares))


def _facts(config: "MaskProConfig", stage: dict[str, Any], file_bytes: int) -> dict[str, str]:
    """What the table at the head of the card says."""
    base = config.base_model_name_or_path
    facts = {
        "Base model": f"{hub_id(base) or (Path(base).name if base else 'unknown')}",
        "Revision of the base": config.revision or "not recorded",
        "Pattern": f"{config.pattern}: {1 - config.n / config.m:.0%} of the masked weights are zero",
        "Masked layers": ", ".join(sorted({name.rpartition(".")[2] for name in stage["groups_changed"]})),
        "Starting mask": stage["init_mask"],
    }
    if calibration := stage.get("calibration"):
        facts["Calibration"] = f"{calibration.get('text', 'text')}, {calibration['tokens']:,} tokens"
    if training := stage.get("training"):
        facts["Estimator"] = ", ".join(
            f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{name.replace('_', ' ')} {value}"
            for name, value in training.items()
        ).removeprefix("estimator ")
    assert config.target_weights is not None
    facts["Masked weights"] = f"{config.target_weights:,}"
    facts["Size of the masks"] = (
        f"{file_bytes:,} bytes, {8 * file_bytes / config.target_weights:.3f} bits per masked weight"
    )
    packages = ("hf-maskpro", "peft", "transformers", "torch")
    return facts | {"Made with": ", ".join(f"{name} {version(name).partition('+')[0]}" for name in packages)}
