"""Importing losses loads no compiler, no Ignite and no Triton."""

import pytest

from tests.losses.processes import printed

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "ignite", "triton", "matplotlib", "PIL")


@pytest.mark.parametrize(
    "statement",
    [
        "import diptych.losses",
        "from diptych.losses import CLIPLoss",
        "from diptych.losses import available_losses; available_losses()",
        "from diptych.losses.contract import check_loss",
    ],
)
def test_importing_losses_loads_only_torch(statement: str) -> None:
    code = f"import sys, torch; before = set(sys.modules); {statement}\n"
    code += f"print(*sorted(set({HEAVY}) & (set(sys.modules) - before)))"

    assert printed(code) == ""


def test_a_loss_is_computed_in_tiles_without_the_compiler() -> None:
    code = """
import sys, torch
from diptych.losses import CLIPLoss
sides = torch.randn(2, 6, 8, requires_grad=True)
CLIPLoss(tile=2)(*sides).backward()
print(sides.grad.isfinite().all().item(), "torch._dynamo" in sys.modules)
"""
    assert printed(code).startswith("True")
