"""Diptych: an event-driven trainer for paired data.

`diptych.engine` has the trainer and its step, `diptych.handlers` everything that happens around the
step, `diptych.losses` the objectives. Every public name of the three can be imported from here too.
"""

from importlib import import_module

# By its own name, since `python -m face` imports this package as `face`, installed or not.
__all__, __getattr__, __dir__ = import_module(f"{__name__}._lazy").lazy_names(__name__, __file__)
