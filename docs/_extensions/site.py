"""The site's addresses, from pyproject.toml, and MathML for every formula."""

import re
import tomllib
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert


_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


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


def on_page_content(html, **kwargs):
    # Made here, so that a reader's browser loads no script and nothing from elsewhere.
    return _FORMULA.sub(_mathml, html)
