"""Answers through slots are those of the static mode, whatever rides along; nothing compiles twice."""

import dataclasses
import re
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.batch import Prompts
from glm_jax.config import Config, GLMConfig, GLMV1Config
from glm_jax.continuous import Engine, RolloutConfig
from glm_jax.generate import Generation, SamplingConfig, generate
from glm_jax.loss import token_logprobs
from glm_jax.model import CausalLM, apply_model, init_model
from glm_jax.sampler import Sampler
from glm_jax.weights import draw_table, named_weights
from sharding.compile import compiled_programs
from sharding.errors import UserError
from sharding.layout import Layout, factorisations, get_layout, spell_layout
from tests.tolerances import rounding, terms_of

# log-probabilities are compared at the rounding of good code
pytestmark = pytest.mark.usefixtures("users_code")

SINGLE = Layout()
ROOM = 8
SAMPLED = SamplingConfig(max_new_tokens=ROOM, temperature=0.9)
GREEDY = SamplingConfig(max_new_tokens=ROOM, temperature=0.0)
ROLLOUT = RolloutConfig(slots=3, buckets=(4, 10), prefill_tokens=20)
STOPS = (2, 5, 7, 11, 19, 23, 40)  # so that answers have one token up to all eight
KEY = 7


def _init(config: Config, layout: Layout, key: jax.Array) -> CausalLM:
    """A model whose next token depends on all that came before, and is not a matter of rounding."""
    model = init_model(config, layout, key)
    for name, weight in named_weights(model.trunk.blocks).items():
        if name.startswith(".w_"):
            setattr(model.trunk.blocks, name[1:], weight * 20.0)
    shape = (config.hidden_size, config.vocab_size)
    model.w_head = draw_table("w_head", 0.1, shape, jax.random.key(3), config, layout)
    return model


@cache
def _model(config: Config, layout: Layout) -> CausalLM:
    drawn: CausalLM = jax.jit(partial(_init, config, layout))(jax.random.key(1))
    return drawn


@pytest.fixture(params=["ChatGLM-6B", "ChatGLM3"])
def config(request: pytest.FixtureRequest, small: GLMConfig, small_v1: GLMV1Config) -> Config:
    shapes: dict[str, Config] = {"ChatGLM-6B": small_v1, "ChatGLM3": small}
    return shapes[request.param]


def _prompts(number: int) -> Prompts:
    """Prompts of 2 to 10 tokens that end in [gMASK]<sop>: ChatGLM-6B cannot do without."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 60, (number, 10)).astype(np.int32)
    ids[:, -2:] = 61, 62
    valid = np.arange(10) >= 10 - rng.integers(2, 11, (number, 1))
    return Prompts(np.where(valid, ids, 0), valid, np.arange(number, dtype=np.int32))


def _seeds(number: int, samples: int = 1) -> np.ndarray:
    return np.arange(number * samples, dtype=np.int32).reshape(-1, samples)


@cache
def _static_program(sampling: SamplingConfig) -> Any:
    return jax.jit(lambda m, p, s, k: generate(m, p, s, k, sampling, STOPS, SINGLE))


def _static(
    config: Config, prompts: Prompts, seeds: np.ndarray, sampling: SamplingConfig = SAMPLED
) -> Generation:
    with jax.set_mesh(SINGLE.mesh()):
        program = _static_program(sampling)
        drawn = program(_model(config, SINGLE), prompts, seeds, jax.random.key(KEY))
        answers: Generation = jax.device_get(drawn)
    return answers


@cache
def _engine(config: Config, sampling: SamplingConfig, rollout: RolloutConfig) -> Engine:
    return Engine(sampling, STOPS, SINGLE, rollout)


def _drawn(
    config: Config,
    prompts: Prompts,
    seeds: np.ndarray,
    sampling: SamplingConfig = SAMPLED,
    rollout: RolloutConfig = ROLLOUT,
) -> tuple[Generation, int]:
    """The engine's answers, and the steps of decoding that they took."""
    engine = _engine(config, sampling, rollout)
    before = engine.counts.steps
    with jax.set_mesh(SINGLE.mesh()):
        answers = engine.draw(_model(config, SINGLE), prompts, seeds, jax.random.key(KEY))
    return answers, engine.counts.steps - before


