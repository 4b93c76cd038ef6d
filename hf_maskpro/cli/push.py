"""The verb that shares."""

from pathlib import Path
from typing import Annotated

import typer

from .. import hub
from .common import Json, show


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a merged checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, USER/NAME; made if there is none.")],
    subfolder: Annotated[str | None, typer.Option(help="Folder of the repository to push to.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if there is none.")] = None,
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[
        str, typer.Option(help="First line of the commit's message.")
    ] = "Upload with hf-maskpro",
    as_json: Json = False,
) -> None:
    """Push an adapter or a merged checkpoint to the Hub."""
    commit = hub.push_folder(
        folder,
        repo_id,
        subfolder,
        revision=revision,
        private=private,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    show({"repository": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.commit_url}, as_json)
