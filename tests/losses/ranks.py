"""Processes that act as ranks of a group, and the results of a loss on them."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.losses.contract import Case

SPLITS = ((3, 3), (5, 1), (2, 2, 2), (1, 3, 2))
"""Local batch sizes by rank, of a global batch of 6."""


class Ranks:
    """Processes that run functions as ranks of a new group for each run; each is started once."""

    def __init__(self, folder: Path, backend: str = "gloo") -> None:
        self.folder = folder
        self.backend = backend
        self.runs = 0
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (len(self.pipes), self.backend, theirs)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self.pipes.append(ours)
        self.processes.append(process)

    def run(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call an importable function on as many ranks as there are argument tuples.

        Returns:
            The return values of the ranks, in order.

        Raises:
            AssertionError: With the traceback of a rank that failed.
        """
        self.runs += 1
        while len(self.pipes) < len(arguments):
            self._start()
        store = self.folder / f"store-{self.runs}"
        pipes = self.pipes[: len(arguments)]
        for pipe, own in zip(pipes, arguments, strict=True):
            pipe.send_bytes(pickle.dumps((str(store), len(arguments), function, own)))
        results = [pickle.loads(pipe.recv_bytes()) for pipe in pipes]  # noqa: S301 - our own
        failures = [failure for _, failure in results if failure]
        assert not failures, "\n".join(failures)
        return [result for result, _ in results]

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)


def _serve(rank: int, backend: str, pipe: Any) -> None:
    """Run the functions that arrive through the pipe until it closes."""
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # importing Ignite gives it
    while True:
        try:
            store, ranks, function, arguments = pickle.loads(pipe.recv_bytes())  # noqa: S301
        except EOFError:
            return
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=30),
            device_id=torch.device("cuda", rank) if backend == "nccl" else None,
        )
        dist.barrier()  # a function without a collective must not end before the others connect
        try:
            answer = (function(*arguments), "")
        except Exception:  # noqa: BLE001 - the parent raises it
            answer = (None, f"rank {rank}: {traceback.format_exc()}")
        dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))


def split(inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Return each rank's piece of the inputs; a 0-dim tensor goes to all."""
    pieces = [x.split(list(sizes)) if x.dim() else [x] * len(sizes) for x in inputs]
    return list(zip(*pieces, strict=True))


def make_encoders(inputs: Sequence[Tensor]) -> nn.ModuleDict:
    """Return a linear map for each floating input that has samples."""
    return nn.ModuleDict(
        {
            f"encoder_{i}": nn.Linear(x.shape[-1], x.shape[-1], dtype=torch.float64)
            for i, x in enumerate(inputs)
            if x.is_floating_point() and x.dim()
        }
    )


def measure(build: Callable[[], nn.Module], calls: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Return the results that a data-parallel trainer gets after some calls, averaged over ranks.

    Every floating input goes through its own encoder, a linear map.

    Returns:
        Value and gradients of the last call, and the loss's state after it.
    """
    case = Case(build)
    loss = case.loss()
    torch.manual_seed(0)
    encoders = make_encoders(calls[0])
    found: dict[str, Tensor] = {}
    for inputs in calls:
        loss.zero_grad()
        encoders.zero_grad()
        encoded = [
            encoders[f"encoder_{i}"](x) if f"encoder_{i}" in encoders else x
            for i, x in enumerate(inputs)
        ]
        value = case.call(encoded, loss)
        value.backward()
        found = {"loss": value.detach()}
    for name, parameter in [*encoders.named_parameters(), *loss.named_parameters()]:
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    if dist.is_initialized():
        for tensor in found.values():
            dist.all_reduce(tensor)
            tensor.div_(dist.get_world_size())
    return {**found, **{f"state {name}": value for name, value in loss.state_dict().items()}}


def assert_same_on_ranks(
    ranks: Ranks,
    build: Callable[[], nn.Module],
    inputs: Sequence[Tensor],
    splits: Sequence[Sequence[int]] = SPLITS,
    calls: int = 2,
) -> None:
    """Assert that loss, gradients and state on several ranks are those of one process.

    Args:
        ranks: The processes.
        build: Returns a new loss; it must be importable (a class, a partial).
        inputs: Float64 arguments of a call of 6 samples.
        splits: Local batch sizes by rank, for each trial.
        calls: Calls in a row, of which the last is compared (a queue has filled by then).
    """
    expected = measure(build, [inputs] * calls)
    for sizes in splits:
        arguments = [(build, [piece] * calls) for piece in split(inputs, sizes)]
        for rank, found in enumerate(ranks.run(measure, arguments)):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[name],
                    value,
                    rtol=1e-10,
                    atol=1e-12,
                    msg=lambda text, name=name, sizes=sizes, rank=rank: (
                        f"{name}, {sizes} samples by rank, rank {rank}: {text}"
                    ),
                )
