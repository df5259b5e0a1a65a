"""The run loop on Ignite: events, listeners, position."""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
