"""Whole jobs on a user's own data: train two towers, and use, evaluate and export them."""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
