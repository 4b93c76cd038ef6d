"""The version, for those who ask before anything else is loaded, and where nothing is installed."""

__version__ = "0.2.0"
