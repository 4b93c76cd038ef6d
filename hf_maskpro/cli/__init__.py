"""The `hf-maskpro` command: argument parsing, progress, tables and plots; no algorithm."""

import os
import warnings
from logging import ERROR, getLogger

import typer
from transformers.utils import logging

from . import bench, evaluate, export, import_masks, init, inspect, merge, push, quickstart, train
from .common import one_line_errors


app = typer.Typer(
    name="hf-maskpro",
    help="Learned N:M sparsity masks for language models, as PEFT adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(quickstart.quickstart)
app.command()(init.init)
app.command("import")(import_masks.import_masks)
app.command()(train.train)
app.command("eval")(evaluate.evaluate)
app.command()(merge.merge)
app.command()(export.export)
app.command()(inspect.inspect)
app.command()(push.push)
app.command()(bench.bench)


def main() -> None:
    """Run the command; failures are one line on stderr and a non-zero exit code."""
    if "PYTHONWARNINGS" not in os.environ:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"hf_maskpro\.")
        # PEFT's, of keys of a configuration that this version does not know.
        warnings.filterwarnings("default", message="Unexpected keyword arguments")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("lm_eval").setLevel(ERROR)
    with one_line_errors():
        app()
