"""Truncation, draws and the decoding loop against plain Python; the model is a hash of all tokens before."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_jax.generate
from glm_jax.batch import Prompts
from glm_jax.config import PRESETS
from glm_jax.generate import (
    SamplingConfig,
    draw,
    generate,
    next_logits,
    row_keys,
    stream,
    support_of,
    warp,
)
from glm_jax.model import CausalLM
from glm_jax.model_v2 import TrunkV2
from glm_jax.trunk import Cache
from sharding.errors import UserError
from sharding.layout import Layout

ONE, V, P, NEW = Layout(), 11, 4, 6
CONFIG = PRESETS["chatglm3-6b"]


def _logits(history: list[int]) -> np.ndarray:
    """Logits after these tokens: of no two histories alike."""
    number = sum((i + 1) * (token + 1) for i, token in enumerate(history))
    return np.asarray(3 * np.sin(np.arange(V) * (0.3 + number % 7 / 7) + number % 13))


def _hidden(ids: jax.Array, real: jax.Array) -> jax.Array:
    """float32 [B, 1]: the number of a history in `_logits`."""
    place = jnp.cumsum(real, axis=1)
    return jnp.sum(jnp.where(real, place * (ids + 1), 0), axis=1, keepdims=True).astype(jnp.float32)


def _noise(key: jax.Array, shape: tuple[int, ...], **_: Any) -> jax.Array:
    """Gumbel noise by its definition, whatever precision is asked for."""
    return -jnp.log(-jnp.log(jax.random.uniform(key, shape, minval=1e-6, maxval=1 - 1e-6)))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    """A model whose cache holds the tokens themselves, [1, B, 1, 1, S]."""

    def prefill(self: Any, ids: jax.Array, real: jax.Array, room: int, layout: Layout) -> Any:
        wide, kept = (jnp.pad(x, ((0, 0), (0, room))) for x in (ids, real))
        columns = wide.astype(jnp.float32)[None, :, None, None, :]
        cache = Cache(columns, jnp.swapaxes(columns, 3, 4), kept, jnp.sum(real, 1)[:, None])
        # hidden states of the positions before the last are never read
        last = jnp.arange(ids.shape[1])[:, None] == ids.shape[1] - 1
        return jnp.where(last, _hidden(ids, real)[:, None], jnp.nan), cache

    def decode(self: Any, ids: jax.Array, cache: Cache, column: jax.Array, layout: Layout) -> Any:
        here = jnp.arange(cache.real.shape[1]) == column
        tokens = jnp.where(here, ids[:, None], cache.keys[0, :, 0, 0].astype(jnp.int32))
        same = jnp.swapaxes(cache.values, 3, 4)[0, :, 0, 0].astype(jnp.int32)
        real = cache.real | here
        position = cache.position + 1
        good = jnp.all(jnp.where(here, ids[:, None], same) == tokens) & jnp.all(
            position[:, 0] == jnp.sum(real, axis=1)
        )
        columns = tokens.astype(jnp.float32)[None, :, None, None, :]
        hidden = jnp.where(good, _hidden(tokens, real), jnp.nan)
        return hidden, Cache(columns, jnp.swapaxes(columns, 3, 4), real, position)

    def head(model: CausalLM, hidden: jax.Array, layout: Layout) -> jax.Array:
        number = hidden[..., :1]
        logits = 3 * jnp.sin(
            jnp.arange(V, dtype=jnp.float32) * (0.3 + number % 7 / 7) + number % 13
        )
        # columns that fill up the vocabulary
        return jnp.concatenate([logits, jnp.full((*logits.shape[:-1], 3), 99.0)], axis=-1)

    monkeypatch.setattr(jax.random, "gumbel", _noise)
    monkeypatch.setattr(TrunkV2, "prefill", prefill)
    monkeypatch.setattr(TrunkV2, "decode", decode)
    monkeypatch.setattr(glm_jax.generate, "apply_head", head)
    monkeypatch.setattr(glm_jax.generate, "cast_weights", lambda model: model)
    config = dataclasses.replace(CONFIG, vocab_size=V)
    return CausalLM(TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), config), None)


PROMPTS = [[3, 1], [4, 1, 5, 9], [2]]


def _prompts() -> Prompts:
    ids, valid = np.zeros((3, P), np.int32), np.zeros((3, P), bool)
    for row, prompt in enumerate(PROMPTS):
        ids[row, P - len(prompt) :], valid[row, P - len(prompt) :] = prompt, True
    return Prompts(ids, valid, np.arange(3, dtype=np.int32))


def _truncated(logits: np.ndarray, sampling: SamplingConfig) -> dict[int, float]:
    """Log-probabilities of the tokens that can be drawn."""
    scaled = {v: float(x) / (sampling.temperature or 1.0) for v, x in enumerate(logits)}
    order = sorted(scaled, key=lambda v: -scaled[v])
    if sampling.greedy:
        kept = order
    else:
        order = order[: sampling.top_k or V]
        total, reached, kept = math.fsum(math.exp(scaled[v]) for v in order), 0.0, []
        for v in order:
            if reached >= sampling.top_p * total:
                break
            kept.append(v)
            reached += math.exp(scaled[v])
    log_sum = math.log(math.fsum(math.exp(scaled[v]) for v in kept))
    return {v: scaled[v] - log_sum for v in kept}


def _by_hand(
    prompt: list[int], key: jax.Array, seed: int, sampling: SamplingConfig, stops: set[int]
) -> tuple[list[int], list[float], bool]:
    """One answer, its log-probabilities and whether it ended; noise of this row's and token's own key."""
    tokens: list[int] = []
    logps: list[float] = []
    while len(tokens) < sampling.max_new_tokens:
        p = _truncated(_logits([*prompt, *tokens]), sampling)
        noise = np.zeros(V)
        if not sampling.greedy:
            own = jax.random.fold_in(jax.random.fold_in(key, seed), len(tokens))
            noise = np.asarray(_noise(own, (V,)), np.float64)
        token = max(p, key=lambda v: p[v] + noise[v])
        tokens.append(token)
        logps.append(p[token])
        if token in stops:
            return tokens, logps, True
    return tokens, logps, False


SAMPLINGS = [
    SamplingConfig(NEW, 0.0),
    SamplingConfig(NEW, 1.0),
    SamplingConfig(NEW, 0.7, top_k=4),
    SamplingConfig(NEW, 1.5, top_k=7, top_p=0.8),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("stops", [(), (0, 7, 10), (5,)])
def test_answers_are_those_of_a_plain_loop(
    model: CausalLM, sampling: SamplingConfig, stops: tuple[int, ...]
) -> None:
    seeds, key = np.array([[0, 5], [2, 3], [9, 1]], np.int32), jax.random.key(4)
    with jax.set_mesh(ONE.mesh()):
        found = generate(model, ONE.put(_prompts()), ONE.put(seeds), key, sampling, stops, ONE)
    for number, seed in enumerate(seeds.ravel().tolist()):
        prompt = PROMPTS[number // 2]
        tokens, logps, ended = _by_hand(prompt, key, seed, sampling, set(stops))
        rest = NEW - len(tokens)
        left = [0] * (P - len(prompt))
        rows = found.sequences
        assert rows.ids[number].tolist() == [*left, *prompt, *tokens, *[0] * rest]
        assert rows.valid[number].tolist() == [
            *[False] * len(left), *[True] * (len(prompt) + len(tokens)), *[False] * rest
        ]  # fmt: skip
        assert rows.target[number].tolist() == [
            *[False] * P,
            *[True] * len(tokens),
            *[False] * rest,
        ]
        # float32 rounding of logits below 10
        expected = [*[0.0] * P, *logps, *[0.0] * rest]
        np.testing.assert_allclose(found.logp[number], expected, rtol=0, atol=1e-5)
        assert bool(found.ended[number]) == ended
    assert found.logp.dtype == jnp.float32 and found.sequences.ids.dtype == jnp.int32


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2]])
@pytest.mark.parametrize("length", [1, 32, 33])
def test_a_stream_yields_the_answer_of_seed_0(
    model: CausalLM, sampling: SamplingConfig, length: int
) -> None:
    prompt, key = [(3 * i) % 10 for i in range(length)], jax.random.key(1)
    with jax.set_mesh(ONE.mesh()):
        whole = list(stream(model, prompt, key, sampling, (), ONE))
        cut = list(stream(model, prompt, key, sampling, (whole[2], 99), ONE))
    assert whole == _by_hand(prompt, key, 0, sampling, set())[0]
    assert cut == whole[: whole.index(whole[2]) + 1]


def test_prompts_of_a_stream_are_padded_to_powers_of_two(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    prefill = glm_jax.generate._prefill

    def seen(model: CausalLM, ids: jax.Array, *others: Any) -> Any:
        widths.append(ids.shape[1])
        assert ids.shape[0] == 1
        return prefill(model, ids, *others)

    monkeypatch.setattr(glm_jax.generate, "_prefill", seen)
    with jax.set_mesh(ONE.mesh()):
        for length in (1, 32, 33, 64, 65):
            next(stream(model, [1] * length, jax.random.key(0), SamplingConfig(2), (), ONE))
    assert widths == [32, 32, 64, 64, 128]


# truncation


@pytest.mark.parametrize("top_k", [0, 1, 4, V, V + 5])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_truncated_logits_are_those_of_a_loop(top_k: int, top_p: float, temperature: float) -> None:
    rows = np.stack([_logits([seed]) for seed in range(5)])
    sampling = SamplingConfig(1, temperature, top_k, top_p)
    found = np.asarray(warp(jnp.asarray(rows, jnp.float32), sampling), np.float64)
    for row, logits in zip(found, rows, strict=True):
        p = _truncated(logits, sampling)
        assert set(np.flatnonzero(np.isfinite(row)).tolist()) == set(p)
        for v in p:
            assert row[v] == pytest.approx(logits[v] / temperature, abs=1e-5)


def test_greedy_sampling_changes_no_logit() -> None:
    logits = jnp.asarray([_logits([1])], jnp.float32)
    sampling = SamplingConfig(1, 0.0, top_k=2, top_p=0.5)
    np.testing.assert_array_equal(warp(logits, sampling), logits)
    token, logp = draw(logits, jax.random.split(jax.random.key(0), 1), jnp.zeros(1, int), sampling)
    p = _truncated(_logits([1]), sampling)
    assert int(token[0]) == max(p, key=lambda v: p[v])
    assert float(logp[0]) == pytest.approx(max(p.values()), abs=1e-5)


def test_ties_with_the_last_token_are_included() -> None:
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0]])
    top_k = warp(logits, SamplingConfig(1, 1.0, top_k=2))
    assert np.isfinite(top_k)[0].tolist() == [True, True, True, False]
    # 0.63 + 0.23 reach 0.8; the other 1.0 ties with the second
    top_p = warp(logits, SamplingConfig(1, 1.0, top_p=0.8))
    assert np.isfinite(top_p)[0].tolist() == [True, True, True, False]


def test_the_support_holds_what_could_be_drawn_and_what_was() -> None:
    sampling = SamplingConfig(1, 0.8, top_k=3)
    logits = np.stack([[_logits([b, t]) for t in range(3)] for b in range(2)])
    ids = np.array([[0, 5, 7], [0, 2, 8]], np.int32)
    with jax.set_mesh(ONE.mesh()):
        found = support_of(jnp.asarray(logits, jnp.float32), jnp.asarray(ids), sampling, ONE)
        assert (
            support_of(jnp.asarray(logits, jnp.float32), jnp.asarray(ids), SAMPLINGS[1], ONE)
            is None
        )
    assert found is not None
    for b in range(2):
        for t in range(3):
            following = [int(ids[b, t + 1])] if t < 2 else [0]
            expected = {*_truncated(logits[b, t], sampling), *following}
            assert set(np.flatnonzero(found[b, t]).tolist()) == expected


@pytest.mark.parametrize(
    ("settings", "truncates", "greedy"),
    [({}, False, False), ({"top_k": 1}, True, False), ({"top_p": 0.99}, True, False),
     ({"temperature": 0.0}, False, True)],
)  # fmt: skip
def test_settings_say_whether_they_truncate(
    settings: dict[str, Any], truncates: bool, greedy: bool
) -> None:
    sampling = SamplingConfig(**settings)
    assert (sampling.truncates, sampling.greedy) == (truncates, greedy)


def test_settings_of_sampling_have_these_ranges() -> None:
    SamplingConfig(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0)
    SamplingConfig(top_p=1e-9)
    for name, value in (
        ("max_new_tokens", 0), ("temperature", -1e-9), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.01)
    ):  # fmt: skip
        settings: dict[str, Any] = {name: value}
        with pytest.raises(UserError, match=rf"sampling.{name} = .* is out of range"):
            SamplingConfig(**settings)


def test_next_logits_leave_out_what_fills_the_vocabulary(model: CausalLM) -> None:
    with jax.set_mesh(ONE.mesh()):
        found = next_logits(model, jnp.full((2, 1), 3.0), ONE)
    assert found.shape == (2, V) and float(found.max()) < 4.0


def test_every_row_has_its_own_stream() -> None:
    key = jax.random.key(3)
    keys = jax.random.key_data(row_keys(key, jnp.array([4, 0, 4])))
    expected = [jax.random.key_data(jax.random.fold_in(key, seed)).tolist() for seed in (4, 0, 4)]
    assert keys.tolist() == expected