def _lengths(answers: Generation) -> np.ndarray:
    lengths: np.ndarray = answers.sequences.target.sum(axis=1)
    return lengths


# Largest absolute values that `_init` leads to: logits over the temperature, scores of attention
LOGITS = {GLMConfig: 2.6, GLMV1Config: 4.0}
SCORES = {GLMConfig: 29.0, GLMV1Config: 73.0}


def _rounding(config: Config) -> float:
    """Bound of the difference between log-probabilities of two programs, in nats.

    Scores are sums of H terms, and their rounding error is a relative one of what attention adds to the residual, in
    every layer; everything else that is summed adds its own. Blocking and instructions change both.
    """
    of_scores = rounding(2 * config.num_layers * config.head_dim, SCORES[type(config)])
    of_sums = rounding(2 * terms_of(config, ROOM + 10), 1.0)
    return (of_scores + of_sums) * LOGITS[type(config)]


def _assert_same(config: Config, ours: Generation, reference: Generation) -> None:
    for a, b in zip(ours.sequences, reference.sequences, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ours.ended, reference.ended)
    np.testing.assert_allclose(ours.logp, reference.logp, rtol=0, atol=_rounding(config))


def test_a_thousandth_of_one_matrix_is_more_than_rounding(config: Config) -> None:
    """The bound would show a bug that changes a single weight matrix by 0.1 %."""
    prompts, seeds = _prompts(32), _seeds(32)
    ours = _static(config, prompts, seeds)
    logp = []
    for factor in (1.0, 1.001):
        with jax.set_mesh(SINGLE.mesh()):
            model = jax.tree.map(lambda w: w, _model(config, SINGLE))
            blocks = model.trunk.blocks
            blocks.w_v = blocks.w_v.at[:, 1].multiply(factor)
            ids, valid, target = SINGLE.put(ours.sequences)
            logits = apply_model(model, ids, valid, SINGLE)
            found = token_logprobs(logits, ids, SAMPLED.temperature)
            logp.append(np.where(np.asarray(target), np.asarray(found), 0.0))
    np.testing.assert_allclose(logp[0], ours.logp, rtol=0, atol=_rounding(config))
    assert np.abs(logp[1] - ours.logp).max() > 2 * _rounding(config)


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_every_answer_is_that_of_the_static_mode(config: Config, sampling: SamplingConfig) -> None:
    prompts, seeds = _prompts(32), _seeds(32)
    ours, steps = _drawn(config, prompts, seeds, sampling)
    _assert_same(config, ours, _static(config, prompts, seeds, sampling))
    lengths = _lengths(ours)
    assert np.any(ours.ended & (lengths == 1))  # a stop token at once, which is never decoded
    assert np.any(~ours.ended) and np.all(ours.ended | (lengths == ROOM))  # cut off
    assert steps > 4 * ROOM  # several times around the ring


def test_an_answer_does_not_depend_on_its_company(config: Config) -> None:
    prompts, seeds = _prompts(32), _seeds(32)
    reference, _ = _drawn(config, prompts, seeds)
    some = np.random.default_rng(1).permutation(32)[:21]
    rollout = RolloutConfig(slots=8, buckets=(10,), prefill_tokens=50, refill=3)
    prompts = jax.tree.map(lambda x: x[some], prompts)
    ours, _ = _drawn(config, prompts, seeds[some], rollout=rollout)
    _assert_same(config, ours, jax.tree.map(lambda x: x[some], reference))


