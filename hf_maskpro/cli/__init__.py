"""The `hf-maskpro` command: argument parsing, progress, tables and plots; no algorithm."""

import os
import sys
import warnings
from collections.abc import Callable
from logging import ERROR, WARNING, getLogger
from typing import Annotated, Any

import typer

from ..version import __version__
from . import bench, evaluate, export, import_masks, init, inspect, merge, push, quickstart, train
from .training_options import TrainVerb
from .verb import UsageError, Verb


app = typer.Typer(name="hf-maskpro", pretty_exceptions_enable=False)


def _add(verb: Callable[..., Any], example: str, name: str | None = None, kind: type[Verb] = Verb) -> None:
    app.command(name, cls=kind, epilog=f"Example: hf-maskpro {example}")(verb)


_add(quickstart.quickstart, "quickstart --minutes 10")
_add(init.init, "init --model MODEL --method wanda --text text.txt --output wanda")
_add(import_masks.import_masks, "import mask.npz --model MODEL --output mask", "import")
_add(train.train, "train --model MODEL --text text.txt --max-steps 400 --output mask", kind=TrainVerb)
_add(evaluate.evaluate, "eval --model MODEL --adapter mask --text held_out.txt", "eval")
_add(merge.merge, "merge --model MODEL --adapter mask --output sparse")
_add(export.export, "export --model MODEL --adapter mask --target cpu --output packed")
_add(inspect.inspect, "inspect mask")
_add(push.push, "push mask USER/NAME")
_add(bench.bench, "bench --model sparse")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-maskpro {__version__}")
        raise typer.Exit


@app.callback()
def hf_maskpro(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Learned N:M sparsity masks for language models, as PEFT adapters."""


def keep_others_quiet() -> None:
    """Keep to itself what other packages have to say, some of them while they are imported."""
    if "PYTHONWARNINGS" not in os.environ:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"hf_maskpro\.")
        # PEFT's, of keys of a configuration that this version does not know.
        warnings.filterwarnings("default", message="Unexpected keyword arguments")
    getLogger().setLevel(ERROR)
    # torch has a handler of its own, and warns of what torchao does where that is installed.
    getLogger("torch.utils._pytree").setLevel(ERROR)
    getLogger("hf_maskpro").setLevel(WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Run the command; failures are one line on stderr and a non-zero exit code."""
    keep_others_quiet()
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        where = f" See {error.ctx.command_path} --help." if error.ctx is not None else ""
        message = " ".join(error.format_message().split())
        typer.echo(f"error: {message}{'' if message.endswith(('.', '?')) else '.'}{where}", err=True)
        status = 2
    except typer.Abort:
        status = 1
    sys.exit(status or 0)
