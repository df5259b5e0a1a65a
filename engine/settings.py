"""The settings of a `Trainer`: frozen, and checked where they enter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import attrs
import torch

from diptych.engine.checks import whole_number
from diptych.engine.step.compilation import WITH_CUDA_GRAPHS, CompileMode

Precision = Literal["fp32", "bf16", "fp16"]
"""What the model computes in: float32, or autocast to bfloat16 or float16. Parameters stay as they
are."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The type of autocast for each precision that has one."""

Units = bool | tuple[str, ...]
"""Which modules of a sharded model are gathered as units: see `TrainerSettings`."""


def _check_precision(_: Any, __: attrs.Attribute[str], value: object) -> None:
    if value not in get_args(Precision):
        raise ValueError(
            f"precision must be one of {', '.join(get_args(Precision))}, got {value!r}"
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
        raise ValueError(
            f"shard must be True, False or patterns of the units' paths, got {value!r}"
        )


def _as_device(value: torch.device | str | None) -> torch.device | None:
    return None if value is None else torch.device(value)


@attrs.frozen(kw_only=True)
class TrainerSettings:
    """How a `Trainer` computes; none of it changes what it computes, within the precision.

    Attributes:
        precision: fp32, bf16 or fp16. fp16 scales the loss; the others need no scaling.
        microbatch_size: samples that go through the model at once; None: the whole batch.
        device: where model, loss and batches go; None: the process's accelerator where there is
            one, else the CPU.
        prefetch: whether a batch is copied to a CUDA device while the device computes the update
            before it, for the memory of one batch more; it changes no number, and nothing at all
            elsewhere.
        compile: whether the model is compiled in place (`torch.nn.Module.compile`), or the mode in
            which; its state-dict keys stay. "reduce-overhead" runs it as CUDA graphs, which pays
            where a model is small and its batches have one shape.
        seed: of Python's, NumPy's and torch's generators when a run starts from its beginning;
            None leaves them alone.
        log_every: iterations between two log points; the end of an epoch is one too.
        shard: whether parameters, gradients and the optimizer's state are shared out over the
            ranks, and which modules are gathered as units: True for each element of each list of
            modules, or patterns of paths ("image.blocks.*"). Alone it changes nothing.

    Raises:
        ValueError: if a value is outside what is listed, or sharding is to go with fp16 or CUDA
            graphs.
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
                "precision of a sharded model must be fp32 or bf16, got 'fp16', whose scaler looks "
                "at one rank's gradients: take 'bf16'"
            )
        if self.shard and self.compile in WITH_CUDA_GRAPHS:
            raise ValueError(
                "compile of a sharded model must do without CUDA graphs, got "
                f"{self.compile!r}, whose parameters would have to stay where they are: take "
                "compile=True"
            )