def test_samples_of_a_prompt_share_its_computation(config: Config) -> None:
    prompts, seeds = _prompts(5), _seeds(5, samples=7)
    engine = _engine(config, SAMPLED, ROLLOUT)
    before = engine.counts.prompts
    ours, _ = _drawn(config, prompts, seeds)
    assert engine.counts.prompts - before == 5
    apart = jax.tree.map(lambda x: np.repeat(x, 7, axis=0), prompts)
    _assert_same(config, ours, _static(config, apart, seeds.reshape(-1, 1)))


@pytest.mark.isa
def test_500_prompts_compile_nothing_and_leave_no_slot_idle(small: GLMConfig) -> None:
    prompts, seeds = _prompts(500), _seeds(500)
    _drawn(small, _prompts(1), _seeds(1))
    before = len(compiled_programs())
    ours, steps = _drawn(small, prompts, seeds)
    assert len(compiled_programs()) == before
    assert _engine(small, SAMPLED, ROLLOUT).counts.recompiled == 0
    _assert_same(small, ours, _static(small, prompts, seeds))
    decoded = np.sum(_lengths(ours) - 1)  # the first token comes from the prompt
    assert decoded / 3 <= steps <= decoded / 3 + ROOM - 1
    assert steps < 0.8 * sum(max(_lengths(ours)[row : row + 3]) for row in range(0, 500, 3))


def test_a_shape_that_was_not_warm_is_an_error(small: GLMConfig) -> None:
    rollout = RolloutConfig(slots=3, buckets=(10,), prefill_tokens=20)
    engine = Engine(SAMPLED, STOPS, SINGLE, rollout)
    model = _model(small, SINGLE)
    with jax.set_mesh(SINGLE.mesh()):
        engine.warm_up(model, jax.random.key(KEY))
        engine.rollout = dataclasses.replace(rollout, prefill_tokens=10)
        with pytest.raises(RuntimeError, match=r"after the warm-up: jit\(_prefill\), jit\(_insert"):
            engine.draw(model, _prompts(1), _seeds(1), jax.random.key(KEY))
    assert engine.counts.recompiled == 2


def test_one_long_answer_does_not_hold_the_others(small: GLMConfig) -> None:
    prompt, pool = _prompts(1), _seeds(1, samples=128)
    lengths = _lengths(_static(small, prompt, pool))
    long, short = np.flatnonzero(lengths == ROOM)[:1], np.flatnonzero(lengths <= 2)[:14]
    assert len(short) == 14 and sum(lengths[short] == 2) > 4
    seeds = np.concatenate([long, short]).astype(np.int32)[None]
    ours, steps = _drawn(small, prompt, seeds)
    assert _lengths(ours).tolist() == [ROOM, *lengths[short]]
    assert steps == ROOM - 1  # those of the long one; the others came and went beside it


def test_the_last_answers_decode_in_fewer_rows(small: GLMConfig) -> None:
    prompts, seeds = _prompts(12), _seeds(12)
    rollouts = [
        RolloutConfig(slots=8, buckets=(10,), prefill_tokens=80, halvings=n) for n in (0, 2)
    ]
    (whole, steps), (halved, same_steps) = (
        _drawn(small, prompts, seeds, rollout=rollout) for rollout in rollouts
    )
    _assert_same(small, halved, whole)
    assert steps == same_steps
    rows = [_engine(small, SAMPLED, rollout).counts.rows for rollout in rollouts]
    assert rows[0] == 8 * steps
    assert np.sum(_lengths(whole) - 1) <= rows[1] < rows[0]


def test_one_new_token_needs_no_decoding(small: GLMConfig) -> None:
    sampling = dataclasses.replace(SAMPLED, max_new_tokens=1)
    prompts, seeds = _prompts(9), _seeds(9)
    rollout = RolloutConfig(slots=3, buckets=(10,), prefill_tokens=20)
    ours, steps = _drawn(small, prompts, seeds, sampling, rollout)
    assert steps == 0
    _assert_same(small, ours, _static(small, prompts, seeds, sampling))


