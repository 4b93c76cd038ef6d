"""A verb of the command: whatever fails is one line, in the words of its options, and `--json` is one object."""

import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from typer.core import TyperCommand


# typer names no other of those that say that something was typed wrongly.
UsageError: Any = typer.BadParameter.__base__


class Verb(TyperCommand):
    """A command that says in one line why it failed, and by `--json` prints what its function returns."""

    def invoke(self, ctx: Any) -> None:
        as_json = ctx.params["as_json"]
        # What other packages print meanwhile is no part of the one object.
        with one_line_errors(self.options_of_names()), redirect_stdout(sys.stderr if as_json else sys.stdout):
            figures = super().invoke(ctx)
        if as_json:
            typer.echo(json.dumps(figures))

    def options_of_names(self) -> dict[str, str]:
        """The option for every argument that a message may name."""
        return {str(known.name): known.opts[-1] for known in self.params if known.opts[-1].startswith("--")}


@contextmanager
def one_line_errors(options: dict[str, str] | None = None) -> Iterator[None]:
    """
    Turn a failure into one line on stderr and exit code 1, and a warning into one line.

    Args:
        options (`dict[str, str]`, *optional*): The option for every argument that a message may name.
    """

    def say(kind: str, line: str) -> None:
        typer.echo(f"{kind}: {in_options(line, options or {})}", err=True)

    def show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
        say("warning", " ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            yield
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        # Those are bugs: who reports one needs to say where it was.
        except (TypeError, LookupError, AttributeError, NameError, AssertionError):
            raise
        except Exception as error:
            # PEFT says of everything that goes wrong that it cannot find a file; why is in the cause.
            causes = [line_of(error)] + ([line_of(error.__cause__)] if isinstance(error.__cause__, OSError) else [])
            say("error", ": ".join(dict.fromkeys(causes)))
            sys.exit(1)


def in_options(line: str, options: dict[str, str]) -> str:
    """A message as the command says it: the library names arguments of Python, and the user has typed options."""
    for name, option in options.items():
        # transformers writes its fields as options with underscores.
        start = rf"(?<![\w./-])(?:--)?{name}"
        line = re.sub(rf"{start}=True\b", option, line)
        line = re.sub(rf"{start}=(?:'([^']*)'|\"([^\"]*)\"|(\w+))", rf"{option} \1\2\3", line)
        if "_" in name:
            line = re.sub(rf"{start}(?![\w/=-]|\.\w)", option, line)
        else:
            line = re.sub(rf"^{name} is ", f"{option} is ", line)
    return line


def line_of(error: BaseException) -> str:
    """The line of an error that tells most: of the Hub's it is what the server says, and not the number."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.server_message:
        return f"{error.server_message} ({error.response.url})"
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
        return f"the Hub cannot be reached: {line}"
    return line
