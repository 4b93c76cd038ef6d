"""Mask adapters on the Hub: push, look into, record results."""

import inspect
import json
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from peft import PeftModel
from safetensors import SafetensorError, safe_open

from .subset import check_packed
from .subset.codec import word_layout
from .tuner import MaskProConfig, saved_config
from .tuner.card import CARD_FILE, card_for_repository, load_card, save_card, write_card
from .tuner.registration import NAME


CONFIG_FILE, MASK_FILE = "adapter_config.json", "adapter_model.safetensors"

# What may run code when it is read.
_NOT_PUSHED = (".bin", ".pt", ".pth", ".pkl")


def push_folder(
    folder: str | Path,
    repo_id: str,
    subfolder: str | None = None,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload mask adapter",
    commit_description: str | None = None,
) -> CommitInfo:
    """
    Push a saved adapter or merged checkpoint to the Hub, in one commit.

    A user's own text in the card stays: the folder's if there is any, else the repository's. Hidden files, checkpoints
    of a training and pickles are not pushed.

    Args:
        folder (`str` or `Path`): The folder. Nothing in it changes.
        repo_id (`str`): The repository, which is made if there is none.
        subfolder (`str`, *optional*): The folder of the repository to push to.
        private (`bool`, *optional*): Whether a new repository is private; `None` leaves it to the account's default.
        token (`bool` or `str`, *optional*): A token to use instead of the stored one.
        revision (`str`, *optional*): The branch to push to, made if there is none.
        create_pr (`bool`): Open a pull request instead.
        commit_message (`str`): First line of the commit's message.
        commit_description (`str`, *optional*): The rest of it.

    Returns:
        `CommitInfo`: The commit; of a push that changes nothing, the present head.

    Raises:
        `ValueError`: if the folder has neither an adapter nor a checkpoint, or the Hub rejects a card's metadata.
        `HfHubHTTPError`: if the Hub refuses.
    """
    folder = Path(folder)
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ValueError(f"subfolder is {subfolder!r}; name a folder inside the repository.")
    roots = [folder] if (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file() else []
    # Where no adapter is called "default", PEFT saves each to a subfolder of its name.
    roots = roots or [path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))]
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    files = [path for path in files if _is_pushed(path.relative_to(folder))]
    if not any(path.name in (CONFIG_FILE, "config.json") for path in files):
        raise ValueError(f"{folder} holds neither {CONFIG_FILE} nor config.json; pass an adapter's or model's folder.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations = []
    for path in files:
        name = (Path(subfolder or "") / path.relative_to(folder)).as_posix()
        content: str | bytes = str(path)
        if path.name == CARD_FILE:
            content = str(card_for_repository(load_card(path), api, repo_id, name, revision)).encode()
        operations.append(CommitOperationAdd(name, content))
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _is_pushed(path: Path) -> bool:
    hidden = any(part.startswith((".", "checkpoint-")) for part in path.parts)
    return not hidden and path.suffix not in _NOT_PUSHED


def read_masks(folder: str | Path) -> tuple[MaskProConfig, dict[str, torch.Tensor]]:
    """
    Read a mask adapter without its base model, checking every word of it.

    Args:
        folder (`str` or `Path`): The adapter's folder.

    Returns:
        `tuple[MaskProConfig, dict[str, torch.Tensor]]`: Its configuration, and by layer the packed mask, uint8
        `[out_features, bytes]`.

    Raises:
        `ValueError`: if it is not a mask adapter, or anything in it is not as it should be.
    """
    folder = Path(folder)
    config = saved_config(folder)
    digits, size = word_layout(config.n, config.m)
    masks = {}
    try:
        with safe_open(folder / MASK_FILE, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, the handle is no dict
                if _kind(key, config) != "mask":
                    continue
                packed = tensors.get_tensor(key)
                if packed.ndim != 2:
                    raise ValueError(f"{key} has shape {list(packed.shape)}, not [out_features, bytes].")
                check_packed(packed, config.n, config.m, packed.shape[1] // size * digits * config.m)
                masks[_layer(key)] = packed
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder / MASK_FILE} is not a file of masks: {error}") from error
    _check_whole(config, masks)
    return config, masks


def _kind(key: str, config: MaskProConfig) -> str:
    """What a tensor of an adapter's file is: `mask`, `theta` or a weight that `modules_to_save` names."""
    kind = key.rpartition(".maskpro_")[2]
    if kind in ("mask", "theta"):
        return kind
    modules = [f".{module}." for module in config.modules_to_save or []]
    if not any(module in key for module in modules):
        raise ValueError(f"it holds {key}, which is neither a mask nor of modules_to_save.")
    return "weight"


def _layer(key: str) -> str:
    """The layer whose mask a tensor of an adapter's file is."""
    return key.removeprefix("base_model.model.").removesuffix(".maskpro_mask")


def _check_whole(config: MaskProConfig, layers: Collection[str]) -> None:
    expected = config.lineage[-1]["groups_changed"] if config.lineage else {}
    if missing := sorted(set(expected) - set(layers)):
        raise ValueError(f"the adapter file has no mask for {missing[0]}.")


def inspect_adapter(source: str, revision: str | None = None, subfolder: str | None = None) -> dict[str, Any]:
    """
    What a mask adapter holds.

    Of one on the Hub that is not in the cache it reads the configuration and the header of the safetensors file.

    Args:
        source (`str`): Its folder, or the Hub id of its repository.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        subfolder (`str`, *optional*): The adapter's folder in it.

    Raises:
        `ValueError`: if it is not a mask adapter, or is not whole.
    """
    folder = Path(source) / (subfolder or "")
    name = f"{subfolder}/{MASK_FILE}" if subfolder else MASK_FILE
    checked = folder.is_dir()
    if not checked:
        folder = Path(hf_hub_download(source, CONFIG_FILE, subfolder=subfolder, revision=revision)).parent
        checked = isinstance(try_to_load_from_cache(source, name, revision=revision), str)
    if checked:
        config, masks = read_masks(folder)
        layers, size = list(masks), (folder / MASK_FILE).stat().st_size
    else:
        config = saved_config(folder)
        header = HfApi().parse_safetensors_file_metadata(source, name, revision=revision)
        layers = [_layer(key) for key in header.tensors if _kind(key, config) == "mask"]
        _check_whole(config, layers)
        size = get_hf_file_metadata(hf_hub_url(source, name, revision=revision)).size or 0
    stages = config.lineage or []
    return {
        "kind": "mask adapter",
        "pattern": config.pattern,
        "base_model": config.base_model_name_or_path,
        "layers": len(layers),
        "target_weights": config.target_weights,
        "file_bytes": size,
        "bits_per_weight": 8 * size / config.target_weights if config.target_weights else None,
        "holds_logits": config.save_logits,
        "started_from": [stage["init_mask"] for stage in stages],
        "groups_changed": [mean(stage["groups_changed"].values() or [0]) for stage in stages],
        "checked": "every word" if checked else "the header of the file",
    }


def record_evaluation(folder: str | Path, dataset: str, metric: str, value: float, protocol: str) -> None:
    """
    Put a result into a saved adapter's configuration and card, in the place of an earlier one by the same protocol.

    Args:
        folder (`str` or `Path`): The adapter's folder.
        dataset (`str`): What was measured on.
        metric (`str`): What was measured, for instance `"perplexity"`.
        value (`float`): The result.
        protocol (`str`): How: window, tokens.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    raw = json.loads(path.read_text(encoding="utf-8"))
    entry = {"dataset": dataset, "metric": metric, "value": value, "protocol": protocol}
    if not raw.get("lineage"):
        raise ValueError(f"{path} does not say how its mask was made; save the adapter again.")
    stage = raw["lineage"][-1]
    others = [known for known in stage.get("evaluations", []) if {**known, "value": value} != entry]
    stage["evaluations"] = [*others, entry]
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(raw, indent=2, sort_keys=True), encoding="utf-8")
    temporary.replace(path)
    with safe_open(folder / MASK_FILE, framework="pt") as tensors:
        own = [key for key in tensors.keys() if ".maskpro_" in key]  # noqa: SIM118, the handle is no dict
        size = sum(tensors.get_tensor(key).nbytes for key in own)
    write_card(folder, saved_config(folder), size)


def _for_masks(own: Callable[..., Any], name: str) -> None:
    """Let a method of `PeftModel` do something else for mask adapters; PEFT has no hook for either."""
    original = inspect.unwrap(getattr(PeftModel, name))

    @wraps(original)
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        masks = any(config.peft_type == NAME for config in self.peft_config.values())
        return (own if masks else original)(self, *args, **kwargs)

    setattr(PeftModel, name, method)


def _no_card(model: PeftModel, output_dir: str) -> None:
    """PEFT's is a form to fill in; `MaskProConfig.save_pretrained` writes ours."""


def _push_model(
    model: PeftModel,
    repo_id: str,
    *,
    tags: list[str] | None = None,
    commit_message: str | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """`PeftModel.push_to_hub`, which would put a card without content in the place of the adapter's."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if tags:
            for path in Path(folder).rglob(CARD_FILE):
                card = load_card(path)
                card.data["tags"] = [*card.data["tags"], *tags]
                save_card(card, path)
        return push_folder(folder, repo_id, commit_message=commit_message or "Upload mask adapter", **kwargs)


_for_masks(_no_card, "create_or_update_model_card")
_for_masks(_push_model, "push_to_hub")
