"""A model that is shared out over the ranks trains as one process trains it whole."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.engine import (
    BatchError,
    Evaluator,
    Trainer,
    TrainerSettings,
    certify,
    of_this_rank,
    tasks,
)
from diptych.engine.distributed.dtensor import is_sharded, local_part
from diptych.engine.distributed.sharding_units import find_units
from diptych.losses import CLIPLoss, CrossEntropyLoss
from tests.engine import sharded
from tests.engine.models import TokenLoss, sgd, trainer_of
from tests.engine.sharded import assert_equal_runs, make_trainer, train, weights_of

CASES: list[dict[str, Any]] = [
    {},
    {"microbatch_size": 3},
    {"microbatch_size": 2, "foreach": True},
    {"fused": True},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_two_ranks_that_share_a_model_end_with_the_weights_of_one_process(ranks, settings):
    expected = train(False, settings)
    for rank in ranks.run(train, [(True, settings)] * 2):
        assert_equal_runs(rank, expected)
        assert 0.4 < rank["share"] < 0.6
    assert expected["share"] == 1


def test_units_may_be_chosen_by_their_names(ranks):
    expected = train(False, {})
    for rank in ranks.run(train, [(("image.blocks.*", "text"), {})] * 2):
        assert_equal_runs(rank, expected)


@pytest.mark.slow  # for the start of the third rank
def test_three_ranks_share_a_model_too(ranks):
    expected = train(False, {})
    for rank in ranks.run(train, [(True, {"microbatch_size": 2})] * 3):
        assert_equal_runs(rank, expected)
        assert 0.1 < rank["share"] < 0.5


def test_alone_the_setting_changes_no_bit():
    whole, alone = train(False, {"microbatch_size": 3}), train(True, {"microbatch_size": 3})
    assert alone["records"] == whole["records"]
    for name, value in whole["weights"].items():
        assert alone["weights"][name].equal(value)


# -- what a task may call, and a loss may be ------------------------------------------------------


def parts(model: Any, batch: Any) -> dict[str, Tensor]:
    """Call the towers, never the model, and the first one twice."""
    image, text = model.image(batch["image"]), model.text(batch["text"])
    return {"image_features": (image + model.image(batch["image"])) / 2, "text_features": text}


class Classifier(nn.Module):
    """Logits [B, T, 4] for tokens [B, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, sharded.WIDTH)
        self.layers = nn.Sequential(sharded.Block(), sharded.Block())
        self.head = nn.Linear(sharded.WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def train_tokens(shard: bool, size: int | None) -> dict[str, Tensor]:
    """Return the weights after updates of a mean over tokens, whose weights are unequal."""
    torch.manual_seed(0)
    model, loss = Classifier().double(), CrossEntropyLoss(ignore_index=0)
    tokens = torch.randint(0, 5, (7, 4))
    batches = of_this_rank([{"tokens": tokens}])
    optimizer = sgd(model, loss)
    trainer = trainer_of(
        model, loss, optimizer=optimizer, task=tasks.next_token, shard=shard, microbatch_size=size
    )
    trainer.run(batches, max_epochs=3)
    return weights_of(trainer.model)


@pytest.mark.parametrize("size", [None, 2])
def test_a_mean_over_tokens_adds_up_over_pieces_and_shares(ranks, size):
    expected = train_tokens(False, None)
    for weights in ranks.run(train_tokens, [(True, size)] * 2):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-9)


def test_a_task_may_call_any_part_of_the_model_and_one_part_twice(ranks):
    expected = train(False, {"task": parts})
    for rank in ranks.run(train, [(True, {"task": parts, "microbatch_size": 2})] * 2):
        assert_equal_runs(rank, expected)


def train_thawed(shard: bool) -> dict[str, Tensor]:
    """Return the weights of a run that freezes one tower first, and the other one later."""
    trainer = make_trainer(shard, microbatch_size=3)
    model: Any = trainer.model
    for epoch, (image, text) in enumerate([(False, True), (True, False), (True, True)], 1):
        model.image.requires_grad_(image)
        model.text.requires_grad_(text)
        trainer.run(sharded.loader() if epoch == 1 else trainer.batches.data, max_epochs=epoch)
    return weights_of(model)


