"""Output folders that are complete or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..tuner.files import take_usual_modes


@contextmanager
def new_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    A temporary folder that takes the place of `output` once it is complete.

    Args:
        output (`str` or `Path`): The folder to make.
        overwrite (`bool`): Replace a folder that is there.

    Raises:
        `ValueError`: if the folder is in use and `overwrite` is not set.
    """
    output = Path(output).resolve()
    check_free(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    stays = output.is_dir() and _stays(output)
    # Not with the folder's own name in it, which may be as long as a name can be.
    with tempfile.TemporaryDirectory(dir=output if stays else output.parent, prefix=".new-") as parent:
        folder = Path(parent) / "new"
        folder.mkdir()
        yield folder
        take_usual_modes(folder)
        if stays:
            # It is empty.
            for path in folder.iterdir():
                path.rename(output / path.name)
            return
        if not output.exists():
            folder.rename(output)
            return
        # Outside the temporary folder, which is deleted even if the second renaming fails.
        old = Path(tempfile.mkdtemp(dir=output.parent, prefix=".old-")) / output.name
        output.rename(old)
        try:
            folder.rename(output)
        except BaseException:
            old.rename(output)
            old.parent.rmdir()
            raise
        shutil.rmtree(old.parent)


def check_free(output: str | Path, overwrite: bool, *inputs: str | Path | None) -> None:
    """
    Raises:
        `ValueError`: if `output` is a file, or a folder in use and `overwrite` is not set, or it holds an input, or
            what is in use cannot be renamed.
    """
    output = Path(output)
    for given in inputs:
        path = Path(given or "").resolve()
        if given and path.exists() and output.resolve() in (path, *path.parents):
            raise ValueError(f"{output} holds {given}, which would be lost; choose another output folder.")
    # A device or a pipe is no file, and would be lost as one.
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file or device; choose another output folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} is not empty; choose another output folder or pass overwrite=True.")
    if output.is_dir() and any(output.iterdir()) and _stays(output.resolve()):
        raise ValueError(f"{output} is not empty, and cannot be renamed as a whole; choose a folder inside it.")


def _stays(output: Path) -> bool:
    """Whether a folder cannot be renamed."""
    return output.is_mount() or not os.access(output.parent, os.W_OK)
