"""The model card of a mask adapter, made from the configuration that was saved beside it, and as it is pushed."""

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment
from markupsafe import Markup
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..version import REPOSITORY, __version__
from .files import private_folder


# What is between them is made anew with every save; what a user writes around them stays.
BEGIN, END = "<!-- made by hf_maskpro: begin -->", "<!-- made by hf_maskpro: end -->"
CARD_FILE, PLOT, CONFIG_FILE = "README.md", "learning.png", "adapter_config.json"
# What a card is made from besides the configuration.
CARD_FILES = (CARD_FILE, PLOT)
REPO = "user/repo"

# What an `adapter_config.json` holds.
Saved = dict[str, Any]


def write_card(folder: Path, saved: Saved, file_bytes: int) -> None:
    """
    Write the `README.md` of a saved mask adapter; the text that a user has put into one stays.

    Args:
        folder (`Path`): Where the adapter is saved.
        saved (`dict`): What its `adapter_config.json` holds.
        file_bytes (`int`): Bytes of the saved masks and logits.

    Raises:
        `ValueError`: if there is a `README.md` that is no model card.
    """
    card = load_card(folder / CARD_FILE) if (folder / CARD_FILE).is_file() else ModelCard("---\n{}\n---\n")
    _describe(cast(ModelCardData, card.data), saved)
    before, _, after = split_card(card.text)
    body = render(Path(__file__).with_name("card.md"), saved, **_adapter_facts(folder, saved, file_bytes))
    card.text = f"{before}{BEGIN}\n\n{body}\n{END}{after}"
    save_card(card, folder / CARD_FILE)


def load_card(path: Path) -> ModelCard:
    """
    Read a card.

    Raises:
        `ValueError`: if it is none.
    """
    try:
        return ModelCard.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is no model card, since its metadata cannot be read; mend or remove it.") from error


def save_card(card: ModelCard, path: Path) -> None:
    """Write a card, complete or not at all."""
    with private_folder(path.parent) as folder:
        card.save(folder / path.name)


def card_for_repository(card: ModelCard, api: HfApi, repo_id: str, name: str, revision: str | None) -> ModelCard:
    """
    A card as it is pushed: its example names the repository, and what a user has written there stays.

    Args:
        card (`ModelCard`): The card of the folder. A user's own text in it goes before that in the repository.
        api (`HfApi`): Who asks for the repository's card.
        repo_id (`str`): The repository.
        name (`str`): The card's path in it.
        revision (`str`, *optional*): The branch.
    """
    subfolder = name.rpartition("/")[0] or None
    for auto_class in ("AutoPeftModelForCausalLM", "AutoPeftModel"):
        base = card.data.get("base_model")
        lines = loading_lines(base, REPO, None, auto_class)
        card.text = card.text.replace(lines, loading_lines(base, repo_id, subfolder, auto_class))
    arguments = f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    card.text = card.text.replace(f'from_pretrained("{REPO}"', f"from_pretrained({arguments}")
    try:
        remote = load_card(Path(api.hf_hub_download(repo_id, name, revision=revision)))
    except (EntryNotFoundError, RevisionNotFoundError):
        return card
    before, made, after = split_card(card.text)
    if made and not (before.strip() or after.strip()):
        before, _, after = split_card(remote.text)
    card.text = before + made + after
    known = card.data.to_dict()
    for key, value in remote.data.to_dict().items():
        if key == "tags":
            card.data[key] = _tags(known.get(key, []), value)
        elif key not in ("model-index", *known):
            card.data[key] = value
    return card


def split_card(text: str) -> tuple[str, str, str]:
    """What a user wrote before, what is made here, and what a user wrote after it."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        return (f"{text.rstrip()}\n\n" if text.strip() else "\n"), "", "\n"
    end += len(END)
    return text[:begin], text[begin:end], text[end:]


def hub_id(name: str | None) -> str | None:
    """The name, if it can be that of a repository rather than a folder of this machine."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _tags(ours: list[str], others: list[str]) -> list[str]:
    """Ours first; the pattern of another mask does not stay."""
    return list(dict.fromkeys([*ours, *(tag for tag in others if not re.fullmatch(r"\d+:\d+", tag))]))


def _describe(data: ModelCardData, saved: Saved) -> None:
    data.library_name = "peft"
    data.base_model = hub_id(saved["base_model_name_or_path"]) or data.base_model
    data["base_model_relation"] = "adapter"
    if is_causal(saved):
        data.pipeline_tag = "text-generation"
    data.tags = _tags(["peft", "maskpro", "n-m-sparsity", pattern_of(saved)], data.tags or [])
    evaluations = last_stage(saved).get("evaluations", [])
    # Earlier results were of the mask that was here before.
    data.model_name = f"{pattern_of(saved)} mask" if evaluations else None
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
    ] or None


