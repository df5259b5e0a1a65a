"""World size: is the update of a global batch the same on one rank and on two?

    python -m benchmarks.promise.world_size --peers /path/to/peers/bin/python

One epoch of plain gradient descent in global batches of 64, on one process, then on two that share
each batch (gloo, started with torchrun). The other libraries average gradients with
DistributedDataParallel and divide the data with DistributedSampler, as their documentation says.
There the user decides what a contrastive loss gathers, so the script tries the usual ways. The
table shows the loss over all samples after the epoch, and the difference of the weights relative to
the distance that they travelled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.promise.comparison import Comparison, Outcome, Side, main, outcome
from benchmarks.promise.setting import (
    Classifier,
    Sample,
    Towers,
    UsualCLIPLoss,
    classify,
    contrast,
    loss_with,
    samples,
    weights,
)

MODULE = "benchmarks.promise.world_size"
BATCH, RATE = 64, 0.1

Gather = Callable[[Tensor], Tensor]
"""Maps a rank's features [b, D] to the features that its loss compares."""

Cases = dict[str, Callable[[], Tensor]]
"""The cases of a library by name; each one trains and returns the weights."""

OWN = "CLIP's loss, 64 pairs, each rank's own"
PUT_BACK = "CLIP's loss, 64 pairs, all_gather, own features put back"
DIFFERENTIABLE = "CLIP's loss, 64 pairs, all_gather with gradient"
PAIRS = "CLIP's loss, 64 pairs"
EVEN = "cross entropy, 64 samples"
UNEVEN = "cross entropy, 71 samples (64 + 7)"


class GatheringCLIPLoss(UsualCLIPLoss):
    """The usual loss, over the features that a function gathers."""

    gather: Gather = staticmethod(lambda features: features)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the loss of the gathered features."""
        return super().forward(self.gather(image), self.gather(text))


class Whole(nn.Module):
    """Model and loss in one module, so that DistributedDataParallel averages both."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Sample) -> Tensor:
        """Return the loss of a rank's part of a batch."""
        return step_of(self.model)(self.model, self.loss, batch)


def step_of(model: nn.Module) -> Callable[[nn.Module, nn.Module, Sample], Tensor]:
    """Return the function that computes the loss of a batch for a model."""
    return contrast if isinstance(model, Towers) else classify


def ranks() -> int:
    """Return the number of ranks that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parts(case: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, list[Sample]]:
    """Return the model, the other libraries' loss, the optimizer and the data of a case."""
    torch.manual_seed(0)
    model = Towers() if case.startswith("CLIP") else Classifier()
    loss = GatheringCLIPLoss() if case.startswith("CLIP") else nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=RATE)
    return model, loss, optimizer, samples(71 if case == UNEVEN else 64)


def put_back(gather: Gather, features: Tensor) -> Tensor:
    """Gather without a gradient; then put back the rank's own features, which have a gradient."""
    if ranks() == 1:
        return features
    everything = list(gather(features.detach()))
    everything[dist.get_rank()] = features
    return torch.cat(everything)


def gathered(features: Tensor) -> Tensor:
    """Return the features of all ranks, without a gradient: `torch.distributed.all_gather`."""
    everything = torch.zeros(ranks(), *features.shape)
    dist.all_gather(list(everything), features)
    return everything


