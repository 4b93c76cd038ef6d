"""Mask adapters on the Hub: push, look into, record results."""

import inspect
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open

from .subset import check_packed
from .subset.codec import word_layout
from .tuner import MaskProConfig
from .tuner.card import REPO, split_card, write_card
from .tuner.registration import NAME


CONFIG_FILE, MASK_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"

# What may run code when it is read, what a Trainer needs to resume, and what is hidden.
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
    roots = [folder] if (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file() else []
    # Where no adapter is called "default", PEFT saves each to a subfolder of its name.
    roots = roots or [path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))]
    if not roots:
        raise ValueError(f"{folder} holds neither {CONFIG_FILE} nor config.json; pass an adapter's or model's folder.")
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    files = [path for path in files if _is_pushed(path.relative_to(folder))]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations = []
    for path in files:
        name = (Path(subfolder or "") / path.relative_to(folder)).as_posix()
        content: str | bytes = str(path)
        if path.name == CARD_FILE:
            content = _card_for(ModelCard.load(path), api, repo_id, name, revision).encode()
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


def _card_for(card: ModelCard, api: HfApi, repo_id: str, name: str, revision: str | None) -> str:
    """A card as it is pushed: its example names the repository, and a user's text and metadata there survive."""
    subfolder = Path(name).parent.as_posix()
    arguments = f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder != "." else "")
    card.text = card.text.replace(f'from_pretrained("{REPO}"', f"from_pretrained({arguments}")
    try:
        remote = ModelCard.load(api.hf_hub_download(repo_id, name, revision=revision))
    except EntryNotFoundError:
        return str(card)
    before, made, after = split_card(card.text)
    theirs = split_card(remote.text)
    if made and not (before.strip() or after.strip()):
        before, after = theirs[0], theirs[2]
    card.text = before + made + after
    known = card.data.to_dict()
    for key, value in remote.data.to_dict().items():
        if key == "tags":
            card.data[key] = list(dict.fromkeys([*known.get(key, []), *value]))
        elif key not in ("model-index", *known):
            card.data[key] = value
    return str(card)


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
    config = read_config(folder / CONFIG_FILE)
    digits, size = word_layout(config.n, config.m)
    masks = {}
    try:
        with safe_open(folder / MASK_FILE, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, the handle is no dict
                if key.endswith(".maskpro_mask"):
                    packed = tensors.get_tensor(key)
                    if packed.ndim != 2:
                        raise ValueError(f"{key} has shape {list(packed.shape)}, not [out_features, bytes].")
                    check_packed(packed, config.n, config.m, packed.shape[1] // size * digits * config.m)
                    masks[layer_of(key)] = packed
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder / MASK_FILE} is not a file of masks: {error}") from error
    if missing := sorted(set(_layers(config)) - set(masks)):
        raise ValueError(f"the adapter file has no mask for {missing[0]}.")
    return config, masks


def read_config(path: Path) -> MaskProConfig:
    """
    Read a mask adapter's configuration.

    Raises:
        `ValueError`: if it is not one.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("peft_type") != NAME:
            raise ValueError(f"it is of a {raw.get('peft_type')} adapter")
        config = MaskProConfig.from_pretrained(str(path.parent))
        stages = [(stage["init_mask"], dict.items(stage["groups_changed"])) for stage in config.lineage or []]
        shares = [share for _, layers in stages for _, share in layers]
        if not all(isinstance(value, (int, float)) for value in [*shares, config.target_weights or 0]):
            raise ValueError("a share or count in it is not a number")
        return config
    # The file is anybody's, and PEFT builds the configuration without looking at types.
    except Exception as error:
        raise ValueError(f"{path} is not the configuration of a mask adapter: {error}.") from error


def layer_of(key: str) -> str:
    """The layer whose mask a tensor of an adapter's file is."""
    return key.removeprefix("base_model.model.").removesuffix(".maskpro_mask")


def _layers(config: MaskProConfig) -> dict[str, float]:
    return config.lineage[-1]["groups_changed"] if config.lineage else {}


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
    checked = folder.is_dir()
    if not checked:
        config_file = hf_hub_download(source, CONFIG_FILE, subfolder=subfolder, revision=revision)
        name = f"{subfolder}/{MASK_FILE}" if subfolder else MASK_FILE
        folder = Path(config_file).parent
        checked = isinstance(try_to_load_from_cache(source, name, revision=revision), str)
    if checked:
        config, masks = read_masks(folder)
        shapes = {name: list(mask.shape) for name, mask in masks.items()}
        size = (folder / MASK_FILE).stat().st_size
    else:
        config = read_config(folder / CONFIG_FILE)
        header = HfApi().parse_safetensors_file_metadata(source, name, revision=revision)
        shapes = {layer_of(key): info.shape for key, info in header.tensors.items() if key.endswith(".maskpro_mask")}
        size = max(info.data_offsets[1] for info in header.tensors.values())
    stages = config.lineage or []
    return {
        "kind": "mask adapter",
        "pattern": config.pattern,
        "base_model": config.base_model_name_or_path,
        "layers": len(shapes),
        "target_weights": config.target_weights,
        "file_bytes": size,
        "bits_per_weight": 8 * size / config.target_weights if config.target_weights else None,
        "holds_logits": config.save_logits,
        "started_from": [stage["init_mask"] for stage in stages],
        "groups_changed": [sum(stage["groups_changed"].values()) / len(stage["groups_changed"]) for stage in stages],
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
    stage = raw["lineage"][-1]
    same = [known for known in stage.get("evaluations", []) if {**known, "value": value} != entry]
    stage["evaluations"] = [*same, entry]
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(raw, indent=2, sort_keys=True), encoding="utf-8")
    temporary.replace(path)
    with safe_open(folder / MASK_FILE, framework="pt") as tensors:
        size = sum(tensors.get_tensor(key).nbytes for key in tensors.keys())  # noqa: SIM118
    write_card(folder, read_config(path), size)


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
    max_shard_size: int | str | None = None,
    commit_message: str | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """`PeftModel.push_to_hub`, which would put a card without content in the place of the adapter's."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if tags:
            for path in Path(folder).rglob(CARD_FILE):
                card = ModelCard.load(path)
                card.data["tags"] = [*card.data["tags"], *tags]
                card.save(path)
        return push_folder(folder, repo_id, commit_message=commit_message or "Upload mask adapter", **kwargs)


_for_masks(_no_card, "create_or_update_model_card")
_for_masks(_push_model, "push_to_hub")
