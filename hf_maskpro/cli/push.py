"""The verb that shares."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json
from .output import show


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a merged checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, USER/NAME; made if there is none.")],
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Hub id of the base model, where the folder names a path of this machine."),
    ] = None,
    subfolder: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the repository to push to.")] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch to push to, made if there is none.")
    ] = None,
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[
        str, typer.Option(metavar="TEXT", help="First line of the commit's message.")
    ] = "Upload with hf-maskpro",
    as_json: Json = False,
) -> None:
    """Push an adapter or a merged checkpoint to the Hub."""
    from .. import hub

    commit = hub.push_folder(
        folder,
        repo_id,
        subfolder,
        base_model=base_model,
        revision=revision,
        private=private,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    show({"repository": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.commit_url}, as_json)
