"""Reference answers and prompt selection; a reward model from elsewhere."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import MagicMock, Mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf.ppo_run
from glm_jax.batch import Prompts, Sequences
from glm_jax.checkpoint import Card, save_model
from glm_jax.companions import check_same_tokenizer
from glm_jax.config import PRESETS, GLMConfig
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.hf.config import Tokens, default_form
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.sampler import Sampler
from glm_jax.tokenizers import ChatGLM3Tokenizer, Tokenizer
from rlhf.data.batches import in_order
from rlhf.dpo import DPOConfig, LabelledPairs, sample_pairs
from rlhf.ppo import PPOConfig, make_experience, score_answers
from rlhf.ppo_run import PPORun
from rlhf.progress import NOT_KEPT
from rlhf.recipe import Recipe
from rlhf.reference import References, SelectionConfig, draw_references
from rlhf.rollout import prompt_batches
from rlhf.trials.models import ANSWER, STOP_IDS, place_scorer, prompts, tiny
from rlhf.trials.ppo import SmallPPO, small_ppo
from sharding.errors import UserError
from sharding.layout import Layout

CONFIG = dataclasses.replace(tiny(PRESETS["chatglm3-6b"]), num_layers=2)
LAYOUT = Layout()
SETTINGS = PPOConfig(batch_size=8, sampling=SamplingConfig(max_new_tokens=ANSWER))
PROMPTS = 10  # more than a batch, and not a multiple of it


@pytest.fixture(scope="module")
def small() -> Iterator[SmallPPO]:
    with jax.set_mesh(LAYOUT.mesh()):
        yield small_ppo(CONFIG, SETTINGS, (make_optimizer(OptimConfig(), 8),) * 2, LAYOUT)


def _references(
    small: SmallPPO, samples: int, table: Prompts, config: PPOConfig = SETTINGS
) -> References:
    return draw_references(
        small.models.reward,
        small.models.actor,
        small.iterate.sample,
        in_order(table, SETTINGS.batch_size),
        len(table.row),
        samples,
        config,
        STOP_IDS[0],
        jax.random.key(0),
        LAYOUT,
        lambda *_: None,
    )


def test_every_prompt_gets_its_reference_answers_and_their_scores(small: SmallPPO) -> None:
    table = prompts(CONFIG, "references", PROMPTS)
    found = _references(small, 3, table)
    assert found.scores.shape == (PROMPTS, 3) and len(found.answers) == PROMPTS
    assert np.isfinite(found.scores).all()
    assert all(1 <= len(answer) <= ANSWER for answer in found.answers)
    np.testing.assert_array_equal(found.baseline, found.scores[:, 0])
    assert (np.std(found.scores, axis=1) > 0).any()  # the samples of a prompt are different answers


@pytest.mark.parametrize("truncated", ["keep", "penalty", "mask"])
def test_the_policy_begins_at_reward_0_however_cut_off_answers_count(
    small: SmallPPO, truncated: Literal["keep", "penalty", "mask"]
) -> None:
    config = dataclasses.replace(SETTINGS, truncated=truncated, truncation_penalty=3.0)
    table = prompts(CONFIG, "references", SETTINGS.batch_size)
    references = _references(small, 1, table, config)
    stream = jax.random.fold_in(jax.random.key(0), 0)  # that of the references' first batch
    answers = small.iterate.sample(small.models.actor, LAYOUT.put(table), stream)
    cut_off = ~np.asarray(answers.ended)
    assert cut_off.any() and not cut_off.all()
    make = jax.jit(partial(make_experience, config=config, stop_id=STOP_IDS[0], layout=LAYOUT))
    baseline = LAYOUT.put(references.baseline)
    experience, metrics, _ = make(small.models, answers, baseline, np.float32(0.1))
    np.testing.assert_array_equal(experience.scores, references.baseline)
    assert float(metrics["reward"]) == 0.0
    plain = _references(small, 1, table).baseline
    penalty = 3.0 * cut_off if truncated == "penalty" else 0.0
    np.testing.assert_allclose(references.baseline, plain - penalty, atol=1e-6)


def test_prompts_are_selected_by_scores_that_have_the_penalty(small: SmallPPO) -> None:
    config = dataclasses.replace(SETTINGS, truncated="penalty", truncation_penalty=100.0)
    references = _references(small, 3, prompts(CONFIG, "references", PROMPTS), config)
    ended = references.scores > -50.0
    mixed = ended.any(axis=1) & ~ended.all(axis=1)
    assert mixed.any() and not mixed.all()
    chosen = references.selected(SelectionConfig(3, 500.0))  # only what a penalty of 100 can reach
    np.testing.assert_array_equal(chosen, np.flatnonzero(mixed))


@pytest.mark.parametrize(
    ("advantage", "baseline", "selected", "sampled"),
    [
        ("gae", True, 0, 1),
        ("gae", False, 0, 0),
        ("rloo", True, 0, 0),
        ("grpo", True, 0, 0),
        ("grpo", False, 0, 0),
        ("grpo", True, 3, 3),
        ("gae", False, 3, 3),
    ],
)
def test_reference_answers_are_sampled_where_they_do_not_cancel(
    small: SmallPPO,
    monkeypatch: pytest.MonkeyPatch,
    advantage: Literal["gae", "rloo", "grpo"],
    baseline: bool,
    selected: int,
    sampled: int,
) -> None:
    drawn = Mock(side_effect=LookupError)  # nothing after it matters
    monkeypatch.setattr(rlhf.ppo_run, "draw_references", drawn)
    monkeypatch.setattr(rlhf.ppo_run, "prompt_batches", lambda *_: [])
    ppo = PPOConfig(advantage=advantage, samples=2, reference_baseline=baseline)
    run = Mock(
        recipe=Recipe(ppo=ppo, selection=SelectionConfig(selected)),
        data=Mock(prompts=prompts(CONFIG, "few", 4)),
        progress=NOT_KEPT,
        samplers={"ppo": None},
        directory=Path(),
    )
    run.log.stage = MagicMock()
    with pytest.raises(LookupError) if sampled else nullcontext():
        assert PPORun.draw_references(run, small.models.actor, small.models.reward) is None
    assert [call.args[5] for call in drawn.call_args_list] == [sampled] * bool(sampled)
    told = [call.args[0] for call in run.log.note.call_args_list]
    cancels = baseline and advantage != "gae"
    assert [f"ppo.advantage = {advantage}" in line for line in told] == [True] * cancels


def test_a_score_that_is_not_a_number_is_refused(small: SmallPPO) -> None:
    table = prompts(CONFIG, "references", PROMPTS)
    ill = small.models.reward
    sick = small._replace(
        models=small.models._replace(reward=jax.tree.map(lambda x: x * np.nan, ill))
    )
    with pytest.raises(
        UserError, match=r"8 of 8 prompts with what is not a number \(first: prompt 0\)"
    ):
        _references(sick, 1, table)


def test_what_prompts_are_answered_together_does_not_depend_on_the_layout() -> None:
    table = prompts(CONFIG, "references", PROMPTS)
    rows = {}
    for layout in (LAYOUT, Layout(data=4), Layout(fsdp=8)):
        with jax.set_mesh(layout.mesh()):
            sample = Sampler(CONFIG, SETTINGS.sampling, STOP_IDS, layout)
            batches = [np.asarray(x.row) for x in prompt_batches(table, 16, 3, sample)]
        ways = layout.ways("batch")
        assert all(len(batch) % ways == 0 and len(batch) < 5 + ways for batch in batches)
        rows[ways] = [batch[batch >= 0].tolist() for batch in batches]
    assert rows[1] == rows[4] == rows[8] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@settings(max_examples=200, deadline=None)
@given(
    pipe=st.sampled_from([1, 2]),
    ways=st.sampled_from([1, 2, 4]),
    microbatches=st.integers(1, 6),
    answers=st.integers(1, 40),
    samples=st.integers(1, 7),
)
def test_answers_to_a_batch_divide_into_microbatches(
    pipe: int, ways: int, microbatches: int, answers: int, samples: int
) -> None:
    """Answers are sampled without a pipeline, and scored in one."""
    layout = Layout(pipe=pipe, data=ways, microbatches=microbatches if pipe > 1 else 1)
    sample = Sampler.__new__(Sampler)  # its programs are of no concern
    sample.training, sample.generation = layout, Layout(data=2 * ways)
    table = Prompts(
        np.zeros((11, 2), np.int32), np.ones((11, 2), bool), np.arange(11, dtype=np.int32)
    )
    seen = []
    for batch in prompt_batches(table, answers, samples, sample):
        row = np.asarray(batch.row)
        assert len(row) % (2 * ways) == 0
        layout.check_batch(len(row) * samples, "answers")  # raises where they do not divide
        seen.append(row[row >= 0].tolist())
    rows = max(1, answers // samples)
    assert seen == [list(range(i, min(11, i + rows))) for i in range(0, 11, rows)]


@pytest.mark.parametrize("poison", [1.0, np.nan])
def test_pairs_are_the_best_and_the_worst_of_a_prompts_own_answers(
    small: SmallPPO, poison: float
) -> None:
    table, config = prompts(CONFIG, "pairs", 5), DPOConfig(samples=3, truncated="keep")
    reward = jax.tree.map(lambda x: x * poison, small.models.reward)
    batches = prompt_batches(table, 9, 3, small.iterate.sample)  # 3 prompts, then 2 and padding
    told: list[Mapping[str, float]] = []

    def draw() -> LabelledPairs:
        return sample_pairs(
            small.models.actor,
            reward,
            config,
            batches,
            small.iterate.sample,
            STOP_IDS[0],
            jax.random.key(0),
            LAYOUT,
            lambda _, metrics, tokens: told.append(metrics),
        )

    if np.isnan(poison):
        with pytest.raises(UserError, match="scores the policy's answers to 3 of 3 prompts"):
            draw()
        return
    pairs, ref_logp = draw()
    width = table.ids.shape[1]
    of = [np.flatnonzero((table.ids == ids[:width]).all(axis=1)) for ids in pairs.chosen.ids]
    np.testing.assert_array_equal(np.concatenate(of), np.arange(5))  # padding is no prompt
    np.testing.assert_array_equal(pairs.chosen.ids[:, :width], pairs.rejected.ids[:, :width])
    score = jax.jit(partial(score_answers, config=SETTINGS, stop_id=STOP_IDS[0], layout=LAYOUT))

    def scored(side: Sequences) -> np.ndarray:
        ended = (np.isin(side.ids, STOP_IDS) & side.target).any(axis=1)
        found: np.ndarray = np.asarray(score(reward, Generation(side, side.ids * 0.0, ended)))
        return found

    best, worst = scored(pairs.chosen), scored(pairs.rejected)
    assert (best > worst).all() and ref_logp.shape == (5, 2) and (ref_logp < 0).all()
    assert len(told) == 2 and np.isfinite([x["score"] for x in told]).all()


def test_one_answer_makes_no_pair() -> None:
    with pytest.raises(UserError, match=r"dpo\.samples = 1: a pair needs 2 answers or more"):
        DPOConfig(samples=1)


def test_prompts_whose_scores_do_not_differ_are_dropped() -> None:
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 0.1, 0.2], [0.0, 2.0, 4.0]], np.float32)
    references = References([[1]] * 3, scores)
    assert references.selected(SelectionConfig()).tolist() == [0, 1, 2]  # off
    assert references.selected(SelectionConfig(3, 0.0)).tolist() == [0, 1, 2]
    assert references.selected(SelectionConfig(3, 0.005)).tolist() == [1, 2]
    assert references.selected(SelectionConfig(3, 0.02)).tolist() == [2]  # variance 0.01 is below
    with pytest.raises(UserError, match=r"drops every prompt: .* vary by 4 at most"):
        references.selected(SelectionConfig(3, 5.0))
    with pytest.raises(UserError, match=r"selection.samples = 1 has no variance"):
        SelectionConfig(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return ChatGLM3Tokenizer.train((f"say {n} good things" for n in range(300)), 300)


def _saved(directory: Path, tokenizer: Tokenizer) -> Path:
    config = GLMConfig(320, 32, 2, 2, 1, 16, 48, max_length=64)
    card = Card(config, default_form(config), Tokens(tokenizer.eos_id, tokenizer.pad_id))
    with jax.set_mesh(LAYOUT.mesh()):
        save_model(place_scorer(config, LAYOUT), LAYOUT, card, directory, tokenizer.save)
    return directory


def test_a_reward_model_from_elsewhere_must_read_the_same_tokens(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [f"say {n} good things" for n in range(5)]
    same = _saved(tmp_path / "same", tokenizer)
    check_same_tokenizer(same, tokenizer, texts)
    other = ChatGLM3Tokenizer.train((f"quite other words {n}" for n in range(300)), 300)
    theirs = _saved(tmp_path / "other", other)
    with pytest.raises(UserError, match=r"reads 'say 0 good things' in other tokens"):
        check_same_tokenizer(theirs, tokenizer, texts)
    fewer = ChatGLM3Tokenizer.train((f"say {n} good things" for n in range(300)), 295)
    smaller = _saved(tmp_path / "smaller", fewer)
    with pytest.raises(UserError, match=r"of the reward model's tokenizer is .* of the policy's"):
        check_same_tokenizer(smaller, tokenizer, texts)
