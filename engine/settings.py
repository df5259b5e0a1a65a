"""The settings of a `Trainer`, frozen and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import attrs
import torch

from diptych.engine.checks import whole_number
from diptych.engine.step.compilation import WITH_CUDA_GRAPHS, CompileMode

Precision = Literal["fp32", "bf16", "fp16"]
"""The type that the model computes in: float32, or autocast to bfloat16 or float16. Parameters keep
their own type."""

OTHER_NAMES: dict[str, tuple[object, ...]] = {
    "fp32": (32, "32", "32-true", "float32", "no", torch.float32),
    "bf16": ("bf16-mixed", "bfloat16", "bf16-true", torch.bfloat16),
    "fp16": (16, "16", "16-mixed", "float16", "half", torch.float16),
}
"""Other trainers' names of each precision."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The autocast type of each precision that has one."""

Units = bool | tuple[str, ...]
"""The modules of a sharded model that are gathered as units: see `TrainerSettings`."""


def _check_precision(_: Any, __: attrs.Attribute[str], value: object) -> None:
    if value not in get_args(Precision):
        near = [name for name, others in OTHER_NAMES.items() if value in others]
        way_out = f". Pass {near[0]!r}" if near else ""
        raise ValueError(
            f"precision must be one of {', '.join(get_args(Precision))}, got {value!r}{way_out}"
        )


def _check_seed(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {value!r}")


def _check_compile(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool) and value not in get_args(CompileMode):
        raise ValueError(
            f"compile must be True, False or one of {', '.join(get_args(CompileMode))}, "
            f"got {value!r}"
        )


def _as_units(value: Units | Sequence[str]) -> Units:
    if isinstance(value, bool):
        return value
    return (value,) if isinstance(value, str) else tuple(value)


def _check_shard(_: Any, __: attrs.Attribute[Any], value: Units) -> None:
    if not isinstance(value, bool) and not (value and all(isinstance(v, str) for v in value)):
        raise ValueError(f"shard must be True, False or patterns of module paths, got {value!r}")


def _as_device(value: torch.device | str | None) -> torch.device | None:
    try:
        return None if value is None else torch.device(value)
    except RuntimeError as error:
        raise ValueError(
            f"device must be 'cpu', 'cuda', 'cuda:0' or another device of torch, got {value!r}. "
            "Without it the trainer takes the accelerator if there is one"
        ) from error


@attrs.frozen(kw_only=True)
class TrainerSettings:
    """The settings of a `Trainer`. Apart from precision and seed, none of them changes a result.

    Attributes:
        precision: fp32, bf16 or fp16. Only fp16 scales the loss.
        microbatch_size: samples per forward pass; None: the whole batch.
        device: the device of model, loss and batches; None: the process's accelerator if there is
            one, else the CPU.
        prefetch: whether to copy a batch to a CUDA device while the device computes the update
            before it. It takes the memory of one more batch, and has no effect on other devices.
        compile: whether to compile the model in place (`torch.nn.Module.compile`), or the mode;
            state-dict keys stay. "reduce-overhead" uses CUDA graphs, which pays if a model is
            small and all batches have the same shape.
        seed: the seed of Python's, NumPy's and torch's generators at the start of a new run; None:
            they are not seeded.
        log_every: iterations between two log points; the end of an epoch is one too.
        shard: whether to shard parameters, gradients and optimizer state over the ranks, and which
            modules are gathered as units: True for each element of each module list, or patterns
            of module paths ("image.blocks.*"). It has no effect in a run of one process.

    Raises:
        ValueError: if a value is out of range, or sharding is combined with fp16 or CUDA graphs.
    """

    precision: Precision = attrs.field(default="fp32", validator=_check_precision)
    microbatch_size: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(whole_number())
    )
    device: torch.device | None = attrs.field(default=None, converter=_as_device)
    prefetch: bool = attrs.field(default=True, validator=attrs.validators.instance_of(bool))
    compile: bool | CompileMode = attrs.field(default=False, validator=_check_compile)
    seed: int | None = attrs.field(default=None, validator=attrs.validators.optional(_check_seed))
    log_every: int = attrs.field(default=50, validator=whole_number())
    shard: Units = attrs.field(default=False, converter=_as_units, validator=_check_shard)

    def __attrs_post_init__(self) -> None:
        if self.shard and self.precision == "fp16":
            raise ValueError(
                "precision must be fp32 or bf16 for a sharded model, got 'fp16', whose scaler sees "
                "the gradients of one rank only. Use 'bf16'"
            )
        if self.shard and self.compile in WITH_CUDA_GRAPHS:
            raise ValueError(
                "compile must not use CUDA graphs for a sharded model, got "
                f"{self.compile!r}: graphs need parameters at fixed addresses. Use compile=True"
            )
