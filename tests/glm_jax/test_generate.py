"""Cached decoding against recomputation; sampling that depends on nothing but its own row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.batch import Prompts
from glm_jax.config import GLMConfig
from glm_jax.generate import Generation, SamplingConfig, generate
from glm_jax.loss import token_logprobs
from glm_jax.model import CausalLM, apply_model, init_model
from sharding.layout import Layout

LAYOUT = Layout()


@pytest.fixture(scope="module")
def model(small: GLMConfig) -> CausalLM:
    with jax.set_mesh(LAYOUT.mesh()):
        drawn = jax.jit(lambda key: init_model(small, LAYOUT, key))(jax.random.key(1))
        # spread the logits, so that the most probable token is not a matter of rounding
        drawn.w_head = drawn.w_head * 50.0
        return drawn


def _prompts() -> Prompts:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (4, 6)).astype(np.int32)
    valid = np.arange(6) >= np.array([0, 2, 3, 5])[:, None]
    return Prompts(np.where(valid, ids, 0), valid, np.arange(4, dtype=np.int32))


def _run(
    model: CausalLM, prompts: Prompts, temperature: float, stop: tuple[int, ...] = ()
) -> Generation:
    sampling = SamplingConfig(max_new_tokens=10, temperature=temperature)
    with jax.set_mesh(LAYOUT.mesh()):
        program = jax.jit(lambda m, p, k: generate(m, p, k, sampling, stop, LAYOUT))
        answers: Generation = jax.device_get(program(model, prompts, jax.random.key(7)))
    return answers


def test_greedy_cache_equals_recomputing_the_sequence_at_every_step(model: CausalLM) -> None:
    prompts = _prompts()
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


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_sampled_logprobs_are_those_of_the_trainer(model: CausalLM, temperature: float) -> None:
    answers = _run(model, _prompts(), temperature)
    with jax.set_mesh(LAYOUT.mesh()):
        sequences = LAYOUT.put(answers.sequences)
        logits = apply_model(model, sequences.ids, sequences.valid, LAYOUT)
        logp = np.asarray(token_logprobs(logits, sequences.ids, temperature))
    assert answers.sequences.target.sum() == 40
    np.testing.assert_allclose(answers.logp, np.where(answers.sequences.target, logp, 0), atol=2e-5)


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


def test_an_answer_does_not_depend_on_padding(model: CausalLM) -> None:
    prompts = _prompts()
    ids, valid = (np.pad(x, ((0, 0), (3, 0))) for x in (prompts.ids, prompts.valid))
    wider = Prompts(ids, valid, prompts.row)
    ours, theirs = _run(model, prompts, 1.0), _run(model, wider, 1.0)
    np.testing.assert_array_equal(ours.sequences.ids[:, 6:], theirs.sequences.ids[:, 9:])
    np.testing.assert_allclose(ours.logp[:, 6:], theirs.logp[:, 9:], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("amount", [1, 5])
def test_padding_changes_no_logprob(model: CausalLM, side: str, amount: int) -> None:
    ids = np.random.default_rng(1).integers(3, 64, (3, 8)).astype(np.int32)
    pad = {"left": (amount, 0), "right": (0, amount), "both": (amount, amount)}[side]
    padded, valid = (np.pad(x, ((0, 0), pad)) for x in (ids, np.ones_like(ids, bool)))
    with jax.set_mesh(LAYOUT.mesh()):
        ids, everywhere = LAYOUT.put((ids, np.ones_like(ids, bool)))
        plain = token_logprobs(apply_model(model, ids, everywhere, LAYOUT), ids)
        padded, valid = LAYOUT.put((padded, valid))
        moved = token_logprobs(apply_model(model, padded, valid, LAYOUT), padded)
    inner = moved[:, pad[0] : pad[0] + 8]
    assert float(jnp.max(jnp.abs(inner[:, 1:] - plain[:, 1:]))) <= 1e-5
