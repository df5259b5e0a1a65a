"""An Ignite engine, and the one step that it runs for each batch."""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
