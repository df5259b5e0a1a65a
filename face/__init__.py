"""Diptych: an event-driven trainer for paired data.

`diptych.engine` has the trainer and its step, `diptych.handlers` everything that happens around the
step, `diptych.losses` the objectives. Every public name of the three can be imported from here too.
`diptych.recipes` has whole jobs on a user's own data.

    trainer = Trainer(model, CLIPLoss(), optimizer, task=tasks.image_text)
    trainer.attach(Evaluation(held_out, metrics=[RetrievalRecall()]), *default_handlers("runs/a"))
    trainer.run(loader, max_epochs=10)

`help()` of a package begins with a page like this one; the documentation of each name follows.
"""

if __name__ == "diptych":  # not as `face`, which `python -m face` imports before `diptych` is found
    from diptych._lazy import lazy_names

    __all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
