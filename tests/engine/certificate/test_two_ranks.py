"""Two processes against one: what is sound passes, what is planted is named."""

from __future__ import annotations

import pytest
import torch

from diptych.engine import certify
from diptych.engine.certificate import two_ranks
from diptych.engine.certificate.report import Check
from diptych.engine.certificate.training_copy import TrainingCopy
from tests.engine.certificate.trainings import ACROSS_RANKS, pairs, trainer_of

pytestmark = pytest.mark.xdist_group("two_ranks")  # its processes start once, on one worker


@pytest.fixture(scope="module")
def checks() -> dict[str, list[Check]]:
    """Return the checks of all trainings, whose jobs share one pair of processes."""
    jobs, found, given = {}, {}, {}
    for name, build in ACROSS_RANKS.items():
        trainer, batch = build()
        training = TrainingCopy.of(trainer, torch.device("cpu"), torch.float64)
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        given[name] = (training, batch)
        jobs |= {
            f"{name}: {job}": parts for job, parts in two_ranks.jobs_of(training, batch).items()
        }
    results = two_ranks.run_on_two_ranks(jobs)
    for name, (training, batch) in given.items():
        own = {
            job.removeprefix(f"{name}: "): value
            for job, value in results.items()
            if job.startswith(f"{name}: ")
        }
        found[name] = two_ranks.compared(training, batch, own, 1e-8)
    return found


@pytest.mark.parametrize("name", ["sound", "transform", "global mean"])
def test_a_loss_of_the_global_batch_passes_with_equal_and_unequal_shares(checks, name: str):
    assert [check.way for check in checks[name]] == ["two ranks, 4 + 4", "two ranks, 5 + 4"]
    assert all(check.passed for check in checks[name])


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("batch norm", "batch norm sees one rank's samples: image.1"),
        ("local", "its own rank's samples alone"),
        ("noise", "the transform draws once for a rank's batch"),
        ("centred", "or mixes its samples"),
        ("multiplied", "2 times too large: a factor of the number of ranks"),
    ],
)
def test_what_is_planted_is_named(checks, name: str, cause: str):
    for check in checks[name]:
        assert not check.passed
        assert cause in check.remark


def test_a_mean_over_a_ranks_own_samples_is_right_for_equal_shares_only(checks):
    equal, unequal = checks["mean over samples"]
    assert equal.passed
    assert not unequal.passed
    assert "its own rank's samples alone" in unequal.remark


def test_what_cannot_be_sent_to_another_process_is_said_and_is_no_fault():
    trainer = trainer_of()
    trainer.task = lambda model, batch: dict(zip("ab", model(**batch), strict=True))
    report = certify(trainer, pairs())
    (check,) = [check for check in report.checks if check.way == "two ranks"]
    assert (check.verdict, check.passed) == ("not run", True)
    assert "at the top of a module" in check.remark


def ends(*_: object) -> None:
    """End without a result, as a script that calls sys.exit() when it is imported."""


@pytest.mark.slow  # two processes start
def test_ranks_that_end_without_a_result_are_a_script_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(two_ranks, "_work", ends)
    with pytest.raises(two_ranks.RankError, match="cannot import the script"):
        two_ranks.run_on_two_ranks({})