def gathered_with_gradient(features: Tensor) -> Tensor:
    """Return the features of all ranks, with torch's differentiable all_gather."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(features)) if ranks() > 1 else features


def with_ddp(case: str, gather: Gather | None = None) -> Tensor:
    """Train with DistributedDataParallel and DistributedSampler."""
    model, loss, optimizer, data = parts(case)
    if gather is not None:
        loss.gather = gather
    whole, sampler = Whole(model, loss), None
    if ranks() > 1:
        whole, sampler = DistributedDataParallel(whole), DistributedSampler(data, shuffle=False)
    for batch in DataLoader(data, batch_size=BATCH // ranks(), sampler=sampler):
        optimizer.zero_grad()
        whole(batch).backward()
        optimizer.step()
    return weights(model, loss)


def with_lightning(case: str, form: str = "") -> Tensor:
    """Train with Lightning's DDP, which inserts a DistributedSampler by itself."""
    from benchmarks.promise.lightning_module import Module, fit

    model, loss, optimizer, data = parts(case)
    module = Module((model, loss), step_of(model), optimizer)
    if form == "put back":
        loss.gather = partial(put_back, module.all_gather)
    elif form == "with gradient":
        loss.gather = lambda x: module.all_gather(x, sync_grads=True).view(-1, x.shape[-1])
    strategy = "ddp" if ranks() > 1 else "auto"
    loader = DataLoader(data, batch_size=BATCH // ranks())
    fit(module, loader, devices=ranks(), strategy=strategy)
    return weights(model, loss)


def with_diptych(case: str) -> Tensor:
    """Train with Diptych: a batch of the loader is the global batch, and the loss gathers."""
    from diptych.engine import SeededLoader, Trainer, tasks
    from diptych.losses import CLIPLoss, CrossEntropyLoss

    model, _, __, data = parts(case)
    loss = CLIPLoss() if case == PAIRS else CrossEntropyLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=RATE)
    task = tasks.image_text if case == PAIRS else tasks.classification
    trainer = Trainer(model, loss, optimizer, task=task, device="cpu")
    trainer.run(SeededLoader(data, BATCH, shuffle=False), max_epochs=1)
    return weights(model, loss)


SIDES: dict[str, Cases] = {
    "torch": {
        OWN: lambda: with_ddp(OWN),
        PUT_BACK: lambda: with_ddp(PUT_BACK, partial(put_back, gathered)),
        DIFFERENTIABLE: lambda: with_ddp(DIFFERENTIABLE, gathered_with_gradient),
        EVEN: lambda: with_ddp(EVEN),
        UNEVEN: lambda: with_ddp(UNEVEN),
    },
    "Lightning": {
        OWN: lambda: with_lightning(OWN),
        PUT_BACK: lambda: with_lightning(PUT_BACK, "put back"),
        DIFFERENTIABLE: lambda: with_lightning(DIFFERENTIABLE, "with gradient"),
        EVEN: lambda: with_lightning(EVEN),
        UNEVEN: lambda: with_lightning(UNEVEN),
    },
    "Diptych": {case: partial(with_diptych, case) for case in (PAIRS, EVEN, UNEVEN)},
}


def on_two_ranks(side: str) -> dict[str, Tensor]:
    """Run each case of a library on two ranks; return the weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", MODULE]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, side, str(path)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{side} failed on two ranks:\n{done.stderr[-3000:]}")
        found: dict[str, Tensor] = torch.load(path, weights_only=True)
        return found


def be_a_rank(side: str, path: str) -> None:
    """Run each case of a library on this rank."""
    torch.set_num_threads(1)
    if side != "Lightning":  # Lightning initialises the process group itself
        dist.init_process_group("gloo")
    found = {name: run() for name, run in SIDES[side].items()}
    if os.environ["RANK"] == "0":
        torch.save(found, path)
    dist.barrier()  # the other rank may abort if this one exits during a collective
    dist.destroy_process_group()


def both_ways(side: str) -> Iterator[Outcome]:
    """Run each case of a library on one rank and on two."""
    shared = on_two_ranks(side)
    for case, run in SIDES[side].items():
        model, loss, _, data = parts(case)
        start = weights(model, loss)
        ends = [(loss_with(v, model, loss, data), v) for v in (run(), shared[case])]
        yield outcome(case, *ends, start=start)


COMPARISON = Comparison(
    MODULE,
    ("on one rank", "on two ranks"),
    {
        "torch": Side(lambda: both_ways("torch"), ("torch",)),
        "Lightning": Side(lambda: both_ways("Lightning"), ("lightning",)),
        "Diptych": Side(lambda: both_ways("Diptych"), ("diptych",)),
    },
)

if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        be_a_rank(*sys.argv[1:])
    else:
        main(__doc__, COMPARISON)
