"""The version of Diptych."""

__version__ = "0.1.0"
