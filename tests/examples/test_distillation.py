"""The distillation example trains a student alone and with a teacher."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from examples.distillation import Student, compare
from examples.emoji.model import TwoTowers


@pytest.mark.slow
def test_both_students_are_trained_and_the_teacher_is_kept(emoji, tmp_path):
    flags = Namespace(
        teacher=tmp_path / "teacher.pt", teacher_epochs=1, epochs=1, weight=1.0, seed=0
    )
    results = compare(emoji[::11], flags)
    assert list(results) == ["teacher", "student alone", "student with teacher"]
    assert all(0 <= value <= 1 for values in results.values() for value in values.values())
    TwoTowers().load_state_dict(torch.load(flags.teacher, weights_only=True))
    assert compare(emoji[::11], flags) == results


def test_the_student_has_a_tenth_of_the_parameters():
    sizes = [sum(p.numel() for p in model.parameters()) for model in (TwoTowers(), Student())]
    assert 9 < sizes[0] / sizes[1] < 11
