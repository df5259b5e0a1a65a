"""Checks of the contract that every loss keeps, for the losses of users too.

    from diptych.losses.contract import check_loss

    def test_my_loss_keeps_the_contract():
        check_loss(lambda: MyLoss(temperature=0.1))

Each check raises AssertionError with a sentence that names the violation. `CHECKS` maps the names
of the checks to them, for a parametrised test. The checks read these members of the loss:
`minimum_batch`, `symmetric`, `without_gradient`, `couples_samples`,
`example_inputs(batch, dim=8, generator=...)`, and `exempt`, a mapping from a check's name to the
reason why it cannot hold. A loss that derives from one of the bases has all of them.

NaN: a loss returns NaN (or raises) if any feature is NaN. It cannot check for NaN without waiting
for the device, and if one rank raised, the other ranks would hang; but it must not hide a NaN.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.losses.base.loss import Loss, sample_mean, with_defaults
from diptych.losses.base.temperature import Temperature

Draw = Callable[..., tuple[Tensor, ...]]


class Case(NamedTuple):
    """A loss to check.

    Attributes:
        build: Returns a new, equal loss each time (the random generator is seeded for it).
        draw: Returns the arguments of a call for a batch size; None: the loss's `example_inputs`.
    """

    build: Callable[[], nn.Module]
    draw: Draw | None = None

    def loss(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return a new loss with parameters and buffers of a dtype."""
        with seeded():
            return self.build().to(dtype)

    def contract(self) -> Loss:
        """Return a new loss with the defaults of the members that it does not define."""
        return with_defaults(self.loss())

    def inputs(self, batch: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Return the arguments of one call, the same each time."""
        draw = self.draw or self.contract().example_inputs
        drawn = draw(batch, generator=torch.Generator().manual_seed(0))
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in drawn)

    def call(self, inputs: Sequence[Tensor], loss: Callable[..., Any] | None = None) -> Tensor:
        """Return the value of a new loss, or of a given one, with the same seed each time."""
        loss = self.loss(inputs[0].dtype) if loss is None else loss
        with seeded():
            value: Tensor = loss(*inputs)
        return value

    def names(self) -> list[str]:
        """Return the names of the call's arguments."""
        loss = self.loss()
        for method in ("total_and_weight", "forward", "terms"):
            parameters = inspect.signature(getattr(loss, method, loss.forward)).parameters.values()
            if all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters):
                return [p.name for p in parameters]
        return []

    def takes_groups(self) -> bool:
        """Return whether the call has an optional argument `groups` after the inputs."""
        return self.names()[len(self.inputs()) :][:1] == ["groups"]


def check_loss(build: Callable[[], nn.Module], draw: Draw | None = None) -> None:
    """Run every check on a loss except `check_compiles`, which takes seconds.

    Args:
        build: Returns a new loss, such as the class or a lambda.
        draw: Returns the arguments of one call: ``draw(batch, generator=...)``; None: the loss's
            `example_inputs`, or two [batch, 8] sides.

    Raises:
        AssertionError: If the loss violates the contract; the message names the violation.
    """
    case = Case(build, draw)
    for name, check in CHECKS.items():
        if name not in case.contract().exempt:
            check(case)


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the CPU's generator inside the context, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def require(condition: bool, sentence: str) -> None:  # noqa: FBT001 - as `assert`
    """Raise AssertionError with a sentence unless a condition holds."""
    if not condition:
        raise AssertionError(sentence)