def pattern_of(saved: Saved) -> str:
    """The pattern as it is usually written, `"2:4"`."""
    return f"{saved['n']}:{saved['m']}"


def is_causal(saved: Saved) -> bool:
    """Whether the adapter is for a causal language model."""
    return saved["task_type"] == "CAUSAL_LM" or _base_class(saved) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _base_class(saved: Saved) -> str | None:
    return (saved["auto_mapping"] or {}).get("base_model_class")


def last_stage(saved: Saved) -> dict[str, Any]:
    """How the mask was made, as far as its last stage of training."""
    return (saved["lineage"] or [{"init_mask": saved["init_mask"], "groups_changed": {}}])[-1]


def share_changed(stage: dict[str, Any]) -> float:
    """The share of all groups that a stage changed; early files say it by layer alone, and then it is their mean."""
    shares = stage["groups_changed"].values()
    return stage.get("changed", sum(shares) / max(1, len(shares)))


def render(template: Path, saved: Saved, **variables: Any) -> str:
    """Fill in a template; whatever is put into it that is not `Markup` is text, and stays on its line."""
    environment = Environment(keep_trailing_newline=True, finalize=_plain)
    auto_class = "AutoModelForCausalLM" if is_causal(saved) else _base_class(saved) or "AutoModel"
    known = {"n": saved["n"], "m": saved["m"], "pattern": pattern_of(saved), "repo": REPO, "auto_class": auto_class}
    known["repository"] = REPOSITORY
    known["base_id"] = hub_id(saved["base_model_name_or_path"])
    return environment.from_string(template.read_text()).render(**known, **variables)


def _plain(value: Any) -> Any:
    """A value as Markdown that shows it: configurations are anybody's, and would bring HTML, links and headings."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    return re.sub(r"[\\`*\[\]|<>]|&(?=\w+;|#)", lambda found: f"&#{ord(found[0])};", text)


def loading_lines(base: str | None, repo: str, subfolder: str | None, auto_class: str) -> str:
    """The lines that load an adapter; PEFT looks for the base model in the same subfolder unless it is there first."""
    first = "import hf_maskpro  # without it PEFT does not know the method and raises KeyError: 'MASKPRO'\n"
    if base and not subfolder:
        return f'{first}from peft import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{repo}")'
    of_base = auto_class.replace("Peft", "")
    arguments = f'"{repo}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    return (
        f"{first}from peft import PeftModel\nfrom transformers import {of_base}\n\n"
        f'base = {of_base}.from_pretrained("{base or "path/to/the/base"}")\n'
        f"model = PeftModel.from_pretrained(base, {arguments})"
    )


def _adapter_facts(folder: Path, saved: Saved, file_bytes: int) -> dict[str, Any]:
    """What the template of an adapter's card is filled with."""
    base, stage = saved["base_model_name_or_path"], last_stage(saved)
    shares = {name: stage["groups_changed"][name] for name in sorted(stage["groups_changed"], key=_by_number)}
    assert saved["target_weights"] is not None
    packages = ("peft", "transformers", "torch")
    shown = hub_id(base) or (Path(base).name if base else None)
    bits = 8 * file_bytes / saved["target_weights"]
    return {
        "base": shown,
        "layers": shares,
        "facts": {
            "Base model": shown or "unknown",
            "Revision of the base": saved["revision"] or "not recorded",
            "Pattern": f"{pattern_of(saved)}: {1 - saved['n'] / saved['m']:.0%} of the masked weights are zero",
            "Masked layers": ", ".join(sorted({name.rpartition(".")[2] for name in shares})),
            "Masked weights": f"{saved['target_weights']:,}",
            "Size of the masks": f"{file_bytes:,} bytes, {bits:.3f} bits per masked weight",
            "Made with": ", ".join(
                [f"hf-maskpro {__version__}", *(f"{name} {version(name).partition('+')[0]}" for name in packages)]
            ),
        },
        "stages": [_stage_facts(known) for known in saved["lineage"] or []],
        "plot": PLOT if (folder / PLOT).is_file() else None,
        "evaluations": stage.get("evaluations", []),
        "loading": loading_lines(hub_id(base), REPO, None, f"AutoPeftModel{'ForCausalLM' * is_causal(saved)}"),
    }


def _stage_facts(stage: dict[str, Any]) -> dict[str, Any]:
    calibration = stage.get("calibration")
    # First, though a file has its keys in alphabetical order.
    settings = {"estimator": ""} | stage.get("training", {})
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in settings.items()}
    training = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value != ""]
    return {
        "start": stage["init_mask"],
        "calibration": f"{calibration.get('text', 'text')}, {calibration['tokens']:,} tokens" if calibration else "",
        "training": ", ".join(training).removeprefix("estimator "),
        "share": 100 * share_changed(stage),
    }


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
