"""All but the long description is in pyproject.toml: on PyPI the README's links and picture have to be absolute."""

import re
import tomllib
from pathlib import Path

from setuptools import setup


root = Path(__file__).parent
repository = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
readme = (root / "README.md").read_text(encoding="utf-8")
# Asked so, GitHub says of an SVG file that it is one.
readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)([^)]+)", rf"\1{repository}/raw/main/\2?sanitize=true", readme)
readme = re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/main/", readme)
setup(long_description=readme, long_description_content_type="text/markdown")