def test_rows_of_padding_get_no_answer(small: GLMConfig) -> None:
    prompts, seeds = _prompts(12), _seeds(12, samples=2)
    reference, _ = _drawn(small, prompts, seeds)
    padded = prompts._replace(row=np.where(np.arange(12) < 9, prompts.row, -1).astype(np.int32))
    ours, _ = _drawn(small, padded, seeds)
    _assert_same(small, *(jax.tree.map(lambda x: x[:18], answers) for answers in (ours, reference)))
    assert not _lengths(ours)[18:].any() and not ours.ended[18:].any()


def _on(layout: Layout, config: GLMConfig, generation: Layout | None = None) -> Generation:
    rollout = RolloutConfig(slots=16, buckets=(10,), prefill_tokens=80)
    with jax.set_mesh(layout.mesh()):
        sample = Sampler(config, SAMPLED, STOPS, layout, generation, rollout)
        prompts = layout.put(_prompts(16))
        answers = sample(_model(config, layout), prompts, jax.random.key(KEY), samples=2)
        assert answers.sequences.ids.sharding.spec == layout.spec("batch", None)
        assert sample.engine is not None
        assert sample.engine.counts.rows < 16 * sample.engine.counts.steps  # halved on every shard
        host: Generation = jax.device_get(answers)
    return host


@pytest.mark.parametrize(
    ("training", "generation"),
    [
        ("1x8x1x1", None),
        ("1x1x8x1", None),
        ("1x1x1x8", None),
        ("1x2x2x2", None),
        ("2x2x1x2:circular", "1x1x2x4"),
    ],
)
def test_the_same_answers_under_every_layout(
    small: GLMConfig, training: str, generation: str | None
) -> None:
    to = None if generation is None else get_layout(generation, 8)
    ours = _on(get_layout(training, 8), small, to)
    _assert_same(small, ours, _static(small, _prompts(16), _seeds(16, samples=2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [layout for layout in factorisations(8) if layout.pipe == 1], ids=spell_layout
)
def test_the_same_answers_under_all_layouts(config: Any, layout: Layout) -> None:
    ours = _on(layout, config)
    _assert_same(config, ours, _static(config, _prompts(16), _seeds(16, samples=2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "rollout.slots = 0: give a positive number"),
        ({"buckets": ()}, "rollout.buckets = (): give positive widths in ascending order"),
        ({"buckets": (8, 4)}, "rollout.buckets = (8, 4): give positive widths"),
        ({"buckets": (0, 4)}, "rollout.buckets = (0, 4): give positive widths"),
        ({"prefill_tokens": 0}, "rollout.prefill_tokens = 0: give a positive number"),
        ({"halvings": -1}, "rollout.halvings = -1: give 0 or more"),
        ({"slots": 4, "refill": 5}, "rollout.refill = 5: give at least 1, at most the slots"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        RolloutConfig(**settings)


def test_slots_have_to_divide_over_the_layout() -> None:
    with pytest.raises(UserError, match=r"rollout\.slots = 6 does not divide over 4 batch shards"):
        Engine(SAMPLED, STOPS, Layout(data=4, tensor=2), RolloutConfig(slots=6))


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        (3, 11, "the prompt in row 2 has 11 tokens, the last of rollout.buckets is 10: give it"),
        (3, 0, "the prompt in row 2 has 0 tokens, the last of rollout.buckets is 10: give it"),
        (0, 0, "there are no prompts to answer: give at least one"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    small: GLMConfig, rows: int, length: int, message: str
) -> None:
    lengths = np.array([4, 10, length][:rows])
    valid = np.arange(12) >= 12 - lengths[:, None]
    prompts = Prompts(np.where(valid, 3, 0), valid, np.arange(rows, dtype=np.int32))
    with pytest.raises(UserError, match=re.escape(message)):
        _drawn(small, prompts, _seeds(rows))
