"""DPO's pairs and losses against plain loops; the models are tables of log-probabilities and scores."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rlhf.dpo
from glm_jax.batch import Pairs, Prompts, Sequences
from glm_jax.config import PRESETS
from glm_jax.generate import Generation
from glm_jax.keeper import Keeper
from glm_jax.metrics import finished
from glm_jax.model import CausalLM
from glm_jax.model_v2 import TrunkV2
from glm_jax.sampler import Sampler
from glm_jax.scalar import ScalarModel
from glm_jax.train import init_state
from rlhf.dpo import (
    DPOConfig,
    LabelledPairs,
    answer_logprobs,
    best_and_worst,
    counts,
    dpo_update,
    pair_loss,
    sample_pairs,
    train_dpo,
)
from sharding.errors import UserError
from sharding.layout import Layout

ONE, STOP, SCALE = Layout(), 9, 0.3
SFT = Sequences(
    np.array([[1, 2, 3], [4, 5, 6]], np.int32),
    np.ones((2, 3), bool),
    np.array([[0, 1, 1]] * 2, bool),
)
CLOSE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}  # float32 sums of some ten terms below 20


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's log-probability is its id times the head; a score is the number of the last token."""

    def logprobs(model: Any, ids: jax.Array, valid: jax.Array, layout: Layout) -> jax.Array:
        return jnp.where(valid, -model.w_head * ids, jnp.nan)

    def language_loss(model: Any, batch: Sequences, count: Any, layout: Layout) -> Any:
        return model.w_head * jnp.sum(batch.ids * batch.target) / count, {}

    def scores(model: ScalarModel, rows: Sequences, layout: Layout) -> jax.Array:
        return model.w_scalar[0] * jnp.sum(
            jnp.where(rows.valid & (rows.ids != STOP), rows.ids, 0), axis=1
        )

    monkeypatch.setattr(rlhf.dpo, "sequence_logprobs", logprobs)
    monkeypatch.setattr(rlhf.dpo, "language_loss", language_loss)
    monkeypatch.setattr(rlhf.dpo, "sequence_scores", scores)


def _trunk() -> TrunkV2:
    return TrunkV2(jnp.zeros((1, 1)), None, jnp.zeros(1), PRESETS["chatglm3-6b"])


def _policy(scale: float = SCALE) -> CausalLM:
    return CausalLM(_trunk(), jnp.float32(scale))


def _rows(answers: list[list[int]]) -> Sequences:
    """One prompt token 7, then the answer, then padding."""
    ids = np.zeros((len(answers), 5), np.int32)
    target = np.zeros((len(answers), 5), bool)
    for row, answer in enumerate(answers):
        ids[row, : 1 + len(answer)] = [7, *answer]
        target[row, 1 : 1 + len(answer)] = True
    return Sequences(ids, target | (np.arange(5) < 1), target)


CHOSEN, REJECTED = [[1, 2], [3], [2, 2, 1]], [[5], [1, 1, 1], [4, 4]]
REF_LOGP = np.array([[-1.0, -1.2], [-0.5, -0.8], [-2.0, -2.9]], np.float32)
BATCH = (LabelledPairs(Pairs(_rows(CHOSEN), _rows(REJECTED)), REF_LOGP), SFT)


def _by_hand(scale: float, config: DPOConfig, pairs: int, tokens: int) -> dict[str, float]:
    gaps = [
        (-scale * sum(c) - float(ref[0])) - (-scale * sum(r) - float(ref[1]))
        for c, r, ref in zip(CHOSEN, REJECTED, REF_LOGP, strict=True)
    ]
    smoothing, beta = config.label_smoothing, config.beta
    if config.loss == "ipo":
        terms = [(h - 1 / (2 * beta)) ** 2 for h in gaps]
    else:
        terms = [
            (1 - smoothing) * math.log1p(math.exp(-beta * h))
            + smoothing * math.log1p(math.exp(beta * h))
            for h in gaps
        ]
    dpo, sft = math.fsum(terms) / pairs, scale * 16 / tokens
    return {"loss": dpo + config.sft_weight * sft, "dpo_loss": dpo, "sft_loss": sft}