def test_parts_may_be_frozen_and_thawed_between_two_updates(ranks):
    expected = train_thawed(False)
    for weights in ranks.run(train_thawed, [(True,)] * 2):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-9)


def train_half(shard: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Classifier()
    loss = CrossEntropyLoss()
    trainer = trainer_of(
        model, loss, optimizer=sgd(model), task=tasks.next_token, shard=shard, precision="bf16"
    )
    trainer.run(of_this_rank([{"tokens": torch.randint(0, 5, (8, 4))}]), max_epochs=3)
    return weights_of(model)


def test_bf16_rounds_as_it_does_where_the_model_is_whole(ranks):
    whole = ranks.run(train_half, [(False,)] * 2)[0]
    for weights in ranks.run(train_half, [(True,)] * 2):
        for name, value in whole.items():
            assert weights[name].dtype == torch.float32
            torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


# -- how it begins --------------------------------------------------------------------------------


def begun_apart() -> dict[str, Any]:
    """Return what each rank has of a model that began with other values on each of them."""
    torch.manual_seed(dist.get_rank())
    model, loss = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), CLIPLoss()
    model[1].running_mean += dist.get_rank()
    old = [*model.parameters()]
    optimizer = torch.optim.SGD([{"params": [*model.parameters()]}, {"params": loss.parameters()}])
    Trainer(model, loss, optimizer, task=tasks.two_views, device="cpu", shard=True)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "weights": weights_of(model),
        "in optimizer": all(p is q for p, q in zip(model.parameters(), held, strict=False)),
        "loss whole": not any(is_sharded(p) for p in loss.parameters()),
        "kept": sum(p.numel() for p in old),
        "rows": [len(local_part(p)) for p in model.parameters()],
    }


def test_all_ranks_begin_with_shares_of_the_first_ones_values(ranks):
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).state_dict()
    found = ranks.run(begun_apart, [()] * 2)
    for rank in found:
        for name, value in expected.items():
            assert rank["weights"][name].equal(value), name
        assert rank["in optimizer"]
        assert rank["loss whole"]
        assert rank["kept"] == 0  # whoever holds the old parameters holds no memory
        assert rank["rows"] == [2, 2, 2, 2, 1, 1]


def evaluated(shard: bool) -> list[Tensor]:
    """Return the features of an evaluation between two epochs, and the loss after them."""
    trainer = make_trainer(shard)
    trainer.run(sharded.loader(), max_epochs=1)
    found: list[Tensor] = []
    evaluator = Evaluator(trainer.model, task=parts, device="cpu")
    evaluator.add_event_handler(
        "ITERATION_COMPLETED", lambda e: found.append(e.state.output["image_features"])
    )
    evaluator.evaluate([sharded.all_pairs()])
    trainer.run(trainer.batches.data, max_epochs=2)
    return [*found, *weights_of(trainer.model).values()]