def gradients(
    case: Case, inputs: Sequence[Tensor], loss: nn.Module | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return a loss's value and its gradients for floating inputs and parameters."""
    loss = case.loss(inputs[0].dtype) if loss is None else loss
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    value = case.call(leaves, loss)
    wanted = [x for x in leaves if x.requires_grad] + list(loss.parameters())
    return value.detach(), list(torch.autograd.grad(value, wanted, allow_unused=True))


def finite(value: Tensor, found: Sequence[Tensor | None]) -> bool:
    """Return whether a value and all gradients are finite."""
    return all(bool(x.isfinite().all()) for x in (value, *found) if x is not None)


def check_call(case: Case) -> None:
    """Require a scalar with a graph that is the sum of its terms, and inputs left unchanged."""
    inputs = case.inputs()
    before = [x.clone() for x in inputs]
    value = case.call([x.requires_grad_(x.is_floating_point()) for x in inputs])
    require(value.shape == (), f"forward must return a scalar, got shape {tuple(value.shape)}")
    require(value.requires_grad, "the loss must be differentiable, got a value without a graph")
    require(value.dtype == torch.float64, f"float64 inputs must give float64, got {value.dtype}")
    same = all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    require(same, "the loss must not change its inputs in place")
    half = case.call(case.inputs(dtype=torch.bfloat16), case.loss(torch.float32))
    require(half.dtype == torch.float32, f"bf16 inputs must give float32, got {half.dtype}")
    with seeded():
        terms = case.contract().terms(*inputs)
    gap = (torch.stack(list(terms.values())).sum() - value).abs()
    require(bool(gap <= 1e-12 * (1 + value.abs())), "forward must be the sum of terms")
    kinds = [p.kind for p in inspect.signature(type(case.loss())).parameters.values()]
    require(
        inspect.Parameter.VAR_KEYWORD not in kinds,
        "the constructor must not take **kwargs, which would accept a misspelt argument",
    )


def check_gradients(case: Case) -> None:
    """Require gradients for inputs and parameters that equal finite differences in float64."""
    loss, inputs = case.loss(), case.inputs(4)
    varied = _inputs_with_gradient(case, inputs)
    parameters = dict(loss.named_parameters())

    def value(*tensors: Tensor) -> Tensor:
        arguments, fresh = list(inputs), case.loss()
        for i, tensor in zip(varied, tensors, strict=False):
            arguments[i] = tensor
        changed = dict(zip(parameters, tensors[len(varied) :], strict=True))
        with seeded():
            result: Tensor = torch.func.functional_call(fresh, changed, tuple(arguments))
        return result

    point = [inputs[i] for i in varied] + list(parameters.values())
    point = [x.detach().clone().requires_grad_() for x in point]
    # Fast mode takes one random direction per tensor: networks have too many numbers for all.
    fast = sum(x.numel() for x in point) > 100
    agree = torch.autograd.gradcheck(value, tuple(point), raise_exception=False, fast_mode=fast)
    require(agree, "gradients differ from finite differences")


def _inputs_with_gradient(case: Case, inputs: tuple[Tensor, ...]) -> list[int]:
    """Return the indices of the inputs that get a gradient: all except `without_gradient`."""
    names, stopped = case.names(), case.contract().without_gradient
    _, found = gradients(case, inputs)
    floating = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    varied = []
    for i, gradient in zip(floating, found, strict=False):
        named = names[i] if i < len(names) else f"argument {i}"
        none = gradient is None or not bool(gradient.any())
        require(none == (named in stopped), f"{named} gets {'no' if none else 'a'} gradient")
        varied += [] if none else [i]
    return varied


def check_permutation(case: Case) -> None:
    """Require that reordering the batch changes only the order of the gradients."""
    inputs = case.inputs()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    value, found = gradients(case, inputs)
    moved, changed = gradients(case, [x[order] if x.dim() else x for x in inputs])
    same = torch.allclose(value, moved, rtol=1e-10, atol=1e-12)
    require(same, "the value depends on the batch's order")
    per_sample = sum(x.is_floating_point() for x in inputs)
    for i, (x, y) in enumerate(zip(found, changed, strict=True)):
        if x is not None and y is not None:
            expected = x[order] if i < per_sample and x.dim() else x
            same = torch.allclose(expected, y, rtol=1e-8, atol=1e-10)
            require(same, "the gradient depends on the batch's order")


def check_symmetry(case: Case) -> None:
    """Require that swapping the sides leaves the value unchanged, if the loss is `symmetric`."""
    if case.contract().symmetric:
        first, second, *rest = case.inputs()
        value, swapped = case.call([first, second, *rest]), case.call([second, first, *rest])
        require(torch.allclose(value, swapped, rtol=1e-10), "swapping the sides changes the value")


def check_half_precision(case: Case) -> None:
    """Require finite results for similar features, temperature 0.01 and half-precision autocast."""
    for dtype in (torch.bfloat16, torch.float16):
        loss = case.loss(torch.float32)
        for module in loss.modules():
            if isinstance(module, Temperature):
                module.value = 0.01
        inputs = [
            (x[:1] + 1e-3 * x).to(dtype) if x.is_floating_point() and x.dim() else x
            for x in case.inputs(dtype=torch.float32)
        ]
        with torch.autocast("cpu", dtype=dtype):
            value, found = gradients(case, inputs, loss)
        require(finite(value, found), f"a value or gradient overflows under {dtype} autocast")


def check_small_batches(case: Case) -> None:
    """Require finite results for one or two samples (or an error), one group, and zero vectors."""
    for batch in (1, 2):
        if batch < case.contract().minimum_batch:
            _require_error(case, case.inputs(batch), f"a batch of {batch}", named=False)
        else:
            value, found = gradients(case, case.inputs(batch))
            require(finite(value, found), f"a batch of {batch} gives a value that is not finite")
    if case.takes_groups():
        value, found = gradients(case, [*case.inputs(), torch.zeros(6, dtype=torch.int64)])
        require(finite(value, found), "all samples in one group: not finite")
    for zeros in (slice(0, 1), slice(0, 6)):
        inputs = case.inputs()
        for x in inputs:
            x[zeros] = 0
        value, found = gradients(case, inputs)
        bounded = all(bool((x.abs() < 1e6).all()) for x in found if x is not None)
        require(finite(value, found) and bounded, "zero vectors: a value or gradient explodes")


def check_no_group(case: Case) -> None:
    """Require that samples without a group, -100, are as samples each in a group of its own."""
    if not case.takes_groups():
        return
    value, found = gradients(case, [*case.inputs(), torch.tensor([0, 0, -100, -100, -100, 1])])
    own, expected = gradients(case, [*case.inputs(), torch.tensor([0, 0, 11, 12, 13, 1])])
    pairs = [(value, own), *zip(found, expected, strict=True)]
    same = all(
        x is y or (x is not None and y is not None and torch.allclose(x, y, rtol=1e-10))
        for x, y in pairs
    )
    require(same, "groups of -100 must mean no group: each such sample matches its own pair alone")


def check_errors(case: Case) -> None:
    """Require a ValueError or TypeError that names the argument, for wrong shapes and types."""
    inputs = case.inputs()
    for i, x in enumerate(inputs):
        if x.dim() == 0:
            continue
        rest = (inputs[:i], inputs[i + 1 :])
        wrong = {"of unequal size": x[:-1], "of wrong rank": x.reshape(-1)[:6].view(6, 1, 1, 1, 1)}
        wrong["of wrong dtype"] = x.long() if x.is_floating_point() else x.double()
        for what, bad in wrong.items():
            _require_error(case, [*rest[0], bad, *rest[1]], f"argument {i} {what}")
    if case.takes_groups():
        _require_error(case, [*inputs, torch.zeros(6)], "floating groups")
        _require_error(case, [*inputs, torch.zeros(5, dtype=torch.int64)], "too few groups")


def _require_error(case: Case, inputs: Sequence[Tensor], what: str, *, named: bool = True) -> None:
    try:
        case.call(inputs, case.loss())
    except (ValueError, TypeError) as error:
        known = not named or any(name in str(error) for name in case.names())
        require(known, f"{what}: the error names no argument: {error}")
        return
    raise AssertionError(f"{what}: no error")


def check_nan(case: Case) -> None:
    """Require that a NaN in the features gives a NaN or an error: it is never hidden."""
    for i, x in enumerate(case.inputs()):
        if x.is_floating_point() and x.dim():
            inputs = case.inputs()
            inputs[i][2] = torch.nan
            try:
                value = case.call(inputs)
            except ValueError:
                continue
            require(not bool(value.isfinite()), f"a NaN in argument {i} gives {value:g}")


def check_state(case: Case) -> None:
    """Require a state that a file restores exactly and that evaluation mode does not change."""
    loss, inputs = case.loss(), case.inputs()
    for _ in range(3):
        case.call(inputs, loss)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = case.loss()
    other.load_state_dict(torch.load(file, weights_only=True))
    require(torch.equal(case.call(inputs, loss), case.call(inputs, other)), "state is not restored")
    before = {name: value.clone() for name, value in loss.eval().state_dict().items()}
    with torch.no_grad():
        case.call(inputs, loss)
    same = all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    require(same, "evaluation mode changes the state")


class NoHostSync(TorchDispatchMode):
    """Raise at every operation for which the host waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse reads of values, and results whose shape depends on values."""
        name = func.overloadpacket.__name__
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal"}
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        require(not by_mask and name not in waits, f"the host waits for the device at aten::{name}")
        return func(*args, **(kwargs or {}))


def check_no_host_sync(case: Case) -> None:
    """Require that forward and backward never wait for the device."""
    loss, inputs = case.loss(torch.float32), case.inputs(dtype=torch.float32)
    with seeded(), NoHostSync():  # type: ignore[no-untyped-call]
        loss(*(x.requires_grad_(x.is_floating_point()) for x in inputs)).backward()


def check_pieces(case: Case) -> None:
    """Require that a loss that does not couple samples is the same from pieces of a batch."""
    loss, inputs = case.loss(), case.inputs()
    coupled = getattr(loss, "couples_samples", None)
    require(isinstance(coupled, bool), "the class must declare couples_samples = True or False")
    if coupled:
        return
    mean = sample_mean(loss)
    if mean is None:
        raise AssertionError("a loss with couples_samples = False must define total_and_weight")
    cuts = (slice(0, 4), slice(4, 6))
    pieces = [mean.total_and_weight(*(x[cut] if x.dim() else x for x in inputs)) for cut in cuts]
    totals, weights = (torch.stack(list(x)).sum() for x in zip(*pieces, strict=True))
    value = case.call(inputs, loss)
    require(torch.allclose(totals / weights, value, rtol=1e-12), "pieces do not add up")


def check_compiles(case: Case, backend: str = "eager") -> None:
    """Require the same value from ``torch.compile(fullgraph=True)``."""
    inputs = case.inputs()
    torch.compiler.reset()
    compiled = torch.compile(case.loss(), fullgraph=True, backend=backend)
    value = case.call(inputs, compiled)
    require(torch.allclose(value, case.call(inputs), rtol=1e-10), "compiled, the value differs")


CHECKS: dict[str, Callable[[Case], None]] = {
    "call": check_call,
    "gradients": check_gradients,
    "permutation": check_permutation,
    "symmetry": check_symmetry,
    "half_precision": check_half_precision,
    "small_batches": check_small_batches,
    "no_group": check_no_group,
    "errors": check_errors,
    "nan": check_nan,
    "state": check_state,
    "no_host_sync": check_no_host_sync,
    "pieces": check_pieces,
}
"""Every check by name, except the compiler's."""
