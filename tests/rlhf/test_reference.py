"""Reference answers and prompt selection; a reward model from elsewhere."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from glm_jax.batch import Prompts
from glm_jax.checkpoint import Card, save_model
from glm_jax.config import PRESETS, GLMConfig
from glm_jax.generate import SamplingConfig
from glm_jax.hf.config import Tokens, default_form
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.tokenizers import ChatGLM3Tokenizer, Tokenizer
from rlhf.data.batches import in_order
from rlhf.ppo import PPOConfig
from rlhf.reference import References, SelectionConfig, draw_references
from rlhf.reward_stage import load_reward
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


def _references(small: SmallPPO, samples: int, table: Prompts) -> References:
    return draw_references(
        small.models.reward,
        small.models.actor,
        small.iterate.sample,
        in_order(table, SETTINGS.batch_size),
        len(table.row),
        samples,
        SETTINGS,
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
    with jax.set_mesh(LAYOUT.mesh()):
        assert load_reward(same, tokenizer, texts, LAYOUT).w_scalar.shape == (32,)
        other = ChatGLM3Tokenizer.train((f"quite other words {n}" for n in range(300)), 300)
        theirs = _saved(tmp_path / "other", other)
        with pytest.raises(UserError, match=r"reads 'say 0 good things' in other tokens"):
            load_reward(theirs, tokenizer, texts, LAYOUT)
        fewer = ChatGLM3Tokenizer.train((f"say {n} good things" for n in range(300)), 295)
        smaller = _saved(tmp_path / "smaller", fewer)
        with pytest.raises(
            UserError, match=r"of the reward model's tokenizer is .* of the policy's"
        ):
            load_reward(smaller, tokenizer, texts, LAYOUT)
