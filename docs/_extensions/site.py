"""
The site's addresses, from pyproject.toml, and MathML for every formula. Marks where
lines and columns are not to be broken.
"""

import re
import tomllib
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert


_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


# "(`name`" and "[`name`](page.md)."
_CODE = re.compile(
    r"(\(*)(?:<(a|strong)\b[^>]*>)?<code>(?:(?!</code>).)*</code>(?(2)</\2>)([.,;:)]*)",
    re.DOTALL,
)
_CELL = re.compile(r"<td([^>]*>)(.*?)</td>")
# In characters. What is shorter may be broken anywhere.
_SENTENCE = 40


def on_config(config):
    text = (Path(config.config_file_path).parent / "pyproject.toml").read_text(
        encoding="utf-8"
    )
    urls = tomllib.loads(text)["project"]["urls"]
    config.repo_url, config.site_url = urls["Repository"], urls["Documentation"]
    return config


def _mathml(match: re.Match[str]) -> str:
    if match[1] == "span":
        return convert(unescape(match[2]))
    return f'<div class="formula">{convert(unescape(match[2]), display="block")}</div>'


def _keep_together(match: re.Match[str]) -> str:
    # A name in code is a box, and a browser may break the line at either end of one.
    if not match[1] and not match[3]:
        return match[0]
    return f'<span class="with-code">{match[0]}</span>'


def _cell(match: re.Match[str]) -> str:
    text = re.sub("<[^>]+>", "", match[2])
    if len(unescape(text)) < _SENTENCE:
        return match[0]
    return f'<td class="sentence"{match[1]}{match[2]}</td>'


def on_page_content(html, **kwargs):
    # Made here, so that a reader's browser loads no script and nothing from elsewhere.
    html = _CELL.sub(_cell, _FORMULA.sub(_mathml, html))
    # mkdocstrings puts a space behind a default.
    return _CODE.sub(_keep_together, html.replace("</code>\n)", "</code>)"))
