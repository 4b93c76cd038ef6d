"""Docstrings in Hugging Face's format, as mkdocstrings' Google parser reads them."""

import re

import griffe


# "    n (`int`, *optional*, defaults to `2`):", then "    `ValueError`: why"
_ARGUMENT = re.compile(r"^( +)\**(\w+) \((\[?`.+?|\*optional\*)\):", re.MULTILINE)
_TYPE = re.compile(r"^( {4})\[?`~?([^`\n]+)`\]?(?:, \*optional\*)?:", re.MULTILINE)
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")

_PAGES = {
    "MaskProConfig": "hf_maskpro.MaskProConfig",
    "initialize_masks": "hf_maskpro.initialize_masks",
    "log_prob": "hf_maskpro.subset.log_prob",
    "pack": "hf_maskpro.subset.pack",
}


def _argument(match: re.Match[str]) -> str:
    # The default is shown from the signature.
    types = re.split(r", \*optional|, defaults to", match[3])[0]
    names = " | ".join(re.findall(r"`~?([^`]+)`", types))
    return f"{match[1]}{match[2]} ({names}):" if names else f"{match[1]}{match[2]}:"


def _reference(match: re.Match[str]) -> str:
    name = match[1]
    return f"[`{name}`][{_PAGES[name]}]" if name in _PAGES else f"`{name}`"


class HuggingFace(griffe.Extension):
    """
    Takes the Markdown out of types, which become annotations; resolves links.
    Bases that are computed have no name to show.
    """

    def on_class(self, *, cls: griffe.Class, **kwargs) -> None:
        cls.bases = [base for base in cls.bases if not str(base).startswith("*")]

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = _TYPE.sub(r"\1\2:", _ARGUMENT.sub(_argument, obj.docstring.value))
            obj.docstring.value = _REFERENCE.sub(_reference, text)
