"""
The options that several verbs have. Like everything that a verb imports before it runs, this file loads nothing heavy:
help, typos and bad values are answered at once.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import typer


# As in `hf_maskpro.tuner`, which is not imported for the names alone.
RULES = ("magnitude", "random", "wanda", "ria", "sparsegpt", "gblm", "pruner-zero")
DATA_FREE = ("magnitude", "random")

MASK, TEXT, LEARNING, EVALUATION, FILES = "Mask", "Text", "Learning", "Evaluation", "Files"


def unrefined(name: str) -> str:
    """A starting mask without what refines it."""
    return name.removesuffix("+blocks").removesuffix("+swaps")


def is_source(name: str) -> bool:
    """Whether a starting mask may be a folder, file or Hub id."""
    source = unrefined(name)
    return "/" in source or source.endswith((".npz", ".safetensors")) or Path(name).is_dir() or Path(source).is_dir()


def check_method(name: str | None) -> str | None:
    """Refuse what is neither a rule nor a source of masks."""
    if name is None or unrefined(name) in RULES or is_source(name):
        return name
    raise typer.BadParameter(
        f"{name} is neither a rule ({', '.join(RULES)}) nor a folder, file or Hub id with masks."
        + did_you_mean(unrefined(name), RULES)
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a refusal, if a known name is close."""
    return "".join(f" Did you mean {close}?" for close in get_close_matches(name, list(known), 1))


Model = Annotated[
    str, typer.Option(metavar="MODEL", help="Base model: a local folder or a Hub id.", rich_help_panel=FILES)
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="GGUF file in the model's folder, dequantized to bfloat16 unless told otherwise.",
        rich_help_panel=FILES,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(
        metavar="DTYPE",
        help="auto is the model's own, or float32 where the CPU has no instructions for that; float32; bfloat16.",
        rich_help_panel=FILES,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of the adapter's repository.", rich_help_panel=FILES),
]
Subfolder = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The adapter's folder in its repository.", rich_help_panel=FILES),
]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", rich_help_panel=FILES)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder if it is in use.", rich_help_panel=FILES)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Text = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text file to cut windows from; repeat it for a mixture.", rich_help_panel=TEXT),
]
Dataset = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Dataset to cut windows from, streamed: a folder or Hub id, NAME or NAME:CONFIG; repeat it for a "
        "mixture.",
        rich_help_panel=TEXT,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBERS",
        help="Shares of a mixture, as 2,1,1: of every --text, every --dataset and self-generated text, in this order.",
        rich_help_panel=TEXT,
    ),
]
StartToken = Annotated[
    bool,
    typer.Option(
        help="Begin every window with the start token, where the tokenizer adds one to a text.", rich_help_panel=TEXT
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Make conversations of the text's paragraphs, by the tokenizer's chat template.",
        rich_help_panel=TEXT,
    ),
]

PatternN = Annotated[
    int, typer.Option("--n", min=1, max=15, metavar="N", help="Weights kept in every group.", rich_help_panel=MASK)
]
PatternM = Annotated[
    int, typer.Option("--m", min=2, max=16, metavar="N", help="Size of a group.", rich_help_panel=MASK)
]
TargetModules = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Layers to mask: ends of names, separated by commas, or a regular expression. All linear layers and "
        "experts but the output head and routers unless given.",
        rich_help_panel=MASK,
    ),
]
TargetParameters = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Experts to mask, that a model keeps in 3-D parameters: ends of names, separated by commas.",
        rich_help_panel=MASK,
    ),
]
ExcludeModules = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Layers to leave dense, given as in --target-modules.", rich_help_panel=MASK),
]
OnIndivisible = Annotated[
    Literal["error", "dense"] | None,
    typer.Option(
        metavar="HOW",
        help="Layers whose inputs M does not divide: error unless given, or dense to leave them so.",
        rich_help_panel=MASK,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Seed of all that is random.")]
