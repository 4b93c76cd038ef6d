"""Files of a folder: read from nowhere else, and written whole."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def inside(folder: Path, path: Path, *others: Path) -> Path:
    """
    A path as it is, if what it leads to lies in the folder; in a snapshot of the Hub's cache that is a link to a blob.

    Args:
        folder (`Path`): A folder that somebody else may have filled.
        path (`Path`): A file of it.
        others (`Path`): Other folders, without links in them, of which it may be a file, but not one further down.

    Raises:
        `ValueError`: if the path leads elsewhere.
    """
    root, target = folder.resolve(), path.resolve()
    snapshots = [parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    roots = (root, *(cached / "blobs" for cached in snapshots))
    if target.parent not in others and not any(target.is_relative_to(known) for known in roots):
        raise ValueError(f"{path} leads out of its folder, to {target}; put the file itself there.")
    return path


@contextmanager
def private_folder(folder: str | Path, *brought: str) -> Iterator[Path]:
    """
    A temporary folder whose files take their places in `folder` once all of them are there: they all do, or none does.

    Args:
        folder (`str` or `Path`): Where the files belong; made if it is not there.
        brought (`str`): Files of it that are copied into the temporary folder, if they are there.

    Raises:
        `ValueError`: if something else than a file, as a device, has the name of one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Beside them, since only within a file system a file is renamed at once; under a name that nobody else has.
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        for name in brought:
            if (folder / name).is_file():
                (new / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, new / name)
        yield new
        take_usual_modes(new)
        files = [path.relative_to(new) for path in sorted(new.rglob("*")) if path.is_file()]
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if (folder / file).exists():
                if not (folder / file).is_file():
                    raise ValueError(f"{folder / file} is no file, and would be lost; choose another name.")
                (old / file).parent.mkdir(parents=True, exist_ok=True)
                _keep(folder / file, old / file)
        for file in files:
            # A file system may keep a renaming and lose what was written before it, when the machine stops.
            with (new / file).open("rb+") as written:
                os.fsync(written.fileno())
        placed = []
        try:
            for file in files:
                placed.append(file)
                os.replace(new / file, folder / file)
        except BaseException:
            for file in placed:
                if (old / file).exists():
                    os.replace(old / file, folder / file)
                elif not (new / file).exists():
                    (folder / file).unlink()
            raise


def take_usual_modes(folder: Path) -> None:
    """
    Give the files of a folder the permissions that a new file has here: safetensors writes such as only their owner
    can read, and what is saved is often for others too.
    """
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        usual = Path(temporary, "usual")
        usual.touch()
        for path in folder.rglob("*"):
            if path.is_file():
                shutil.copymode(usual, path)


def _keep(file: Path, copy: Path) -> None:
    try:
        os.link(file, copy)
    # Not every file system has links.
    except OSError:
        shutil.copy2(file, copy)


def one_line(text: Any) -> str:
    """What a file says, for a message: as it is written there if it would break the line or move a terminal."""
    text = str(text)
    return text if text.isprintable() else repr(text)


def json_object(path: Path) -> dict[str, Any]:
    """
    What a JSON file holds.

    Raises:
        `ValueError`: if that is no object.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} holds {str(known)[:50]!r}, which is no object.")
    return known


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """
    A safetensors file, open to read.

    Raises:
        `ValueError`: if it is not whole.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}.") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads, which need not be all that lie there; they may be links."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise ValueError(f"{folder} has no safetensors checkpoint.")
    files = json_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index}: weight_map is {str(files)[:50]!r}, which names no files.")
    for name in sorted(set(files.values())):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index}: weight_map leads out of its folder, to {name}; put the file itself there.")
    return [folder / name for name in sorted(set(files.values()))]
