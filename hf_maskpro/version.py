"""The version and the repository, for those who ask before anything else is loaded, and where nothing is installed."""

__version__ = "0.2.0"

# As pyproject.toml has it.
REPOSITORY = "https://github.com/OWNER/hf-maskpro"
