"""The reward model: weights, packing, looking at held-out pairs while it learns; the same under every layout."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.batch import Packed
from glm_jax.config import PRESETS, Config, GLMConfig
from glm_jax.model import init_trunk
from glm_jax.optim import OptimConfig
from glm_jax.scalar import ScalarModel, scalar_model
from glm_jax.tokenizers import ChatGLM3Tokenizer
from glm_jax.weights import host_weights
from rlhf.card.card import grade
from rlhf.certify import FLOAT32
from rlhf.data.batches import in_order, shuffled
from rlhf.data.pair_rows import TokenPair, judged_rows, packed_rows, token_pairs
from rlhf.data.records import Preference, user_turn
from rlhf.reward import Heldout, RewardConfig, pair_scores, reward_loss, total_weight, train_reward
from rlhf.scoring import scored
from rlhf.trials.models import place_scorer, tiny
from sharding.errors import UserError
from sharding.layout import Layout, get_layout

LAYOUT, LENGTH, PACKED = Layout(), 24, 64
WORDS = ("灯光", "毛巾", "窗帘", "走廊", "电梯", "书桌", "花园")


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.train([f"{word}很亮太旧，还行。" for word in WORDS], vocab_size=320)


@pytest.fixture(scope="module")
def records() -> list[Preference]:
    """Rankings of two to five answers of different lengths, weighing 1 a prompt."""
    found = []
    for number, word in enumerate(WORDS):
        answers = ["很亮" + "，还行" * i + "。" * number for i in range(2 + number % 4)]
        pairs = [(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]]
        found += [Preference(user_turn(word), a, b, 1 / len(pairs)) for a, b in pairs]
    return found


@pytest.fixture(scope="module")
def tokens(records: list[Preference], tokenizer: ChatGLM3Tokenizer) -> list[TokenPair]:
    return token_pairs(records, tokenizer, LENGTH)


@pytest.fixture(scope="module")
def model(small: GLMConfig) -> ScalarModel:
    config = dataclasses.replace(small, vocab_size=320)
    with jax.set_mesh(LAYOUT.mesh()):
        trunk = jax.jit(partial(init_trunk, config, LAYOUT))(jax.random.key(0))
        return scalar_model(trunk, LAYOUT, jax.random.key(1))


def packed_answers(packed: Packed) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """(preferred, other, weight) of every pair, read back from the rows."""
    found = []
    for row, columns in enumerate(packed.weight):
        for j, weight in enumerate(columns.tolist()):
            if weight > 0:
                both = []
                for end in (packed.chosen_end[row, j], packed.rejected_end[row, j]):
                    segment = packed.segments[row, end]
                    here = packed.segments[row] == segment
                    assert here.nonzero()[0][-1] == end, "the end is the last token of its answer"
                    both.append(tuple(packed.ids[row, here].tolist()))
                found.append((both[0], both[1], round(weight, 6)))
    return found


@pytest.mark.parametrize("length", [2 * LENGTH, PACKED, 400])
def test_packing_keeps_every_pair_and_every_answer_once_a_row(
    records: list[Preference], tokens: list[TokenPair], length: int
) -> None:
    packed = packed_rows(records, tokens, length)
    given = Counter(
        (tuple(p.chosen), tuple(p.rejected), round(np.float32(records[p.record].weight).item(), 6))
        for p in tokens
    )
    assert Counter(packed_answers(packed)) == given
    for ids, segments in zip(packed.ids, packed.segments, strict=True):
        here = [tuple(ids[segments == s]) for s in range(1, segments.max() + 1)]
        assert len(set(here)) == len(here)
        filled = (segments > 0).sum()
        assert (segments[:filled] > 0).all() and (np.diff(segments[:filled]) >= 0).all()
    if length == 400:  # every ranking fits a row
        answers = {ids for pair in given for ids in pair[:2]}
        assert (packed.segments > 0).sum() == sum(map(len, answers)), "no answer stands twice"
        assert len(packed.ids) == -(-sum(map(len, answers)) // length)


def test_packed_scores_are_those_of_answers_alone(
    records: list[Preference], tokens: list[TokenPair], model: ScalarModel
) -> None:
    judged, packed = judged_rows(records, tokens, LENGTH), packed_rows(records, tokens, PACKED)
    with jax.set_mesh(LAYOUT.mesh()):
        alone = pair_scores(model, LAYOUT.put(judged), LAYOUT)
        together = pair_scores(model, LAYOUT.put(packed), LAYOUT)
        losses = [
            reward_loss(model, batch, total_weight(batch), LAYOUT, 0.1)[0]
            for batch in map(LAYOUT.put, (judged, packed))
        ]
    expected = {
        (tuple(pair.chosen), tuple(pair.rejected)): scores
        for pair, *scores in zip(tokens, *map(np.asarray, alone), strict=True)
    }
    real = packed.weight > 0
    found = [np.asarray(side)[real].tolist() for side in together]
    for (chosen, rejected, _), *scores in zip(packed_answers(packed), *found, strict=True):
        np.testing.assert_allclose(scores, expected[chosen, rejected], atol=1e-6)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


def rows_of(batch: Packed, count: int) -> Packed:
    return jax.tree.map(lambda x: np.resize(x, (count, *x.shape[1:])), batch)


@pytest.mark.parametrize("name", ["fsdp_tp", "2x2x1x2:circular:2:2"])
def test_a_packed_gradient_does_not_depend_on_the_layout(
    records: list[Preference], tokens: list[TokenPair], name: str
) -> None:
    base = tiny(PRESETS["chatglm3-6b"])
    assert isinstance(base, GLMConfig)
    ids = judged_rows(
        records, tokens, LENGTH
    )  # ids of a vocabulary of 320, folded into the tiny one
    assert ids.pairs.chosen.ids.max() > base.vocab_size
    packed = packed_rows(records, tokens, PACKED)
    packed = packed._replace(
        ids=np.where(packed.segments > 0, packed.ids % 50 + 3, 0).astype(np.int32)
    )
    batch = rows_of(packed, 8)
    one, other = (_gradient(base, batch, layout) for layout in (LAYOUT, get_layout(name, 8)))
    for path, expected in one.items():
        # as certify has it: a gradient cancels
        atol = FLOAT32["gradient"] * np.abs(expected).max()
        np.testing.assert_allclose(other[path], expected, rtol=0, atol=atol, err_msg=path)


def _gradient(config: Config, batch: Packed, layout: Layout) -> dict[str, np.ndarray]:
    with jax.set_mesh(layout.mesh()):
        model, rows = place_scorer(config, layout), layout.put(batch)

        @jax.jit
        def gradient(model: ScalarModel, rows: Packed) -> Any:
            loss = partial(reward_loss, layout=layout, l2_weight=0.1)
            return jax.grad(lambda m: loss(m, rows, total_weight(rows))[0])(model)

        return host_weights(gradient(model, rows), layout)


def test_heldout_figures_are_weighted_means_without_padding(
    records: list[Preference], tokens: list[TokenPair], model: ScalarModel
) -> None:
    judged = judged_rows(records, tokens, LENGTH)
    with jax.set_mesh(LAYOUT.mesh()):
        heldout = Heldout(in_order(judged, 8), LAYOUT)
        chosen, rejected = heldout.scores(model)
        figures = heldout(model)
    assert len(chosen) == len(tokens) and len(tokens) % 8
    weights = [records[pair.record].weight for pair in tokens]
    right = loss = 0.0
    for c, r, weight in zip(chosen.tolist(), rejected.tolist(), weights, strict=True):
        right += weight * (1.0 if c > r else 0.5 if c == r else 0.0)
        loss += weight * np.log1p(np.exp(r - c))
    assert figures["heldout_accuracy"] == pytest.approx(right / sum(weights))
    assert figures["heldout_loss"] == pytest.approx(loss / sum(weights))


def test_the_heldout_accuracy_is_that_of_the_report_card(
    records: list[Preference], tokenizer: ChatGLM3Tokenizer, model: ScalarModel
) -> None:
    """One number of one name, and so the loss; whatever pairs weigh, and unlike the plain mean."""
    mixed = [
        record._replace(chosen=record.rejected, rejected=record.chosen) if n % 3 else record
        for n, record in enumerate(records)
    ]
    weighed = [record._replace(weight=0.1 + n % 5) for n, record in enumerate(mixed)]
    tokens = token_pairs(mixed, tokenizer, LENGTH)
    for of in (mixed, weighed):
        with jax.set_mesh(LAYOUT.mesh()):
            heldout = Heldout(in_order(judged_rows(of, tokens, LENGTH), 8), LAYOUT)
            figures, found = heldout(model), scored(model, heldout, of, tokens)
        card = grade(found)
        # float32 weights against float64 ones: 2^-24 of each, and four times that
        assert figures["heldout_accuracy"] == pytest.approx(card.accuracy.value, rel=3e-7)
        assert figures["heldout_loss"] == pytest.approx(card.calibration.nll, rel=3e-7)
        plain = np.mean(found.chosen > found.rejected)
        assert card.accuracy.value != pytest.approx(plain, rel=1e-3) and 0.2 < plain < 0.8


def test_the_smallest_weight_is_no_padding(
    records: list[Preference], tokens: list[TokenPair], model: ScalarModel
) -> None:
    """A weight that float32 rounds to 0 leaves its row among the scored ones."""
    light = [record._replace(weight=1e-60 if n == 3 else 1.0) for n, record in enumerate(records)]
    with jax.set_mesh(LAYOUT.mesh()):
        heldout = Heldout(in_order(judged_rows(light, tokens, LENGTH), 8), LAYOUT)
        assert len(scored(model, heldout, light, tokens).chosen) == len(tokens)
        assert 0 < heldout(model)["heldout_loss"] < 10


def test_columns_of_the_report_card(
    records: list[Preference], tokens: list[TokenPair], model: ScalarModel
) -> None:
    with jax.set_mesh(LAYOUT.mesh()):
        heldout = Heldout(in_order(judged_rows(records, tokens, LENGTH), 8), LAYOUT)
        found = scored(model, heldout, records, tokens)
    texts: dict[int, set[tuple[str, str]]] = {}
    for row, pair in enumerate(tokens):
        record = records[pair.record]
        for side, answer in (
            (record.chosen, found.chosen_answer),
            (record.rejected, found.rejected_answer),
        ):
            texts.setdefault(int(answer[row]), set()).add((str(record.prompt), side))
        assert found.chosen_tokens[row] == len(pair.chosen) - pair.start
    assert all(len(same) == 1 for same in texts.values())
    assert len(texts) == len({side for pair in tokens for side in map(tuple, pair[2:])})
    assert len(set(found.prompt.tolist())) == len(WORDS)


@pytest.mark.parametrize("packed", [False, True])
def test_it_learns_and_tells_how_heldout_pairs_fare_on_the_way(
    records: list[Preference], tokens: list[TokenPair], model: ScalarModel, packed: bool
) -> None:
    judged = judged_rows(records, tokens, LENGTH)
    rows = packed_rows(records, tokens, PACKED) if packed else judged
    config = RewardConfig(
        steps=7, batch_size=4, eval_every=3, optim=OptimConfig(learning_rate=3e-3)
    )
    told: list[tuple[int, Mapping[str, float]]] = []
    with jax.set_mesh(LAYOUT.mesh()):
        heldout = Heldout(in_order(judged, 8), LAYOUT)
        before = heldout(model)
        trained = train_reward(
            model,
            config,
            shuffled(rows, 4, seed=0),
            LAYOUT,
            lambda step, metrics, tokens: told.append((step, metrics)),
            heldout,
        )
        after = heldout(trained)
    assert [step for step, _ in told] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, metrics in told if "heldout_accuracy" in metrics] == [3, 6, 7]
    assert after["heldout_loss"] == told[-1][1]["heldout_loss"] < before["heldout_loss"]


def test_a_row_too_short_for_a_pair_is_refused(
    records: list[Preference], tokens: list[TokenPair]
) -> None:
    with pytest.raises(UserError, match=r"reward.pack_length = 30 .* at least \d+"):
        packed_rows(records, tokens, 30)