def test_an_evaluation_sees_the_whole_model_and_training_goes_on(ranks):
    expected = evaluated(False)
    for rank in ranks.run(evaluated, [(True,)] * 2):
        for own, other in zip(rank, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


# -- what it holds --------------------------------------------------------------------------------


def tensor_bytes() -> int:
    """Return the memory of all tensors that Python knows, those in reference cycles included."""
    parts = [local_part(o) for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return sum(
        {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}.values()
    )


def held_by(make: Callable[[Any], Callable[[], None]]) -> int:
    """Return the memory that a model and three updates have added, without a collection."""
    batch = sharded.all_pairs()
    gc.collect()
    gc.disable()
    try:
        before = tensor_bytes()
        update = make(batch)
        for _ in range(3):
            update()
        return tensor_bytes() - before
    finally:
        gc.enable()


def by_hand(batch: Any) -> Callable[[], None]:
    """Return the update of a plain loop with torch's own functions."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.experimental import implicit_replication

    model = sharded.TwoTowers().double()
    whole = {model.logit_scale}
    for block in (*model.image.blocks, *model.text.blocks, model):
        fully_shard(block, ignored_params=whole)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def update() -> None:
        optimizer.zero_grad()
        image, text = model(*batch.values())
        ((image * text).sum() * model.logit_scale).backward()
        with implicit_replication():
            optimizer.step()

    return update


def in_a_trainer(batch: Any) -> Callable[[], None]:
    """Return the update of a trainer."""
    trainer = make_trainer(True, foreach=False)

    def update() -> None:
        trainer.run([batch], max_epochs=trainer.state.epoch + 1)
        trainer.outputs = {}

    return update


def memory() -> tuple[int, int]:
    """Return the memory of both, after an update whose imports leave cycles behind."""
    by_hand(sharded.all_pairs())()
    return held_by(by_hand), held_by(in_a_trainer)


def test_updates_hold_no_more_memory_than_those_of_a_plain_loop(ranks):
    for hand, trainer in ranks.run(memory, [()] * 2):
        assert trainer - hand < 100 < hand  # a scalar or two that are not logged yet


# -- what is refused ------------------------------------------------------------------------------


class Tied(nn.Module):
    """A head whose weight is that of the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 4)
        self.head.weight = self.blocks[0].weight


def refusals() -> list[str]:
    """Return what a sharded trainer says to what it cannot do, on this rank."""
    told = []

    def tell(call: Any) -> None:
        try:
            call()
        except (ValueError, BatchError) as error:
            told.append(str(error))

    tied = Tied()
    tell(lambda: trainer_of(tied, TokenLoss(), optimizer=sgd(tied), shard=True))
    used = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(used.parameters())
    used(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tell(lambda: trainer_of(used, TokenLoss(), optimizer=optimizer, shard=True))
    trainer = make_trainer(True, microbatch_size=2)
    share = {k: v[: 9 if dist.get_rank() else 2] for k, v in sharded.all_pairs().items()}
    tell(lambda: trainer.run([share]))
    late = TokenLoss()
    late.weight = trainer.model.get_parameter("image.head.weight")
    tell(lambda: setattr(trainer, "loss", late))
    tell(lambda: certify(make_trainer(True), share, ranks=False))
    tell(lambda: certify.interruption(lambda: (make_trainer(True), sharded.loader())))
    return told


def test_what_cannot_be_shared_out_is_refused_on_all_ranks(ranks):
    for tied, used, few, late, certificate, interruption in ranks.run(refusals, [()] * 2):
        assert "head.weight of no unit, which is blocks.0.weight of blocks.0 too" in tied
        assert "must be new if shard is set, got one with a state" in used
        assert "a sample for each of 5 pieces of at most 2, got 2 on one" in few
        assert "must hold whole parameters, got the sharded weight" in late
        assert certificate == interruption
        assert "in a single process" in certificate


def test_units_are_the_elements_of_lists_or_what_patterns_name():
    model = sharded.TwoTowers()
    blocks = [f"{tower}.blocks.{i}" for tower in ("image", "text") for i in range(2)]
    assert find_units(model, True) == blocks
    assert find_units(model, ("text", "*.blocks.1")) == ["image.blocks.1", "text", "text.blocks.1"]
    with pytest.raises(ValueError, match=r"got 'image.block', .* Similar names: image.blocks"):
        find_units(model, ("image.block",))
    with pytest.raises(ValueError, match=r"got 'text.blocks', a ModuleList\. .*'text.blocks.\*'"):
        find_units(model, ("text.blocks",))


def test_lists_of_lists_and_sequences_of_one_class_have_units():
    lists = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])])
    model = nn.ModuleDict({"lists": lists, "same": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    model["mixed"] = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert find_units(model, True) == ["lists.0.0", "same.0", "same.1"]


@pytest.mark.parametrize("shard", [(), 3, ("a", 2), [None]])
def test_a_setting_that_names_no_units_is_refused(shard):
    with pytest.raises((ValueError, TypeError)):
        TrainerSettings(shard=shard)


def test_fp16_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"got 'fp16', .*Use 'bf16'"):
        TrainerSettings(shard=True, precision="fp16")


def test_cuda_graphs_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"got 'reduce-overhead': .*Use compile=True"):
        TrainerSettings(shard=True, compile="reduce-overhead")


def test_an_old_torch_is_named_with_the_version_that_is_needed(monkeypatch):
    from diptych.engine.distributed import sharding

    monkeypatch.setattr(torch, "__version__", "2.8.0+cu124")
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"needs torch >= 2.9, got 2.8.0"):
        sharding.shard_model(model, TokenLoss(), sgd(model), True, torch.device("cpu"))
