"""Diptych: an event-driven trainer for paired data.

`diptych.engine` has the trainer and its step, `diptych.handlers` everything that happens around the
step, `diptych.losses` the objectives. Every public name of the three can be imported from here too.
`diptych.recipes` has whole jobs on a user's own data.
"""

if __name__ == "diptych":  # not as `face`, which `python -m face` imports before `diptych` is found
    from diptych._lazy import lazy_names

    __all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
