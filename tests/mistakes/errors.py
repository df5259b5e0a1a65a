"""Mistakes that are errors, each with words of its message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from ignite.metrics import Accuracy
from torch import nn

from diptych.engine import EvaluationEvents, SeededLoader, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    Evaluation,
    GradientClipping,
    JsonLines,
    RetrievalRecall,
    StagePlan,
    TensorBoard,
    default_handlers,
    load_weights,
)
from diptych.losses import (
    CLIPLoss,
    MoCoLoss,
    NTXentLoss,
    SigLIPLoss,
    get_loss,
)
from tests.mistakes.batch_errors import OF_BATCHES
from tests.mistakes.makers import (
    BATCH,
    NoTensor,
    OneFeature,
    Samples,
    TwoTowers,
    attached_twice,
    classify,
    evaluate,
    file_in,
    folder_that_is_a_file,
    frozen,
    large,
    loss_without_its_parameters,
    meta,
    optimizer_of_another_model,
    parts_of_trainer,
    resumed,
    run,
    scheduler,
    sgd,
    trainer,
    unpublished_best_metric,
    unpublished_patience_metric,
    weights,
)

MISTAKES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    **OF_BATCHES,
    "a wrong key": (
        lambda _: run({"picture": BATCH["image"], "text": BATCH["text"]}),
        ["'image'", "'picture', 'text'", "with_keys(image=...)"],
    ),
    "images and texts of different number": (
        lambda _: run({"image": torch.randn(4, 3), "text": torch.randn(3, 5)}),
        ["one row for each pair", "(4, 4) and (3, 4)"],
    ),
    "a loss whose parameters the optimizer lacks": (
        loss_without_its_parameters,
        ["optimizer must hold the loss's parameters", "*loss.parameters()"],
    ),
    "a misspelt loss": (lambda _: get_loss("clipp"), ["'clipp'", "Did you mean 'clip'"]),
    "a best metric that is never published": (
        unpublished_best_metric,
        ["best must be a metric that the run publishes", "'val/recal@1'", "val/recall@1"],
    ),
    "an early-stopping metric that is never published": (
        unpublished_patience_metric,
        ["metric must be a metric that the run publishes", "'val/nothing'", "train/loss"],
    ),
    "an empty loader": (
        lambda _: trainer().run([]),
        ["data must have at least one batch", "an empty loader"],
    ),
    "a folder that cannot be written": (
        folder_that_is_a_file,
        [
            "directory",
            "runs/a/checkpoints",
            "cannot be written",
            "Not a directory",
            "Use another directory",
        ],
    ),
    "a handler without attach": (
        lambda _: trainer().attach(print),
        ["attach(trainer)", "print", "trainer.add_event_handler(event, function)"],
    ),
    "a metric that is not in a list": (
        lambda _: trainer().attach(Evaluation([BATCH], metrics=RetrievalRecall())).run([BATCH]),
        ["metrics must be a sequence or a mapping", "RetrievalRecall", "metrics=[...]"],
    ),
    "a metric's class": (
        lambda _: trainer().attach(Evaluation([BATCH], metrics=[RetrievalRecall])).run([BATCH]),
        ["a metric must be", "RetrievalRecall()"],
    ),
    "a best metric without its prefix": (
        lambda folder: (
            trainer()
            .attach(
                Evaluation([BATCH], metrics=[RetrievalRecall(k=(1,))]),
                CheckpointManager(folder, best="recall@1"),
            )
            .run([BATCH])
        ),
        ["'recall@1'", "val/recall@1"],
    ),
    "groups that are names": (
        lambda _: run({**BATCH, "group": ["a", "b", "c", "d"]}),
        ["groups must be a tensor with an integer for each sample", "a list", "Number the groups"],
    ),
    "labels that are names": (
        lambda _: tasks.classification(nn.Linear(3, 2), {"image": torch.ones(1, 3), "label": "a"}),
        ["labels must be a tensor with an integer for each sample", "got a str"],
    ),
    "epochs as a text": (
        lambda _: trainer().run([BATCH], max_epochs="3"),
        ["max_epochs must be a whole number, got '3'"],
    ),
    "a handler's class": (
        lambda _: trainer().attach(EarlyStopping),
        ["attach(trainer)", "Make an instance: EarlyStopping(...)"],
    ),
    "a list of handlers": (
        lambda folder: trainer().attach(default_handlers(folder)),
        ["attach(trainer)", "trainer.attach(*handlers)"],
    ),
    "TensorBoard on a file": (
        lambda folder: trainer().attach(TensorBoard(file_in(folder))).run([BATCH]),
        ["a_file cannot be", "File exists", "another"],
    ),
    "JSON lines below a file": (
        lambda folder: trainer().attach(JsonLines(file_in(folder) / "run")).run([BATCH]),
        ["a_file/run cannot be", "Not a directory", "another"],
    ),
    "a model that returns one feature": (
        lambda _: run(BATCH, OneFeature()),
        ["model must return (image_features, text_features)", "got float32 [4, 4]"],
    ),
    "a data set instead of a loader": (
        lambda _: trainer().run(Samples(), max_epochs=1),
        [
            "data must be an iterable of batches, got a Samples",
            "SeededLoader(dataset, batch_size=...)",
        ],
    ),
    "a loader in a loader": (
        lambda _: SeededLoader(torch.utils.data.DataLoader(Samples()), 2),
        ["dataset must be a map-style data set", "got a DataLoader", "as it is"],
    ),
    "an iterator as a data set": (
        lambda _: SeededLoader(iter([1]), 2),
        ["dataset must be a map-style data set", "list_iterator"],
    ),
    "NumPy arrays in a batch": (
        lambda _: run({key: value.numpy() for key, value in BATCH.items()}),
        ["must hold a tensor", "dict of [ndarray]", "torch.from_numpy"],
    ),
    "labels for a contrastive loss": (
        lambda _: CLIPLoss()(torch.randn(4, 3), torch.arange(4)),
        ["second must be floating point", "CrossEntropyLoss or SupervisedContrastiveLoss"],
    ),
    "a loss's class": (
        lambda _: Trainer(TwoTowers(), CLIPLoss, sgd(), task=print),
        ["loss must be a torch Module", "the class CLIPLoss", "CLIPLoss(...)"],
    ),
    "loss and optimizer in each other's place": (
        lambda _: Trainer(TwoTowers(), sgd(), CLIPLoss(), task=print),
        ["loss must be a torch Module, got a SGD", "Trainer(model, loss, optimizer, task=...)"],
    ),
    "everything is frozen": (
        frozen,
        ["the loss must depend on a trainable parameter", "requires_grad_(True)"],
    ),
    "a batch size for the trainer": (
        lambda _: trainer(batch_size=8),
        ["got batch_size", "SeededLoader(dataset, batch_size=...)"],
    ),
    "a callback for the trainer": (
        lambda _: trainer(callbacks=[]),
        ["got callbacks", "trainer.attach(handler, ...)"],
    ),
    "a model that returns no tensor": (
        lambda _: run(BATCH, NoTensor()),
        ["model must return (image_features, text_features)", "got a str"],
    ),
    # -- the parts of a trainer
    "model and loss in each other's place": (
        lambda _: Trainer(CLIPLoss(), parts_of_trainer()[0], sgd(), task=tasks.image_text),
        ["model must be the model, got the loss CLIPLoss", "Trainer(model, loss, optimizer"],
    ),
    "model and optimizer in each other's place": (
        lambda _: Trainer(sgd(), CLIPLoss(), parts_of_trainer()[0], task=tasks.image_text),
        ["model must be a torch Module, got a SGD", "Trainer(model, loss, optimizer"],
    ),
    "a model instead of its optimizer": (
        lambda _: Trainer(*parts_of_trainer()[:2], parts_of_trainer()[0], task=tasks.image_text),
        ["optimizer must be a torch Optimizer, got a Sequential", "Trainer(model, loss, optim"],
    ),
    "a scheduler as the optimizer": (
        lambda _: Trainer(TwoTowers(), CLIPLoss(), scheduler(), task=tasks.image_text),
        ["optimizer must be a torch Optimizer, got a StepLR", "Pass its optimizer", "at an event"],
    ),
    "a scheduler as a handler": (
        lambda _: trainer().attach(scheduler()),
        ["attach(trainer), got a StepLR", "ITERATION_COMPLETED, scheduler.step", "LearningRate"],
    ),
    "several optimizers": (
        lambda _: Trainer(TwoTowers(), CLIPLoss(), [sgd(), sgd()], task=tasks.image_text),
        ["optimizer must be a torch Optimizer, got a list", "CompositeOptimizer"],
    ),
    "an optimizer's class": (
        lambda _: Trainer(TwoTowers(), CLIPLoss(), torch.optim.AdamW, task=tasks.image_text),
        ["optimizer must be a torch Optimizer, got the class AdamW", "AdamW(...)"],
    ),
    "an optimizer of another model": (
        optimizer_of_another_model,
        ["optimizer must hold parameters of the model, got those of another", "not from a copy"],
    ),
    "a loss by its name": (
        lambda _: Trainer(TwoTowers(), "clip", sgd(), task=tasks.image_text),
        ["loss must be a torch Module, got 'clip'", "get_loss('clip')"],
    ),
    "a function as a loss": (
        lambda _: Trainer(TwoTowers(), nn.functional.cross_entropy, sgd(), task=print),
        ["loss must be a torch Module, got the function cross_entropy", "forward method"],
    ),
    "a task by its name": (
        lambda _: trainer(task="image_txt"),
        ["task must be a function of model and batch, got 'image_txt'", "tasks.image_text"],
    ),
    "a task's class": (
        lambda _: trainer(task=tasks.ImageText),
        ["task must be a function", "the class ImageText", "ImageText()"],
    ),
    "a task of one argument": (
        lambda _: trainer(task=lambda batch: batch),
        ["task must be a function of model and batch", "task(model, batch)"],
    ),
    "a task without its name": (
        lambda _: Trainer(*parts_of_trainer(), tasks.image_text),
        ["Trainer must get all arguments but model, loss, optimizer by name", "task=..."],
    ),
    "no task": (
        lambda _: Trainer(*parts_of_trainer()),
        ["Trainer must get task, got none", "Trainer(model, loss, optimizer, task=...)"],
    ),
    "a task that returns a tuple": (
        lambda _: run(BATCH, task=lambda model, batch: model(batch["image"], batch["text"])),
        ["task must return a mapping of named tensors, got a tuple", "{'image_features': ..."],
    ),
    "a task that returns a list": (
        lambda _: run(BATCH, task=lambda model, batch: {"image_features": [1, 2]}),
        ["output image_features must be a tensor, got a list of 2 numbers", "leave it out"],
    ),
    "a loss that is not reduced": (
        lambda _: classify(torch.tensor([0, 1, 2, 0]), nn.CrossEntropyLoss(reduction="none")),
        ["loss must return scalars, got {'loss': (4,)}", "Reduce it"],
    ),
    "a model without values": (
        lambda _: trainer(meta()),
        ["model must have values", "image.weight", "to_empty"],
    ),
    "another library's precision": (
        lambda _: trainer(precision="16-mixed"),
        ["precision must be one of fp32, bf16, fp16, got '16-mixed'", "Pass 'fp16'"],
    ),
    "an unknown device": (
        lambda _: trainer(device="gpu"),
        ["device must be 'cpu', 'cuda'", "got 'gpu'"],
    ),
    # -- the length of a run, and its data
    "no epochs": (
        lambda _: trainer().run([BATCH], max_epochs=0),
        ["max_epochs must be >= 1, got 0", "trainer.dry_run(loader)"],
    ),
    "True as the number of epochs": (
        lambda _: trainer().run([BATCH], max_epochs=True),
        ["max_epochs must be a whole number, got True"],
    ),
    "epochs and iterations": (
        lambda _: trainer().run([BATCH], max_epochs=2, max_iters=3),
        ["max_epochs and max_iters are mutually exclusive, got 2 and 3", "Pass one"],
    ),
    "held-out data as the number of epochs": (
        lambda _: trainer().run([BATCH], [BATCH], 3),
        ["max_epochs must be a whole number, got a list", "run(data, max_epochs=10)"],
    ),
    "a batch instead of a loader": (
        lambda _: trainer().run(BATCH, max_epochs=1),
        ["data must be an iterable of batches, got a dict", "pass a list: [data]"],
    ),
    "a model instead of a loader": (
        lambda _: trainer().run(TwoTowers(), max_epochs=1),
        ["data must be an iterable of batches, got a TwoTowers", "SeededLoader"],
    ),
    "a path instead of a loader": (
        lambda _: trainer().run("data/train", max_epochs=1),
        ["a batch must hold a tensor", "str", "a path or a text is no loader"],
    ),
    "drop_last that leaves nothing": (
        lambda _: trainer().run(
            torch.utils.data.DataLoader(Samples(), batch_size=8, drop_last=True)
        ),
        ["data must have at least one batch", "drop_last=True"],
    ),
    "drop_last that leaves nothing of a seeded loader": (
        lambda _: SeededLoader(Samples(), 8, drop_last=True),
        ["must fill one batch of 8, got 4 samples", "drop_last=False"],
    ),
    # -- events
    "a misspelt event": (
        lambda _: trainer().add_event_handler("EPOCH_COMPLETE", print),
        ["event must be one that this engine fires, got EPOCH_COMPLETE", "Events.EPOCH_COMPLETED?"],
    ),
    "another trainer's event": (
        lambda _: trainer().add_event_handler("on_train_batch_end", print),
        ["got on_train_batch_end", "Did you mean Events.ITERATION_COMPLETED?"],
    ),
    "a function before its event": (
        lambda _: trainer().add_event_handler(print, "EPOCH_COMPLETED"),
        ["handler must be a function, got a str", "event comes first, before print"],
    ),
    "the events of a class": (
        lambda _: trainer().add_event_handler(EvaluationEvents, print),
        ["got the class EvaluationEvents", "Choose one of its members"],
    ),
    "the result of a function": (
        lambda _: trainer().add_event_handler("EPOCH_COMPLETED", None),
        ["handler must be a function, got a NoneType", "not its result"],
    ),
    "a function of two arguments": (
        lambda _: trainer().add_event_handler("EPOCH_COMPLETED", lambda trainer, logs: None),
        ["handler must take the engine or no argument", "(trainer, logs)", "function, argument)"],
    ),
    "another trainer's method": (
        lambda _: trainer().fit([BATCH]),
        ["'Trainer' object has no attribute 'fit'", "trainer.run(loader, max_epochs=...)"],
    ),
    # -- handlers, metrics and checkpoints
    "a handler attached twice": (
        lambda _: attached_twice(*[GradientClipping(max_norm=1.0)] * 2),
        ["a handler must be attached once, got GradientClipping", "another instance"],
    ),
    "a metric by its name": (
        lambda _: evaluate("recall@1"),
        ["a metric must be an ignite.metrics.Metric, got recall@1", "RetrievalRecall"],
    ),
    "a metric of labels for features": (
        lambda _: evaluate(Accuracy()),
        ["task must return logits and labels", "accuracy", "output_transform"],
    ),
    "a metric of an output that there is not": (
        lambda _: evaluate(Accuracy(output_transform=lambda outputs: outputs["pred"])),
        ["output_transform must read outputs of the task", "image_features", "'pred'"],
    ),
    "an evaluation of a batch": (
        lambda _: Evaluation(BATCH),
        ["loader must be an iterable of batches, got a dict", "[loader]"],
    ),
    "two evaluations of one name": (
        lambda _: attached_twice(Evaluation([BATCH]), Evaluation([BATCH])),
        ["prefix must be different for each Evaluation", "'val' twice"],
    ),
    "checkpoints in a file": (
        lambda folder: trainer().attach(CheckpointManager(file_in(folder))).run([BATCH]),
        ["directory", "a_file cannot be", "File exists", "Use another directory"],
    ),
    "a checkpoint of another model": (
        lambda folder: resumed(folder, large()),
        [
            "model must match the checkpoint",
            "image.weight (4, 3) instead of (6, 3)",
            "load_weights",
        ],
    ),
    "a checkpoint of another loss": (
        lambda folder: resumed(folder, TwoTowers(), SigLIPLoss()),
        ["loss must match the checkpoint, which lacks bias", "load_weights"],
    ),
    "a function that returns handlers": (
        lambda _: trainer().attach(default_handlers),
        ["attach(trainer), got the function default_handlers", "attach(*function(...))"],
    ),
    "weights as a checkpoint": (
        lambda folder: trainer().attach(CheckpointManager(folder, resume=weights(folder))).run([]),
        ["is not a checkpoint of a run", "load_weights(model, path)"],
    ),
    "model and path in each other's place": (
        lambda folder: load_weights(weights(folder), TwoTowers()),
        ["path must be a path, got a TwoTowers", "load_weights(model, path)"],
    ),
    "stages as mappings": (
        lambda _: StagePlan([{"name": "warm"}]),
        ["stages must be Stage objects, got a dict", "Stage('name', ...)"],
    ),
    "a transform's class": (
        lambda _: trainer(transform=nn.Identity),
        ["transform must be a function of a batch, got the class Identity", "Identity(...)"],
    ),
    "a file as a state": (
        lambda folder: trainer().load_state_dict(file_in(folder)),
        ["state_dict must be a mapping", "CheckpointManager(directory, resume=path)"],
    ),
    # -- temperatures
    "a temperature of 0": (
        lambda _: NTXentLoss(temperature=0),
        ["temperature must be > 0, got 0", "0.01 to 0.5 are usual"],
    ),
    "a negative temperature": (
        lambda _: CLIPLoss(temperature=-2.66),
        ["temperature must be > 0, got -2.66", "0.01 to 0.5 are usual"],
    ),
    "the logarithm of a scale as a temperature": (
        lambda _: CLIPLoss(temperature=2.6592),
        ["temperature must, if learned, lie in [0.01, 1], got 2.6592", "exp(-2.6592) = 0.07"],
    ),
    "a scale as a temperature": (
        lambda _: CLIPLoss(temperature=100.0),
        ["temperature must, if learned, lie in [0.01, 1], got 100.0", "1 / 100.0 = 0.01"],
    ),
    "a parameter as a temperature": (
        lambda _: CLIPLoss(temperature=nn.Parameter(torch.tensor(0.07))),
        ["temperature must be a number, got a Parameter", "learn_temperature=True"],
    ),
    "a queue of another width": (
        lambda _: run(BATCH, loss=MoCoLoss(dim=8, queue_size=16)),
        ["key must be [batch, 8], got shape (4, 4)", "dim of the features"],
    ),
    "the class of a loss as its name": (
        lambda _: get_loss(CLIPLoss),
        ["name must be a string, such as 'clip'", "Call a class itself"],
    ),
}
