"""Bugs that layouts and optimizers are prone to, planted one at a time: certify names the first thing that differs."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest

from glm_jax.config import PRESETS, Config
from rlhf.certify import (
    STEPS,
    Limits,
    Row,
    Trained,
    compare,
    iterations,
    reference_of,
    rows_for,
    train,
)
from rlhf.doctor.adamw import learning_rate
from rlhf.trials.jobs import OPTIM
from rlhf.trials.models import tiny
from sharding.layout import Layout
from tests.rlhf import planted, planted_optim

Patch = pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Bug:
    """A bug, where it is planted, and the first thing that certify should find different."""

    plant: Callable[[Patch], None]
    job: str
    layout: Layout
    where: str
    part: str
    name: str = ""  # the first that is named; "": any
    model: str = "chatglm3-6b"
    generation: Layout | None = None
    only: str = ""  # a pattern that all names match: nothing that only suffers
    rounded: tuple[str, str] | None = (
        None  # part and name in bfloat16, whose loss hides a small change
    )


PIPELINE = Layout(pipe=2, microbatches=2)
CIRCULAR = Layout(pipe=2, microbatches=2, repeats=2)
TWO, PIECES, TENSOR = Layout(data=2), Layout(accumulate=2), Layout(tensor=2)
FIRST, AGAIN, V1 = "update 1", "iteration 2", "chatglm-6b"
# the first update whose learning rate is not 0
MOVES = next(f"update {k}" for k in (1, 2) if learning_rate(OPTIM, k, STEPS) > 0)
SCALES = r"norm|\.b_"
BUGS: dict[str, Bug] = {
    "a spec that drops a reduction": Bug(planted.no_reduction, "sft", TENSOR, FIRST, "loss"),
    "a mean of the shards' means": Bug(planted.mean_of_means, "sft", TWO, FIRST, "loss"),
    "a dropped microbatch": Bug(planted.dropped_microbatch, "reward", PIPELINE, FIRST, "loss"),
    "stages in another order": Bug(planted.swapped_stages, "dpo", PIPELINE, FIRST, "loss"),
    "stale weights after resharding": Bug(planted.stale_weights, "ppo", PIPELINE, AGAIN, "answers"),
    "labels shifted at shard edges": Bug(planted.label_shift, "sft", TWO, FIRST, "loss"),
    "a leak of the padded vocabulary": Bug(planted.vocabulary_leak, "sft", TENSOR, FIRST, "loss"),
    "a wrong weight of accumulated losses": Bug(
        planted.accumulation_weight, "sft", PIECES, FIRST, "loss"
    ),
    "rotary positions reset": Bug(planted.rotary_reset, "reward", TWO, FIRST, "loss"),
    "noise that depends on the shard": Bug(planted.noise_by_shard, "reward", TWO, FIRST, "loss"),
    "a bias's gradient of one shard": Bug(
        planted.bias_of_some_rows, "sft", TWO, FIRST, "gradient", "b_o", V1, only="b_o"
    ),
    "a bias added by every shard": Bug(
        planted.bias_of_every_shard,
        "sft",
        TENSOR,
        FIRST,
        "loss",
        model=V1,
        rounded=("gradient", "b_out"),
    ),
    "averaged gradients of pieces": Bug(
        planted.averaged_pieces, "sft", PIECES, FIRST, "gradient", "w_head"
    ),
    "the gradient of the last piece": Bug(planted.last_piece, "reward", PIECES, FIRST, "gradient"),
    "stale values under remat": Bug(
        planted.stale_remat,
        "sft",
        Layout(fsdp=2, remat="full"),
        FIRST,
        "gradient",
        only="blocks|embedding",
    ),
    "kv groups permuted for sampling": Bug(
        planted.permuted_groups, "ppo", TENSOR, "iteration 1", "answers", generation=TWO
    ),
    "answers of the neighbours": Bug(planted.shifted_answers, "ppo", TWO, "iteration 1", "answers"),
    "random numbers shared by shards": Bug(
        planted.noise_of_the_first_shard, "grpo", TWO, "iteration 1", "answers"
    ),
    "an empty slot that works": Bug(planted.working_slot, "sft", PIPELINE, FIRST, "loss", model=V1),
    "circular chunks swapped": Bug(planted.swapped_chunks, "sft", CIRCULAR, FIRST, "loss"),
    "rows on the other shard": Bug(planted.rows_of_a_shard, "sft", TWO, FIRST, "data"),
    "moments lost between iterations": Bug(
        planted_optim.moments_lost, "ppo", TWO, "iteration 2, update 1 of the actor", "optimizer"
    ),
    "a clip by the norm of a shard": Bug(
        planted_optim.clip_by_shards, "sft", Layout(fsdp=2), MOVES, "optimizer"
    ),
    "weight decay on norms": Bug(
        planted_optim.decay_of_norms, "sft", TWO, MOVES, "optimizer", only=SCALES
    ),
    "a schedule off by one": Bug(planted_optim.schedule_one_late, "sft", TWO, FIRST, "optimizer"),
    "advantages whitened by shard": Bug(
        planted.advantages_by_shard, "grpo", TWO, "iteration 1", "figures", "advantages"
    ),
}
QUICK = {
    "a spec that drops a reduction",
    "a bias's gradient of one shard",
    "averaged gradients of pieces",
    "weight decay on norms",
}
# rounding hides noise of a thousandth, and that two halves of a batch have nearly the same mean and deviation
FINER_THAN_BFLOAT16 = {"noise that depends on the shard", "advantages whitened by shard"}


def _row(bug: Bug, dtype: str) -> Row:
    """The row of the layout that a bug is planted in, with what is planted now."""
    config = _config(bug.model, dtype)
    rows = rows_for(bug.layout, bug.generation)
    reference, limits = _reference(bug.job, bug.model, dtype, rows)
    how = iterations(config, reference, bug.generation)
    ours = train(bug.job, config, rows, bug.layout, how)
    return compare(bug.job, bug.layout, ours, reference, limits)


@functools.cache
def _healthy(name: str, dtype: str) -> Row:
    return _row(BUGS[name], dtype)


def _found(name: str, dtype: str, patch: Patch) -> tuple[Row, Row]:
    """The rows with the bug and without; of bugs in one layout the second is computed once."""
    bug = BUGS[name]

    def case(bug: Bug) -> tuple[Any, ...]:
        return bug.job, bug.layout, bug.model, bug.generation

    same = next(n for n, other in BUGS.items() if case(other) == case(bug))
    healthy = _healthy(same, dtype)
    bug.plant(patch)
    return _row(bug, dtype), healthy


def _config(model: str, dtype: str) -> Config:
    return dataclasses.replace(tiny(PRESETS[model]), compute_dtype=dtype)


@functools.cache
def _reference(job: str, model: str, dtype: str, rows: int) -> tuple[Trained, Limits]:
    """Without a bug, which is planted after this."""
    return reference_of(job, _config(model, dtype), rows)


def _assert_named(bug: Bug, row: Row) -> None:
    assert not row.passed
    assert (row.where, row.part) == (bug.where, bug.part), row
    assert not bug.name or bug.name == row.names[0].split(".")[-1], row
    wrong = [name for name in row.names if not re.search(bug.only, name)]
    assert not wrong, row


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in BUGS]
)
def test_a_planted_bug_is_named(name: str, monkeypatch: Patch) -> None:
    bug = BUGS[name]
    row, healthy = _found(name, "float32", monkeypatch)
    _assert_named(bug, row)
    assert healthy.passed, healthy


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_named_in_bfloat16(name: str, monkeypatch: Patch) -> None:
    bug = BUGS[name]
    row, healthy = _found(name, "bfloat16", monkeypatch)
    assert healthy.passed, healthy
    if name in FINER_THAN_BFLOAT16:
        assert row.passed
    else:
        part, first = bug.rounded or (bug.part, bug.name)
        _assert_named(dataclasses.replace(bug, part=part, name=first), row)
