"""Push mask adapters and merged checkpoints to the Hub."""

import json
import shutil
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..tuner import saved_config
from ..tuner.card import (
    CARD_FILE,
    CARD_FILES,
    CONFIG_FILE,
    card_for_repository,
    hub_id,
    load_card,
    save_card,
    write_card,
)
from ..tuner.files import inside, json_object, private_folder
from ..tuner.registration import NAME
from .reading import MASK_FILE, own_bytes


# What may run code when it is read.
_NOT_PUSHED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")


def push_folder(
    folder: str | Path,
    repo_id: str,
    subfolder: str | None = None,
    *,
    base_model: str | None = None,
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
        base_model (`str`, *optional*): The Hub id of the base model, which an adapter's configuration and card, or a
            checkpoint's card, are to name. Without it they name what they do in the folder; a path of this machine is
            warned of.
        private (`bool`, *optional*): Whether a new repository is private; `None` leaves it to the account's default.
        token (`bool` or `str`, *optional*): A token to use instead of the stored one.
        revision (`str`, *optional*): The branch to push to, made if there is none.
        create_pr (`bool`): Open a pull request instead.
        commit_message (`str`): First line of the commit's message.
        commit_description (`str`, *optional*): The rest of it.

    Returns:
        `CommitInfo`: The commit; of a push that changes nothing, the present head.

    Raises:
        `ValueError`: if the folder has neither an adapter nor a checkpoint, a file of it is a link out of it, or the
            Hub rejects a card's metadata.
        `HfHubHTTPError`: if the Hub refuses.
    """
    folder = Path(folder)
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ValueError(f"subfolder is {subfolder!r}; name a folder inside the repository.")
    if base_model is not None and hub_id(base_model) is None:
        raise ValueError(f"base_model is {base_model!r}, which is no Hub id; name a repository, as USER/NAME.")
    roots = [folder] if (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file() else []
    # Where no adapter is called "default", PEFT saves each to a subfolder of its name.
    roots = roots or [path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))]
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    files = [inside(folder, path) for path in files if _is_pushed(path.relative_to(folder))]
    if not any(path.name in (CONFIG_FILE, "config.json") for path in files):
        raise ValueError(f"{folder} holds neither {CONFIG_FILE} nor config.json; pass an adapter's or model's folder.")
    changed: dict[Path, Any] = {}
    for path in files:
        if path.name == CONFIG_FILE:
            changed |= _with_base(path, base_model)
        elif path.name == CARD_FILE and not (path.parent / CONFIG_FILE).is_file():
            card = load_card(path)
            if base_model is not None:
                card.data["base_model"] = base_model
                changed[path] = card
            elif card.data.get("base_model") is None:
                warnings.warn(
                    f"{path} names no base model, so nobody learns what it was made from; name a repository by "
                    "base_model.",
                    stacklevel=2,
                )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations = []
    for path in files:
        name = (Path(subfolder or "") / path.relative_to(folder)).as_posix()
        content: str | bytes = str(path)
        if path.name == CARD_FILE:
            card = changed[path] if path in changed else load_card(path)
            content = str(card_for_repository(card, api, repo_id, name, revision)).encode()
        elif path in changed:
            content = changed[path]
        operations.append(CommitOperationAdd(name, content))
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _with_base(path: Path, base_model: str | None) -> dict[Path, Any]:
    """The configuration and card of an adapter, by their paths, with another base model than that of its folder."""
    saved = json_object(path)
    base = saved.get("base_model_name_or_path")
    if base_model is None:
        if base and hub_id(base) is None:
            warnings.warn(
                f"{path} names {base} as the base model, a path by which nobody else finds it; "
                "name a repository by base_model.",
                stacklevel=3,
            )
        return {}
    if saved.get("peft_type") != NAME:
        # What was trained over a mask, as a LoRA, is saved with it, and has a card only if it was saved elsewhere.
        changed: dict[Path, Any] = {path: _as_json(saved | {"base_model_name_or_path": base_model})}
        if (card_path := path.with_name(CARD_FILE)).is_file():
            changed[card_path] = load_card(card_path)
            changed[card_path].data["base_model"] = base_model
        return changed
    saved = saved_config(path.parent).to_dict() | saved | {"base_model_name_or_path": base_model}
    with TemporaryDirectory() as temporary:
        for name in CARD_FILES:
            if (path.parent / name).is_file():
                shutil.copyfile(path.parent / name, Path(temporary, name))
        write_card(Path(temporary), saved, own_bytes(path.parent))
        card = ModelCard.load(Path(temporary, CARD_FILE))
    return {path: _as_json(saved), path.with_name(CARD_FILE): card}


def _as_json(saved: dict[str, Any]) -> bytes:
    return json.dumps(saved, indent=2, sort_keys=True).encode()


def _is_pushed(path: Path) -> bool:
    hidden = any(part.startswith((".", "checkpoint-")) for part in path.parts)
    return not hidden and path.suffix.lower() not in _NOT_PUSHED


def _for_masks(own: Callable[..., Any], name: str) -> None:
    """Let a method of `PeftModel` do something else for mask adapters; PEFT has no hooks for them."""
    original = getattr(PeftModel, name)

    @wraps(original)
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        masks = any(config.peft_type == NAME for config in self.peft_config.values())
        return (own if masks else original)(self, *args, **kwargs)

    setattr(PeftModel, name, method)


def _save_whole(
    model: PeftModel, save_directory: str, safe_serialization: bool = True, *args: Any, **kwargs: Any
) -> None:
    """PEFT writes over an earlier adapter file by file, and would leave neither where it fails in between."""
    if not safe_serialization:
        raise ValueError("safe_serialization is False, and a mask is read from safetensors alone; leave it at True.")
    if not kwargs.get("is_main_process", True):
        return _save_in_place(model, save_directory, True, *args, **kwargs)
    folders = ["" if name == "default" else f"{name}/" for name in model.peft_config]
    with private_folder(save_directory, *(f"{folder}{file}" for folder in folders for file in CARD_FILES)) as folder:
        _save_in_place(model, str(folder), True, *args, **kwargs)
    return None


def _save_added(model: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """As [`_save_whole`], of masks that `add_adapter` of transformers put there, which writes in place too."""
    masks = model._hf_peft_config_loaded and any(config.peft_type == NAME for config in model.peft_config.values())
    if not masks or kwargs.get("push_to_hub") or not kwargs.get("is_main_process", True):
        return _save_model(model, save_directory, *args, **kwargs)
    with private_folder(save_directory, *CARD_FILES) as folder:
        _save_model(model, folder, *args, **kwargs)
    return None


def _load_whole(model: PeftModel, model_id: str | Path, *args: Any, **kwargs: Any) -> Any:
    """PEFT takes a pickle where a folder has no safetensors file, and does not say of which adapter its errors are."""
    name = Path(model_id, kwargs.get("subfolder") or "")
    try:
        if name.is_dir() and not (name / MASK_FILE).is_file():
            raise ValueError(f"it has no {MASK_FILE}, and a pickle is not read in its place; save it again.")
        return _load(model, model_id, *args, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{name}: the adapter file is not a whole safetensors file: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


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


_save_in_place, _load, _save_model = PeftModel.save_pretrained, PeftModel.load_adapter, PreTrainedModel.save_pretrained
PreTrainedModel.save_pretrained = wraps(_save_model)(_save_added)
_for_masks(_save_whole, "save_pretrained")
_for_masks(_load_whole, "load_adapter")
_for_masks(_no_card, "create_or_update_model_card")
_for_masks(_push_model, "push_to_hub")
