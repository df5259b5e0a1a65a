"""Diptych: an event-driven trainer for paired data.

`diptych.engine` has the trainer and its step, `diptych.handlers` everything that happens around the
step, `diptych.losses` the objectives. Every public name of the three can be imported from here too.
"""

from diptych._lazy import lazy_names

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
__all__ += ["__version__"]
