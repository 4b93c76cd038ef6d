"""The verb that shares."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import FILES, Json
from .output import show


REPOSITORY, COMMIT = "Repository", "Commit"


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a merged checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, USER/NAME; made if there is none.")],
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Hub id of the base model, where the folder names a path of this machine.",
            rich_help_panel=FILES,
        ),
    ] = None,
    subfolder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of the repository to push to.", rich_help_panel=REPOSITORY),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch to push to, made if there is none.", rich_help_panel=REPOSITORY),
    ] = None,
    private: Annotated[
        bool | None, typer.Option(help="Whether a new repository is private.", rich_help_panel=REPOSITORY)
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.", rich_help_panel=COMMIT)
    ] = False,
    commit_message: Annotated[
        str, typer.Option(metavar="TEXT", help="First line of the commit's message.", rich_help_panel=COMMIT)
    ] = "Upload with hf-maskpro",
    as_json: Json = False,
) -> dict[str, Any]:
    """Push an adapter or a merged checkpoint to the Hub."""
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {fault}; pass the folder of an adapter or of a merged checkpoint.")
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
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
    figures = {"repository": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.commit_url}
    if not as_json:
        show(figures)
    return figures