LOSSES = [
    DPOConfig(beta=0.4, sft_weight=0.2),
    DPOConfig(beta=0.4, label_smoothing=0.1, sft_weight=0.2),
    DPOConfig(beta=0.4, loss="ipo", sft_weight=0.2),
]


@pytest.mark.parametrize("config", LOSSES)
@pytest.mark.parametrize("share", [1, 3])
def test_the_loss_of_pairs_and_sft_is_written_out(config: DPOConfig, share: int) -> None:
    with jax.set_mesh(ONE.mesh()):
        batch = ONE.put(BATCH)
        pairs, tokens = counts(batch)
        assert (pairs, int(tokens)) == (3, 4)
        loss, shares = pair_loss(_policy(), batch, (share * pairs, share * tokens), config, ONE)
    expected = _by_hand(SCALE, config, 3 * share, 4 * share)
    found = {"loss": float(loss)} | {k: float(v) for k, v in finished(shares).items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, **CLOSE)
    assert set(found) == {*expected, "accuracy", "margin", "chosen_logratio"}


@pytest.mark.parametrize("config", LOSSES)
def test_an_update_descends_that_loss(config: DPOConfig) -> None:
    with jax.set_mesh(ONE.mesh()):
        update = dpo_update(config, optax.sgd(0.01), ONE)
        state, metrics = update(init_state(_policy(), optax.sgd(0.01)), ONE.put(BATCH))
    above, below = (_by_hand(SCALE + d, config, 3, 4)["loss"] for d in (1e-5, -1e-5))
    assert float(metrics["loss"]) == pytest.approx(_by_hand(SCALE, config, 3, 4)["loss"], **CLOSE)
    assert float(state.model.w_head) == pytest.approx(
        SCALE - 0.01 * (above - below) / 2e-5, abs=1e-5
    )


def test_log_probabilities_are_sums_over_the_answer() -> None:
    rows = jax.tree.map(jnp.asarray, _rows(CHOSEN))
    found = answer_logprobs(_policy(), rows, ONE)
    np.testing.assert_allclose(found, [-SCALE * sum(c) for c in CHOSEN], rtol=1e-6)


# pairs from samples


def test_the_best_and_the_worst_make_a_pair_unless_all_are_equal() -> None:
    answers = _rows([[token] for token in (1, 2, 3, 4, 5, 6, 1, 2, 3)])
    scores = np.array([[0.5, 2.0, -1.0], [1.0, 1.0, 1.0], [3.0, 3.0, 2.0]])
    logp = np.arange(9.0).reshape(3, 3)
    labelled = best_and_worst(answers, scores, np.ones((3, 3), bool), logp, DPOConfig())
    assert labelled.pairs.chosen.ids[:, 1].tolist() == [2, 1]  # of equal ones the first
    assert labelled.pairs.rejected.ids[:, 1].tolist() == [3, 3]
    assert labelled.ref_logp.tolist() == [[1.0, 2.0], [6.0, 8.0]]
    for side in labelled.pairs:
        assert side.valid.sum() == 4 and side.target.sum() == 2


