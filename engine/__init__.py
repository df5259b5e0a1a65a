"""An Ignite engine, and the one step that it runs for each batch.

A run in three lines:

    loader = SeededLoader(dataset, batch_size=256)
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, microbatch_size=64)
    trainer.run(loader, max_epochs=10)
"""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
