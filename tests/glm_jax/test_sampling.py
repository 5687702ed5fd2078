"""Sampled tokens follow their distribution, far into its tail, and no two streams share random numbers.

Counts are compared with exact intervals; each test says how often it would fail were all as it should be.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl
from scipy import stats

from glm_jax.batch import Prompts
from glm_jax.config import GLMConfig
from glm_jax.continuous import RolloutConfig
from glm_jax.generate import SamplingConfig, draw, row_keys
from glm_jax.model import CausalLM, init_model
from glm_jax.sampler import Sampler
from sharding.layout import Layout

LAYOUT = Layout()
FALSE_ALARMS = 1e-6  # of every test here
PLAIN = SamplingConfig(max_new_tokens=1)


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """64 bits a number in two words: one half for token 0, what the key holds for token 1."""
    assert width == 32 and shape == (2, 2), (width, shape)
    return jnp.stack([jnp.array([2**31, 0], jnp.uint32), key], axis=1)


FIXED = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jnp.zeros(2, jnp.uint32),
    split=lambda key, shape: jnp.broadcast_to(key, (*shape, 2)),
    random_bits=_bits,
    fold_in=lambda key, _: key,
    name="fixed_bits",
    tag="fixed",
)


def test_a_token_of_any_probability_is_drawn_where_its_random_number_says_so() -> None:
    """The smallest E_i / p_i of exponential numbers E_i wins: token 1 at E_1 < p_1 / p_0 log 2, up to rounding.

    It fails never.
    """
    # a sum of numbers up to 40 is rounded by 4e-6, and so is a logarithm of the odds
    near = 2e-5
    ps = np.logspace(-1, -14, 40, dtype=np.longdouble)
    logits, words, wins = [], [], []
    for p, side in itertools.product(ps, (-1, 1)):
        exponential = p / (1 - p) * math.log(2) * np.exp(np.longdouble(side * near))
        number = int(-np.expm1(-exponential) * np.longdouble(2) ** 64)
        words.append([number >> 32, number & 0xFFFFFFFF])
        logits.append([float(np.log1p(-p)), float(np.log(p))])
        wins.append(side < 0)
    keys = jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl=FIXED)
    program = jax.jit(partial(draw, sampling=PLAIN))
    token, logp = program(jnp.array(logits), keys, jnp.zeros(len(words), jnp.int32))
    assert token.tolist() == [int(win) for win in wins]
    expected = [row[1] if win else row[0] for row, win in zip(logits, wins, strict=True)]
    np.testing.assert_allclose(logp, expected, rtol=1e-5, atol=1e-6)


def _interval(trials: int, probability: float, alarms: float) -> tuple[float, float]:
    """Counts that a binomial one exceeds, at either end, in a share `alarms` of all cases at most."""
    low, high = stats.binom.ppf([alarms / 2, 1 - alarms / 2], trials, probability)
    return float(low), float(high)


@partial(jax.jit, static_argnames=("rows", "sampling"))
def _drawn(
    key: jax.Array, start: jax.Array, logits: jax.Array, rows: int, sampling: SamplingConfig
) -> jax.Array:
    """int32 [rows], a token of each of as many streams, seeds from `start` on."""
    keys = row_keys(key, start + jnp.arange(rows))
    many = jnp.broadcast_to(logits, (rows, len(logits)))
    return draw(many, keys, jnp.zeros(rows, jnp.int32), sampling)[0]


@pytest.mark.slow
def test_tokens_of_the_tail_are_drawn_as_often_as_is_due() -> None:
    """False alarms: 1e-6."""
    vocab, rows, turns, p = 4096, 2048, 96, 2e-8
    logits = jnp.log(jnp.full(vocab, p).at[7].set(1 - (vocab - 1) * p))
    count = 0
    for turn in range(turns):
        tokens = _drawn(jax.random.key(0), jnp.int32(turn * rows), logits, rows, PLAIN)
        count += int(jnp.sum(tokens != 7))
    low, high = _interval(rows * turns, (vocab - 1) * p, FALSE_ALARMS)
    assert 0 < low <= count <= high


SAMPLINGS = [
    PLAIN,
    SamplingConfig(1, temperature=0.7),
    SamplingConfig(1, temperature=1.6),
    SamplingConfig(1, temperature=0.9, top_k=5),
    SamplingConfig(1, top_p=0.8),
    SamplingConfig(1, temperature=1.3, top_k=9, top_p=0.6),
]


def _probabilities(logits: np.ndarray, sampling: SamplingConfig) -> np.ndarray:
    """Sorted, cut off and renormalised in float64, one token after another."""
    weights = np.exp(logits.astype(np.float64) / sampling.temperature)
    order = np.argsort(-weights)
    kept = order[: sampling.top_k or len(order)]
    total, reached, found = weights[kept].sum(), 0.0, np.zeros(len(logits))
    for token in kept:
        if reached / total >= sampling.top_p:
            break
        found[token] = weights[token]
        reached += weights[token]
    return found / found.sum()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_follow_their_distribution(sampling: SamplingConfig) -> None:
    """Chi-square over tokens, and none outside of the support. False alarms: 1e-6."""
    logits = np.random.default_rng(0).normal(size=24).astype(np.float32)
    rows = 30_000
    tokens = _drawn(jax.random.key(1), jnp.int32(0), jnp.asarray(logits), rows, sampling)
    counts = np.bincount(np.asarray(tokens), minlength=24)
    p = _probabilities(logits, sampling)
    assert not counts[p == 0].any()
    inside = p > 0
    assert (rows * p[inside]).min() > 10  # where chi-square is a good approximation
    found = stats.chisquare(counts[inside], rows * p[inside])
    assert found.pvalue > FALSE_ALARMS


# streams

SHAPE = (4, 6, 3, 10)  # draws with keys of their own, prompts, samples, tokens
OFFSETS = [
    offset
    for offset in itertools.product((-1, 0, 1), repeat=len(SHAPE))
    if offset > (0,) * len(SHAPE)  # those of the other sign are the same pairs
]


def _equal(tokens: np.ndarray, offset: tuple[int, ...]) -> tuple[int, int]:
    """Pairs of tokens that lie `offset` apart and are equal, and all such pairs."""
    ends = [
        (slice(max(0, -d), size - max(0, d)), slice(max(0, d), size - max(0, -d)))
        for d, size in zip(offset, tokens.shape, strict=True)
    ]
    one, other = (tokens[tuple(end[side] for end in ends)] for side in (0, 1))
    return int((one == other).sum()), one.size


@pytest.fixture(scope="module")
def uniform(small: GLMConfig) -> Iterator[CausalLM]:
    """A model to which every next token is as probable."""
    with jax.set_mesh(LAYOUT.mesh()):
        config = dataclasses.replace(small, num_layers=1)
        model: CausalLM = jax.jit(partial(init_model, config, LAYOUT))(jax.random.key(1))
        assert model.w_head is not None
        model.w_head = jnp.zeros_like(model.w_head)
        yield model


@pytest.mark.parametrize("slots", [None, 8], ids=["static", "slots"])
def test_no_two_streams_share_random_numbers(uniform: CausalLM, slots: int | None) -> None:
    """Tokens are uniform, and two of them, wherever, are equal as often as two that are independent.

    False alarms: 1e-6.
    """
    config = uniform.trunk.config
    keys, prompts, samples, numbers = SHAPE
    rollout = RolloutConfig(slots, buckets=(4,), prefill_tokens=12)
    sampling = SamplingConfig(max_new_tokens=numbers)
    sample = Sampler(config, sampling, (), LAYOUT, rollout=rollout)
    ids = np.random.default_rng(0).integers(3, 60, (prompts, 4)).astype(np.int32)
    ids[1] = ids[0]  # equal prompts have answers of their own
    rows = LAYOUT.put(Prompts(ids, np.ones_like(ids, bool), np.arange(prompts, dtype=np.int32)))
    drawn = []
    for number in range(keys):
        key = jax.random.fold_in(jax.random.key(3), number)
        answers = sample(uniform, rows, key, samples)
        drawn.append(np.asarray(answers.sequences.ids)[:, 4:])
    tokens = np.stack(drawn).reshape(SHAPE)
    alarms = FALSE_ALARMS / (len(OFFSETS) + 1)
    for offset in OFFSETS:
        equal, pairs = _equal(tokens, offset)
        low, high = _interval(pairs, 1 / config.vocab_size, alarms)
        assert low <= equal <= high, offset
    counts = np.bincount(tokens.reshape(-1), minlength=config.vocab_size)
    assert stats.chisquare(counts).pvalue > alarms
