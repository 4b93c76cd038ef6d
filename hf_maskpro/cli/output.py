"""What a verb prints: its figures, and what to do next."""

import shlex
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table


console = Console()


def show(figures: dict[str, Any]) -> None:
    """Print figures as a table of two columns."""
    # What does not fit goes on in the next line, to be copied, rather than be cut.
    table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False)
    for name, value in figures.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, "" if value is None else shown)
    console.print(table)


def short_names(paths: list[str]) -> dict[str, str]:
    """Each path by its name, and where another has the same, by as much of its end as tells them apart."""
    shown = {}
    for path in paths:
        parts = Path(path).parts
        ends = (parts[-length:] for length in range(1, len(parts)))
        alone = (end for end in ends if [Path(other).parts[-len(end) :] for other in set(paths)].count(end) == 1)
        shown[path] = str(Path(*next(alone, parts)))
    return shown


def say_next(*words: str) -> None:
    """Print the command that usually comes next, on one line."""
    typer.echo(f"Next: hf-maskpro {shlex.join(words)}")
