"""Handlers attached to the events of a trainer: everything that happens around the step.

The usual handlers of a run:

    trainer.attach(LearningRate(warmup=200, decay="cosine"), GradientClipping(max_norm=1.0))
    trainer.attach(Evaluation(held_out, metrics=[RetrievalRecall()]))
    trainer.attach(*default_handlers(new_run("runs", "mine"), best="val/recall@1"))
"""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
