"""Hard negative mining: each batch gets the candidates that the model mistakes for its pairs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.gathering import gather_rows
from diptych.engine.errors import BatchError
from diptych.engine.events import RunEvents
from diptych.engine.handler import Change, Handler
from diptych.engine.trainer import Trainer
from diptych.handlers.evaluation.evaluation import Evaluation
from diptych.handlers.evaluation.outputs_metric import check_features, check_ids

logger = logging.getLogger(__name__)

ROWS = 1024
"""Queries whose similarities to all candidates are in memory at once."""


def _check_candidates(_: Any, __: attrs.Attribute[Any], candidates: object) -> None:
    if not isinstance(candidates, Tensor) or candidates.ndim == 0 or len(candidates) < 2:
        got = tuple(candidates.shape) if isinstance(candidates, Tensor) else candidates
        raise TypeError(f"candidates must be a tensor [N, ...] of N >= 2 inputs, got {got!r}")


@attrs.define(eq=False)
class HardNegativeMining(Handler):
    """Adds to each batch the inputs that the last evaluation found closest to its queries.

    ```python
    def with_negatives(model, batch):
        outputs = tasks.image_text(model, batch)
        if "negatives" in batch:  # [B, k, ...]
            negatives = batch["negatives"]
            features = model.encode_text(negatives.flatten(0, 1)).unflatten(0, negatives.shape[:2])
            outputs |= {"negatives": features, "negative_groups": batch["negative_groups"]}
        return outputs


    trainer = Trainer(model, InfoNCELoss(), optimizer, task=with_negatives)
    trainer.attach(
        Evaluation(training_pairs, task=tasks.image_text, prefix="mining", at_start=True),
        HardNegativeMining("mining", texts, k=2),
    )
    ```

    The evaluation runs over the training data and returns the features of queries and candidates,
    and their `groups`; a side may be missing in a batch. For each group, the `k` candidates of
    other groups with the largest cosine to its query are kept; several queries, or candidates, of a
    group are averaged. Until the next evaluation, a batch (a dictionary) gets them as `negatives`
    [B, k, ...], and their groups as `negative_groups` [B, k], by which `InfoNCELoss` finds that one
    of them matches another query. Before the first evaluation a batch gets none.

    The result is part of a checkpoint. All ranks mine among the candidates of all ranks. The
    evaluation of an epoch that `max_iters` cuts is not mined, so that the run can be continued.

    Event: the evaluation's, and `Events.ITERATION_STARTED`.
    Cost: at each evaluation a product of all queries with all candidates, shared by the ranks; in
        memory, the features of both sides and `candidates`. For each batch a look-up on the host,
        and the forward pass of B k more inputs.

    Source: Xiong et al. 2020, arXiv:2007.00808; Karpukhin et al. 2020, arXiv:2004.04906.

    Args:
        evaluation: the prefix of an `Evaluation` that was attached before.
        candidates: inputs of the candidates [N, ...], in host memory; row i belongs to group i.
        k: negatives of each query.
        skip: most similar candidates to leave out, which may match without having the group's id.
        sides: the evaluation's outputs that are the features of queries and of candidates.
        group: the batch's key of the groups of its queries.

    Raises:
        TypeError: if `candidates` is no tensor of several inputs.
        ValueError: if a number is out of range; when attached, if there is no such evaluation.
        BatchError: while running: if the evaluation lacks features or groups, a group is no row of
            `candidates`, there are too few candidates, or a batch is no dictionary with groups.
    """

    changes: ClassVar[frozenset[Change]] = frozenset({Change.BATCH})
    collective: ClassVar[bool] = True

    evaluation: str
    candidates: Tensor = attrs.field(validator=_check_candidates, repr=False)
    k: int = attrs.field(default=1, validator=whole_number(), kw_only=True)
    skip: int = attrs.field(default=0, validator=whole_number(0), kw_only=True)
    sides: tuple[str, str] = attrs.field(
        default=("image_features", "text_features"), converter=tuple, kw_only=True
    )
    group: str = attrs.field(default="group", kw_only=True)
    _seen: list[tuple[list[Tensor], list[Tensor]]] = attrs.field(
        factory=lambda: [([], []), ([], [])], init=False, repr=False
    )
    _mined: tuple[Tensor, Tensor] | None = attrs.field(default=None, init=False, repr=False)
    _at_cut: bool = attrs.field(default=False, init=False, repr=False)
    _warned: bool = attrs.field(default=False, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Mine in the trainer's evaluation, and add negatives to its batches."""
        found = {one.prefix: one for one in trainer.handlers_of(Evaluation)}
        if self.evaluation not in found:
            raise ValueError(
                "evaluation must be the prefix of an Evaluation that was attached before, got "
                f"{self.evaluation!r}; there are {', '.join(found) or 'none'}"
            )
        evaluator = found[self.evaluation].evaluator
        evaluator.add_event_handler(Events.EPOCH_STARTED, self._start, trainer)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._mine)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._add)

    @property
    def role(self) -> str:
        """The prefix of the evaluation."""
        return self.evaluation

    def state_dict(self) -> dict[str, Any]:
        """Return the mined negatives of each group."""
        if self._mined is None:
            return {}
        groups, negatives = self._mined
        return {"groups": groups, "negatives": negatives}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._mined = (state_dict["groups"], state_dict["negatives"]) if state_dict else None

    def _start(self, _: Engine, trainer: Trainer) -> None:
        """Forget what was kept."""
        self._seen = [([], []), ([], [])]
        # An uninterrupted run does not evaluate there, so a run that continues must not mine.
        self._at_cut = trainer.last_event_name == RunEvents.EPOCH_CUT

    def _keep(self, evaluator: Any) -> None:
        """Keep the features and groups of a batch of the evaluation."""
        if self._at_cut:
            return
        outputs: Mapping[str, Tensor] = evaluator.state.output
        given = [name for name in self.sides if name in outputs]
        if not given or "groups" not in outputs:
            raise BatchError(
                f"the evaluation {self.evaluation!r} must return groups and {self.sides[0]} or "
                f"{self.sides[1]}, got {', '.join(outputs) or 'nothing'}. Name them in sides"
            )
        for name, (features, groups) in zip(self.sides, self._seen, strict=True):
            if name in given:
                check_features(outputs[name])
                check_ids("groups", outputs["groups"], len(outputs[name]))
                features.append(outputs[name].detach())
                groups.append(outputs["groups"].detach().to(outputs[name].device, torch.int64))

    @torch.no_grad()
    def _mine(self, evaluator: Any) -> None:
        """Find the hardest candidates of each group; the result is the same on all ranks."""
        if self._at_cut:
            return
        (queries, groups), (candidates, ids) = (
            _centres(*side, evaluator.device) for side in self._seen
        )
        self._seen = [([], []), ([], [])]
        if len(groups) == 0 or len(ids) <= self.k + self.skip:
            raise BatchError(
                f"the evaluation {self.evaluation!r} must have queries and more than k + skip = "
                f"{self.k + self.skip} candidates, got {len(groups)} and {len(ids)} groups of them"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= len(self.candidates):
            raise BatchError(
                f"groups must be rows of candidates, 0 to {len(self.candidates) - 1}, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        share = torch.arange(len(groups), device=groups.device).tensor_split(world_size())[rank()]
        found = [
            self._hardest(queries[rows], groups[rows], candidates, ids)
            for rows in share.split(ROWS)
        ]
        self._mined = groups.cpu(), gather_rows(torch.cat(found)).cpu()

    def _hardest(self, queries: Tensor, own: Tensor, candidates: Tensor, ids: Tensor) -> Tensor:
        """Return the ids of the hardest candidates of some queries, [n, k]."""
        similarity = (queries @ candidates.T).masked_fill(own[:, None] == ids, -torch.inf)
        best = similarity.topk(self.k + self.skip, dim=1).indices
        return ids[best[:, self.skip :]]

    def _add(self, trainer: Trainer) -> None:
        """Add the negatives of a batch to it."""
        if self._mined is None:
            return
        batch = trainer.state.batch
        queries = batch.get(self.group) if isinstance(batch, Mapping) else None
        if not isinstance(queries, Tensor):
            raise BatchError(
                f"batch must be a dictionary with {self.group!r}, the groups of its queries, got "
                f"a {type(batch).__name__}. Name the key with group=..."
            )
        groups, negatives = (mined.to(queries.device) for mined in self._mined)
        rows = torch.searchsorted(groups, queries.contiguous()).clamp(max=len(groups) - 1)
        if not self._warned and bool((groups[rows] != queries).any()):
            self._warned = True
            logger.warning(
                "A batch has groups that the evaluation %r has not: they get other groups' "
                "negatives. Evaluate all training data.",
                self.evaluation,
            )
        chosen = negatives[rows]
        inputs = self.candidates[chosen.to(self.candidates.device)]
        trainer.state.batch = {**batch, "negatives": inputs, "negative_groups": chosen}


def _centres(
    features: list[Tensor], groups: list[Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return each group's mean of unit features over all ranks, normalised, and the sorted groups.

    Features are [n, D] and groups [n], of each batch of this rank.
    """
    own = torch.cat(features) if features else torch.empty(0, 0)
    units = gather_rows(F.normalize(own.float(), dim=1), device)
    ids = gather_rows(torch.cat(groups) if groups else torch.empty(0, dtype=torch.int64), device)
    unique, position = ids.unique(return_inverse=True)
    # In float64 the mean hardly depends on the order of the rows, which differs between ranks.
    sums = torch.zeros(len(unique), *units.shape[1:], dtype=torch.float64, device=units.device)
    return F.normalize(sums.index_add_(0, position, units.double()), dim=1).float(), unique
