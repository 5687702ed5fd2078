"""Answers do not depend on where they are drawn; a policy comes back from there bit for bit."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest

from glm_jax.batch import Prompts
from glm_jax.config import GLMConfig
from glm_jax.generate import SamplingConfig
from glm_jax.model import CausalLM, init_model
from glm_jax.sampler import Sampler, moved_bytes
from glm_jax.weights import named_weights
from sharding.collectives import collectives
from sharding.errors import UserError
from sharding.hlo import read
from sharding.layout import Layout, get_layout

SAMPLING = SamplingConfig(max_new_tokens=5, temperature=0.9)


@pytest.fixture(scope="module")
def odd(small: GLMConfig) -> GLMConfig:
    return dataclasses.replace(small, num_layers=5, vocab_size=67)


def _prompts() -> Prompts:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (8, 5)).astype(np.int32)
    valid = np.arange(5) >= (np.arange(8) % 4)[:, None]
    return Prompts(np.where(valid, ids, 0), valid, np.arange(8, dtype=np.int32))


def _model(config: GLMConfig, layout: Layout) -> CausalLM:
    model: CausalLM = jax.jit(partial(init_model, config, layout))(jax.random.key(0))
    assert model.w_head is not None
    model.w_head = model.w_head * 30.0
    return model


def _answers(
    config: GLMConfig, layout: Layout, generation: Layout | None
) -> tuple[np.ndarray, np.ndarray]:
    with jax.set_mesh(layout.mesh()):
        sample = Sampler(config, SAMPLING, (2, 7), layout, generation)
        answers = sample(_model(config, layout), layout.put(_prompts()), jax.random.key(1))
        batch = layout.spec("batch", None)
        assert answers.sequences.ids.sharding.spec == batch
        return np.asarray(answers.sequences.ids), np.asarray(answers.logp)


@pytest.mark.parametrize(
    ("training", "generation"),
    [
        ("2x2x1x2:circular", None),
        ("2x1x2x2:gpipe", "1x1x1x8"),
        ("1x1x8x1", "1x4x1x2"),
        ("1x2x2x2", "2x2x2x1"),
    ],
)
def test_the_same_answers_wherever_they_are_drawn(
    odd: GLMConfig, training: str, generation: str | None
) -> None:
    ids, logp = _answers(odd, Layout(), None)
    to = None if generation is None else get_layout(generation, 8)
    our_ids, our_logp = _answers(odd, get_layout(training, 8), to)
    np.testing.assert_array_equal(our_ids, ids)
    np.testing.assert_allclose(our_logp, logp, atol=2e-5)


@pytest.mark.parametrize(
    ("num_layers", "training", "generation"),
    [
        (5, "2x1x2x2:circular", "1x1x1x8"),
        (4, "2x1x2x2:gpipe", "1x2x2x2"),  # layers that lie in order are only cut in other places
    ],
)
def test_a_lent_policy_is_held_once_and_comes_back_bit_for_bit(
    odd: GLMConfig, num_layers: int, training: str, generation: str
) -> None:
    odd = dataclasses.replace(odd, num_layers=num_layers)
    layout = get_layout(training, 8)
    with jax.set_mesh(layout.mesh()):
        sample = Sampler(odd, SAMPLING, (2,), layout, get_layout(generation, 8))
        policy = _model(odd, layout)
        before = {name: np.asarray(w) for name, w in named_weights(policy).items()}
        shardings = {name: w.sharding for name, w in named_weights(policy).items()}
        with sample.lend(policy) as loan:
            there = loan.policy
            assert all(w.is_deleted() for w in jax.tree.leaves(policy))
            sample.draw(there, layout.put(_prompts()), jax.random.key(1))
        assert all(w.is_deleted() for w in jax.tree.leaves(there))
        for name, w in named_weights(loan.policy).items():
            np.testing.assert_array_equal(w, before[name], err_msg=name)
            assert w.sharding == shardings[name], name
    assert loan.cost.num_bytes >= loan.there.num_bytes > 0 and loan.cost.seconds > 0


@pytest.mark.parametrize(
    ("training", "to"), [("2x1x2x2:circular", "1x2x1x4"), ("2x1x2x2:gpipe", None)]
)
def test_of_a_policy_that_computes_in_bfloat16_a_copy_is_lent(
    odd: GLMConfig, training: str, to: str | None
) -> None:
    """Half as large, of the same answers; nothing comes back."""
    config = dataclasses.replace(odd, compute_dtype="bfloat16")
    layout = get_layout(training, 8)
    generation = None if to is None else get_layout(to, 8)
    with jax.set_mesh(layout.mesh()):
        sample = Sampler(config, SAMPLING, (2,), layout, generation)
        in_float32 = Sampler(odd, SAMPLING, (2,), layout, generation)
        policy, prompts, key = _model(config, layout), layout.put(_prompts()), jax.random.key(1)
        with sample.lend(policy) as loan:
            lent = loan.policy
            ours = sample.draw(lent, prompts, key)
            dtypes = {name: w.dtype for name, w in named_weights(lent).items()}
        moved = in_float32.enter(_model(odd, layout))
        moved.trunk.config = config
        theirs = sample.draw(moved, prompts, key)
    assert loan.policy is policy and not any(w.is_deleted() for w in jax.tree.leaves(policy))
    assert all(w.is_deleted() for w in jax.tree.leaves(lent))
    assert loan.back == (0, 0.0)
    assert loan.there.num_bytes < 0.6 * moved_bytes(policy, moved, layout, sample.generation)
    kept = {name for name, dtype in dtypes.items() if dtype == "float32"}
    assert kept == {name for name in dtypes if "norm" in name or "embedding" in name}
    np.testing.assert_array_equal(ours.sequences.ids, theirs.sequences.ids)
    np.testing.assert_array_equal(ours.logp, theirs.logp)


def test_nothing_moves_where_both_layouts_split_alike(odd: GLMConfig) -> None:
    layout = Layout(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(layout.mesh()):
        sample = Sampler(odd, SAMPLING, (2,), layout)
        policy = _model(odd, layout)
        with sample.lend(policy) as loan:
            assert loan.policy is policy
        assert loan.policy is policy and loan.cost == (0, 0.0)


def test_bytes_that_move_against_a_count_by_hand(small: GLMConfig) -> None:
    """Two stages of two layers become whole models: every device lacks half of the layers, and of the tables."""
    layout = Layout(pipe=2, data=2)
    with jax.set_mesh(layout.mesh()):
        sample = Sampler(small, SAMPLING, (2,), layout)
        policy = _model(small, layout)
        moved = sample.enter(policy)
        ours = moved_bytes(policy, moved, layout, sample.generation)
    split = [
        w for name, w in named_weights(policy).items() if "final_norm" not in name
    ]  # which every device has
    assert ours == 4 * sum(w.nbytes // 2 for w in split)


def test_no_device_holds_a_weight_whole_on_the_way(small: GLMConfig) -> None:
    training, generation = Layout(fsdp=8), Layout(data=2, tensor=4)
    with jax.set_mesh(training.mesh()):
        sample = Sampler(small, SAMPLING, (2,), training, generation)
        policy = _model(small, training)
        assert sample.to_generation is not None
        lent = sample.to_generation(policy)
        program = jax.jit(sample.to_generation).lower(policy).compile()
    shards = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves((policy, lent))}
    largest = 4 * max(math.prod(shard) for shard in shards)
    assert largest < 4 * max(x.size for x in jax.tree.leaves(policy))
    moved = list(collectives(read(program)))
    assert moved and all(x.num_bytes <= largest for x in moved)


def test_both_layouts_use_the_same_devices(small: GLMConfig) -> None:
    layout = Layout(data=4)
    with (
        jax.set_mesh(layout.mesh()),
        pytest.raises(UserError, match="generation layout has 8 devices, training 4"),
    ):
        Sampler(small, SAMPLING, (2,), layout, Layout(tensor=8))