class _Sampler(Sampler):
    """Answers in turn from a list; `keys` are those it was given."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers, self.keys, self.samples = answers, list[Any](), list[int]()

    def __call__(self, policy: Any, prompts: Any, key: Any, samples: int = 1) -> Generation:
        self.keys.append(jax.random.key_data(key).tolist())
        self.samples.append(samples)
        count = len(prompts.row) * samples
        own, self.answers = self.answers[:count], self.answers[count:]
        rows = _rows(own)
        logp = np.zeros(rows.ids.shape, np.float32)
        ended = np.array([STOP in answer for answer in own])
        made: Generation = ONE.put(Generation(rows, logp, ended))
        return made


def _prompts(*rows: int) -> Prompts:
    count = len(rows)
    return Prompts(
        np.full((count, 1), 7, np.int32), np.ones((count, 1), bool), np.array(rows, np.int32)
    )


def _sampled(
    answers: list[list[int]], scale: float = 1.0
) -> tuple[LabelledPairs, list[tuple[int, Mapping[str, float], int]], _Sampler]:
    reports: list[tuple[int, Mapping[str, float], int]] = []
    sample = _Sampler(answers)
    with jax.set_mesh(ONE.mesh()):
        pairs = sample_pairs(
            _policy(), ScalarModel(_trunk(), jnp.full(1, scale)),
            DPOConfig(samples=2, truncated="keep"),
            [_prompts(4, 5), _prompts(6, -1)], sample, STOP, jax.random.key(3), ONE,
            lambda *of: reports.append(of),
        )  # fmt: skip
    return pairs, reports, sample


ANSWERS = [[1, STOP], [3, 3], [4, 4], [2], [5, STOP], [5], [8], [1]]  # the last two fill the batch


def test_sampled_answers_are_paired_by_their_scores() -> None:
    pairs, reports, sample = _sampled(list(ANSWERS))
    assert pairs.pairs.chosen.ids[:, 1].tolist() == [3, 4]  # prompt 6 ties
    assert pairs.pairs.rejected.ids[:, 1].tolist() == [1, 2]
    expected = [[-SCALE * 6, -SCALE * 10], [-SCALE * 8, -SCALE * 2]]
    np.testing.assert_allclose(pairs.ref_logp, expected, rtol=1e-6)
    # scores are sums of ids, the prompt's 7 among them
    first, second = reports
    figures = {"score": (8 + 13 + 15 + 9) / 4, "spread": (5 + 6) / 2, "ended": 1 / 4}
    assert first == (1, figures, 3 + 3 + 3 + 2)
    assert second[:2] == (2, {"score": 12.0, "spread": 0.0, "ended": 1 / 2})
    assert sample.samples == [2, 2]
    keys = [jax.random.key_data(jax.random.fold_in(jax.random.key(3), n)).tolist() for n in (0, 1)]
    assert sample.keys == keys


def test_no_pair_and_no_number_are_refused() -> None:
    with pytest.raises(UserError, match=r"^dpo: no pair is left"):
        _sampled([[1]] * 8)
    with pytest.raises(UserError, match=r"policy's answers to 2 of 2 prompts .*first: prompt 4"):
        _sampled(list(ANSWERS), math.nan)


# training and settings


class _Fresh(Keeper):
    state: Any = None

    def restore(self, make: Callable[[], Any]) -> Any:
        self.state = make()
        return self.state


def test_training_runs_its_steps_on_pairs_and_sft_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def train(state: Any, update: Any, batches: Any, steps: int, *others: Any) -> Any:
        calls.append((list(batches), steps, others))
        return state

    monkeypatch.setattr(rlhf.dpo, "train", train)
    keeper, model = _Fresh(), _policy()

    def report(step: int, metrics: Mapping[str, float], tokens: int) -> None: ...

    with jax.set_mesh(ONE.mesh()):
        trained = train_dpo(
            model, DPOConfig(steps=5), iter([BATCH[0]] * 2), iter([SFT] * 3), ONE, report, keeper
        )
    ((batches, steps, others),) = calls
    assert len(batches) == 2 and batches[0][0] is BATCH[0] and batches[0][1] is SFT
    assert steps == 5 and others == (ONE, report, keeper)
    assert int(keeper.state.step) == 0 and trained is keeper.state.model is not model


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"^dpo.batch_size = 3 does not divide"):
        train_dpo(
            _policy(), DPOConfig(batch_size=3), iter(()), iter(()), Layout(data=2), lambda *_: None
        )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"samples": 1}, r"dpo.samples = 1"),
        ({"label_smoothing": -0.1}, r"dpo.label_smoothing = -0.1 is out of range"),
        ({"label_smoothing": 0.5}, r"dpo.label_smoothing = 0.5 is out of range"),
        ({"loss": "ipo", "label_smoothing": 0.1}, r"belongs to dpo.loss = dpo"),
        ({"beta": 0.0}, r"dpo.beta = 0.0 is out of range"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        DPOConfig(**settings)


def test_settings_at_the_edge_of_their_range_are_accepted() -> None:
    DPOConfig(samples=2, label_smoothing=0.0, beta=1e-6)
    DPOConfig(label_smoothing=0.49)
    DPOConfig(loss="ipo")
