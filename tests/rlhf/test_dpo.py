"""Pairs of DPO: which answers are preferred and rejected, and what becomes of those that were cut off."""

import dataclasses
from typing import Literal, get_args, get_type_hints

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.batch import Sequences
from glm_jax.config import PRESETS
from glm_jax.generate import SamplingConfig
from glm_jax.optim import OptimConfig, make_optimizer
from rlhf.dpo import DPOConfig, best_and_worst, sample_pairs
from rlhf.rollout import prompt_batches
from rlhf.trials.models import ANSWER, prompts, tiny
from rlhf.trials.ppo import PLAIN, small_ppo
from sharding.errors import UserError
from sharding.layout import Layout

Mode = Literal["keep", "penalty", "reject", "mask"]
MODES: tuple[Mode, ...] = ("keep", "penalty", "reject", "mask")
STOPS = tuple(range(2, 11))  # of 61 tokens: half of the answers end within 6
ROUNDING = 64 * 2.0**-23  # of float32, for scores up to 1


def _numbered(prompts: int, samples: int) -> Sequences:
    """Answers whose only token is their number."""
    ids = np.arange(prompts * samples, dtype=np.int32)[:, None]
    return Sequences(ids, np.ones(ids.shape, bool), np.ones(ids.shape, bool))


def _by_loop(
    scores: np.ndarray, ended: np.ndarray, mode: Mode, penalty: float
) -> list[tuple[int, int]]:
    """Numbers of the preferred and the rejected answers."""
    found = []
    for p, row in enumerate(scores.tolist()):
        worth = [
            (s - (penalty if mode == "penalty" and not end else 0.0), k, bool(end))
            for k, (s, end) in enumerate(zip(row, ended[p], strict=True))
        ]
        best = [w for w in worth if w[2] or mode in ("keep", "penalty")]
        worst = [w for w in worth if w[2] or mode != "mask"]
        if not best or not worst:
            continue
        top = max(best, key=lambda w: (w[0], -w[1]))
        bottom = min(worst, key=lambda w: (w[0], w[1]))
        if top[0] - bottom[0] > ROUNDING * max(1.0, *map(abs, row)):
            found.append((len(row) * p + top[1], len(row) * p + bottom[1]))
    return found


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(MODES),
    st.sampled_from([2, 3, 5]),
    st.sampled_from([0.0, 0.4, 3.0]),
)
def test_pairs_are_those_of_a_loop(seed: int, mode: Mode, samples: int, penalty: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (6, samples)
    values = np.array([-1.0, 0.25, 0.25 + 1e-6, 0.25 + 2e-5, 1.0], np.float32)  # ties and near ties
    scores, ended = rng.choice(values, shape), rng.random(shape) < 0.6
    logp = rng.normal(size=shape).astype(np.float32)
    config = DPOConfig(samples=samples, truncated=mode, truncation_penalty=penalty)
    labelled = best_and_worst(_numbered(*shape), scores, ended, logp, config)
    places = [
        tuple(x) for x in zip(*(side.ids[:, 0].tolist() for side in labelled.pairs), strict=True)
    ]
    expected = _by_loop(scores, ended, mode, penalty)
    assert places == expected
    for pair, both in zip(expected, labelled.ref_logp, strict=True):
        assert both.tolist() == [logp.reshape(-1)[place] for place in pair]


def test_by_default_an_answer_that_was_cut_off_is_never_preferred() -> None:
    assert DPOConfig().truncated == "reject"
    assert get_args(get_type_hints(DPOConfig)["truncated"]) == MODES
    scores = np.array([[5.0, 1.0, 0.0], [5.0, 4.0, 3.0], [1.0, 2.0, 0.5]], np.float32)
    ended = np.array([[False, True, True], [False, False, False], [False, True, False]])
    labelled = best_and_worst(_numbered(3, 3), scores, ended, scores, DPOConfig(samples=3))
    assert labelled.pairs.chosen.ids[:, 0].tolist() == [1, 7]
    assert labelled.pairs.rejected.ids[:, 0].tolist() == [2, 8]


@pytest.mark.parametrize("mode", MODES)
def test_sampled_pairs_follow_the_setting_and_padding_is_no_pair(mode: Mode) -> None:
    config = dataclasses.replace(tiny(PRESETS["chatglm3-6b"]), num_layers=2)
    layout, table = Layout(), prompts(config, "pairs", 9)
    settings = DPOConfig(samples=4, truncated=mode, truncation_penalty=50.0)
    optimizers = (make_optimizer(OptimConfig(), 8),) * 2
    sampling = SamplingConfig(max_new_tokens=ANSWER)
    with jax.set_mesh(layout.mesh()):
        ppo = dataclasses.replace(PLAIN, sampling=sampling)
        small = small_ppo(config, ppo, optimizers, layout, stop_ids=STOPS)
        batches = prompt_batches(table, 24, 4, small.iterate.sample)
        assert sum(len(batch.row) for batch in batches) == 12  # 9 prompts and 3 rows of padding
        told: list[float] = []
        pairs = sample_pairs(
            small.models.actor,
            small.models.reward,
            settings,
            batches,
            small.iterate.sample,
            STOPS[0],
            jax.random.key(0),
            layout,
            lambda _, metrics, tokens: told.append(metrics["ended"]),
        ).pairs

    def cut_off(side: Sequences) -> np.ndarray:
        return ~(np.isin(side.ids, STOPS) & side.target).any(axis=1)

    for side in pairs:
        assert all((table.ids == ids[: table.ids.shape[1]]).all(axis=1).any() for ids in side.ids)
    best, worst = cut_off(pairs.chosen), cut_off(pairs.rejected)
    assert all(0.2 < x < 0.9 for x in told)
    assert best.any() == (mode == "keep") or mode == "penalty"
    assert worst.any() == (mode != "mask")
    # 50 is more than scores differ by: a prompt with both kinds prefers what has ended
    assert mode != "penalty" or not (best & ~worst).any()


def test_where_no_pair_is_left_the_line_says_how_many_were_cut_off() -> None:
    config = dataclasses.replace(tiny(PRESETS["chatglm3-6b"]), num_layers=2)
    layout, table = Layout(), prompts(config, "pairs", 4)
    optimizers = (make_optimizer(OptimConfig(), 8),) * 2
    with jax.set_mesh(layout.mesh()):
        small = small_ppo(config, PLAIN, optimizers, layout, stop_ids=(config.vocab_size,))
        line = r"no pair is left: .* 16 of 16 answers are cut off \(dpo.truncated = reject\)"
        with pytest.raises(UserError, match=line):
            sample_pairs(
                small.models.actor,
                small.models.reward,
                DPOConfig(samples=4),
                prompt_batches(table, 16, 4, small.iterate.sample),
                small.iterate.sample,
                STOPS[0],
                jax.random.key(0),
                layout,
                lambda *_: None,
            )
