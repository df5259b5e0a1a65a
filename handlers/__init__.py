"""Handlers attached to the events of a trainer: everything that happens around the step."""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
