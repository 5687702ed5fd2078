"""Cached decoding against recomputation; sampling that depends on nothing but its own row."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.batch import Prompts
from glm_jax.config import Config, GLMConfig, GLMV1Config
from glm_jax.generate import (
    Generation,
    SamplingConfig,
    _first_largest,
    generate,
    stream,
    warp,
)
from glm_jax.loss import token_logprobs
from glm_jax.model import CausalLM, apply_model, init_model
from sharding.errors import UserError
from sharding.layout import Layout
from tests.tolerances import rounding, terms_of

LAYOUT = Layout()


def _draw(config: Config) -> CausalLM:
    with jax.set_mesh(LAYOUT.mesh()):
        drawn = jax.jit(lambda key: init_model(config, LAYOUT, key))(jax.random.key(1))
        # spread the logits, so that the most probable token is not a matter of rounding
        if drawn.w_head is None:
            drawn.trunk.embedding = drawn.trunk.embedding * 50.0
        else:
            drawn.w_head = drawn.w_head * 50.0
        return drawn


def _rounding(model: CausalLM, temperature: float = 1.0) -> float:
    """Bound of the difference between log-probabilities of two programs, in nats; logits are about sqrt(D)."""
    config = model.trunk.config
    return rounding(2 * terms_of(config, 19), config.hidden_size**0.5 / temperature)


@pytest.fixture(scope="module")
def model(small: GLMConfig) -> CausalLM:
    return _draw(small)


@pytest.fixture(scope="module", params=["ChatGLM-6B", "ChatGLM2-32k", "ChatGLM3", "GLM-4-0414"])
def any_model(request: pytest.FixtureRequest, small: GLMConfig, small_v1: GLMV1Config) -> CausalLM:
    shapes: dict[str, Config] = {
        "ChatGLM-6B": small_v1,
        "ChatGLM2-32k": dataclasses.replace(small, position_scale=4.0),
        "ChatGLM3": small,
        "GLM-4-0414": dataclasses.replace(small, sandwich_norms=True, qkv_bias=False),
    }
    return _draw(shapes[request.param])


def test_weights_are_cast_before_decoding_begins(small: GLMConfig, small_v1: GLMV1Config) -> None:
    """The loop reads no weight in float32 but norms and, where a head has its own, the embedding table."""
    sampling = SamplingConfig(max_new_tokens=3)
    for config, tables in ((small, 1), (small_v1, 0)):
        low = dataclasses.replace(config, compute_dtype="bfloat16")
        with jax.set_mesh(LAYOUT.mesh()):
            model = jax.eval_shape(partial(init_model, low, LAYOUT), jax.random.key(0))
            traced = jax.make_jaxpr(
                lambda m, p, s, k: generate(m, p, s, k, sampling, (2,), LAYOUT)
            )(model, _prompts(), np.zeros((4, 1), np.int32), jax.random.key(0))
        (loop,) = (x for x in traced.eqns if x.primitive.name == "while")
        weight = config.hidden_size**2
        read = [v.aval for v in loop.invars[: loop.params["body_nconsts"]] if v.aval.ndim > 1]
        assert sum(x.dtype == jnp.float32 and x.size >= weight for x in read) == tables


def _prompts() -> Prompts:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 60, (4, 6)).astype(np.int32)
    ids[:, -2:] = 61, 62  # [gMASK]<sop>, which ChatGLM-6B cannot do without
    valid = np.arange(6) >= np.array([0, 2, 3, 5])[:, None]
    return Prompts(np.where(valid, ids, 0), valid, np.arange(4, dtype=np.int32))


def _run(
    model: CausalLM, prompts: Prompts, temperature: float, stop: tuple[int, ...] = ()
) -> Generation:
    sampling = SamplingConfig(max_new_tokens=10, temperature=temperature)
    with jax.set_mesh(LAYOUT.mesh()):
        program = jax.jit(lambda m, p, s, k: generate(m, p, s, k, sampling, stop, LAYOUT))
        seeds = np.arange(len(prompts.row), dtype=np.int32)[:, None]
        answers: Generation = jax.device_get(program(model, prompts, seeds, jax.random.key(7)))
    return answers


def test_greedy_cache_equals_recomputing_the_sequence_at_every_step(any_model: CausalLM) -> None:
    model, prompts = any_model, _prompts()
    answers = _run(model, prompts, 0.0)
    forward = jax.jit(apply_model, static_argnums=3)
    with jax.set_mesh(LAYOUT.mesh()):
        ids, valid = prompts.ids, prompts.valid
        for _ in range(10):
            # one shape for all steps: what lies right of the sequence is padding
            room = ((0, 0), (0, 16 - ids.shape[1]))
            logits = np.asarray(forward(model, np.pad(ids, room), np.pad(valid, room), LAYOUT))
            token = logits[:, ids.shape[1] - 1].argmax(axis=-1).astype(np.int32)
            ids = np.concatenate([ids, token[:, None]], axis=1)
            valid = np.pad(valid, ((0, 0), (0, 1)), constant_values=True)
    np.testing.assert_array_equal(answers.sequences.ids, ids)


@pytest.mark.isa
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_sampled_logprobs_are_those_of_the_trainer(model: CausalLM, temperature: float) -> None:
    answers = _run(model, _prompts(), temperature)
    with jax.set_mesh(LAYOUT.mesh()):
        sequences = LAYOUT.put(answers.sequences)
        logits = apply_model(model, sequences.ids, sequences.valid, LAYOUT)
        logp = np.asarray(token_logprobs(logits, sequences.ids, temperature))
    assert answers.sequences.target.sum() == 40
    expected, atol = np.where(answers.sequences.target, logp, 0), _rounding(model, temperature)
    np.testing.assert_allclose(answers.logp, expected, rtol=0, atol=atol)


def _warp_by_hand(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    scaled = [x / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: top_k or len(order)]
    weights = [float(np.exp(scaled[i])) for i in kept]
    nucleus, reached = [], 0.0
    for i, weight in zip(kept, weights, strict=True):
        if reached >= top_p * sum(weights):
            break
        nucleus.append(i)
        reached += weight
    return [x if i in nucleus else -np.inf for i, x in enumerate(scaled)]


@pytest.mark.parametrize("top_k", [0, 1, 5, 99])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_top_k_and_top_p_against_a_loop(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(3).normal(size=(6, 20)).astype(np.float32) * 2
    ours = warp(jnp.asarray(logits), SamplingConfig(1, 0.7, top_k, top_p))
    by_hand = [_warp_by_hand(row.tolist(), 0.7, top_k, top_p) for row in logits]
    np.testing.assert_allclose(np.asarray(ours), by_hand, rtol=1e-6)


def test_the_first_largest_is_argmax() -> None:
    inf, nan = np.inf, np.nan
    rows = np.array(
        [
            [0.0, 2.0, 2.0, 1.0],
            [-inf, -inf, -1.0, -inf],
            [-inf, -inf, -inf, -inf],
            [3.0, nan, 1.0, 0.0],
        ],
        np.float32,
    )
    found = jax.jit(_first_largest)(rows)
    assert found.tolist() == [1, 2, 0, 3]  # a row with NaN: the last one, so that it stays NaN


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"temperature": -1.0}]
)
def test_sampling_out_of_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"sampling.{next(iter(settings))} = .* is out of range"):
        SamplingConfig(**settings)  # type: ignore[arg-type]


def test_a_nucleus_of_nothing_else_is_greedy(model: CausalLM) -> None:
    greedy = _run(model, _prompts(), 0.0).sequences
    sampling = SamplingConfig(max_new_tokens=10, top_p=1e-6)
    with jax.set_mesh(LAYOUT.mesh()):
        program = jax.jit(lambda m, p, s, k: generate(m, p, s, k, sampling, (), LAYOUT))
        seeds = np.arange(4, dtype=np.int32)[:, None]
        answers = jax.device_get(program(model, _prompts(), seeds, jax.random.key(7)))
    np.testing.assert_array_equal(answers.sequences.ids, greedy.ids)
    assert np.abs(answers.logp).max() == 0.0  # the one token left has probability 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_gives_the_tokens_of_generate(any_model: CausalLM, temperature: float) -> None:
    prompts = jax.tree.map(lambda x: x[:1], _prompts())
    free = _run(any_model, prompts, temperature).sequences.ids[0, 6:].tolist()
    stop = (free[4],)
    sampling = SamplingConfig(max_new_tokens=10, temperature=temperature)
    with jax.set_mesh(LAYOUT.mesh()):
        prompt = prompts.ids[0].tolist()
        whole = list(stream(any_model, prompt, jax.random.key(7), sampling, (), LAYOUT))
        cut = list(stream(any_model, prompt, jax.random.key(7), sampling, stop, LAYOUT))
    assert whole == free
    assert cut == free[: free.index(stop[0]) + 1]


def test_a_row_stops_at_its_stop_token_and_only_there(model: CausalLM) -> None:
    free = _run(model, _prompts(), 1.0).sequences
    stop = int(free.ids[0, 9])  # the fourth token of row 0's answer
    answers = _run(model, _prompts(), 1.0, (stop, 63))
    for row in range(4):
        tokens = list(free.ids[row, 6:])
        ends = [i for i, token in enumerate(tokens) if token in (stop, 63)]
        length = ends[0] + 1 if ends else 10
        assert list(answers.sequences.ids[row, 6:]) == tokens[:length] + [0] * (10 - length)
        assert answers.sequences.target[row].sum() == length
        assert answers.ended[row] == bool(ends)
    assert answers.ended[0]


@pytest.mark.isa
def test_an_answer_does_not_depend_on_padding(any_model: CausalLM) -> None:
    model, prompts = any_model, _prompts()
    ids, valid = (np.pad(x, ((0, 0), (3, 0))) for x in (prompts.ids, prompts.valid))
    wider = Prompts(ids, valid, prompts.row)
    ours, theirs = _run(model, prompts, 1.0), _run(model, wider, 1.0)
    np.testing.assert_array_equal(ours.sequences.ids[:, 6:], theirs.sequences.ids[:, 9:])
    atol = _rounding(model)
    np.testing.assert_allclose(ours.logp[:, 6:], theirs.logp[:, 9:], rtol=0, atol=atol)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("amount", [1, 5])
def test_padding_changes_no_logprob(any_model: CausalLM, side: str, amount: int) -> None:
    model, ids = any_model, np.random.default_rng(1).integers(3, 60, (3, 8)).astype(np.int32)
    ids[:, 2:4] = 61, 62
    pad = {"left": (amount, 0), "right": (0, amount), "both": (amount, amount)}[side]
    padded, valid = (np.pad(x, ((0, 0), pad)) for x in (ids, np.ones_like(ids, bool)))
    with jax.set_mesh(LAYOUT.mesh()):
        ids, everywhere = LAYOUT.put((ids, np.ones_like(ids, bool)))
        plain = token_logprobs(apply_model(model, ids, everywhere, LAYOUT), ids)
        padded, valid = LAYOUT.put((padded, valid))
        moved = token_logprobs(apply_model(model, padded, valid, LAYOUT), padded)
    inner = moved[:, pad[0] : pad[0] + 8]
    np.testing.assert_allclose(inner[:, 1:], plain[:, 1:], rtol=0, atol=_rounding(model))
