"""The doctor passes what is healthy, and names every bug that is planted in PPO."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_jax.sampler
import rlhf.advantages
import rlhf.losses
import rlhf.ppo
import rlhf.ppo_iteration
from glm_jax.attention import Sight
from glm_jax.batch import Sequences
from glm_jax.config import PRESETS
from glm_jax.generate import SamplingConfig
from glm_jax.metrics import Metrics
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.sampler import Loan, Sampler
from glm_jax.train import TrainState
from glm_jax.trunk import Cache, Trunk
from rlhf.cli import main
from rlhf.doctor.checks import OF_ROLLOUT, OF_UPDATE
from rlhf.doctor.doctor import Doctor
from rlhf.doctor.evidence import Setting
from rlhf.doctor.finding import Finding
from rlhf.kl import KLConfig
from rlhf.ppo import PPOConfig
from rlhf.ppo_iteration import Listener
from rlhf.trials.models import ANSWER, STOP_IDS, tiny
from rlhf.trials.ppo import PLAIN, small_ppo
from sharding.errors import UserError
from sharding.layout import Layout

CONFIG = dataclasses.replace(tiny(PRESETS["chatglm3-6b"]), num_layers=2)
Patch = pytest.MonkeyPatch
ROWS = PLAIN.batch_size
OPTIMIZERS = (make_optimizer(OptimConfig(learning_rate=5e-3), 8),) * 2

NUCLEUS = dataclasses.replace(
    PLAIN, sampling=SamplingConfig(max_new_tokens=ANSWER, temperature=0.7, top_p=0.8)
)
WHITENED = dataclasses.replace(PLAIN, whiten=True)
GROUPS = dataclasses.replace(
    PLAIN,
    advantage="rloo",
    samples=4,
    truncated="penalty",
    kl=KLConfig(coef=0.1, log_ratio_clip=0.01),
)
CUT = Layout(data=2, accumulate=2)


def examined(
    config: PPOConfig,
    layout: Layout = Layout(),
    score_scale: float = 1.0,
    **illness: Any,
) -> dict[str, Finding]:
    """What two iterations of a tiny model show; all but `config` and `layout` are ways to be ill."""
    with jax.set_mesh(layout.mesh()):
        iterate, models, learners, inputs = small_ppo(CONFIG, config, OPTIMIZERS, layout, **illness)
        models.reward.w_scalar = models.reward.w_scalar * score_scale
        doctor = Doctor(iterate, Setting(config, STOP_IDS, STOP_IDS[0], 1e-4, False), strict=False)
        for step in range(2):
            try:
                learners, _, _ = doctor(learners, models, inputs(step), jax.random.key(step))
            except (RuntimeError, ValueError):
                if "start" not in illness:  # the planted bug has freed an array
                    raise
                break
    return doctor.findings


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.status == "fail"}


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (PLAIN, Layout()),
        (NUCLEUS, Layout()),
        pytest.param(WHITENED, CUT, marks=pytest.mark.slow),
        (GROUPS, Layout(fsdp=2, tensor=2)),
    ],
)
def test_a_healthy_run_passes(config: PPOConfig, layout: Layout) -> None:
    findings = examined(config, layout)
    assert not failed(findings), findings
    assert findings.keys() == OF_ROLLOUT.keys() | OF_UPDATE.keys()
    skipped = {name for name, finding in findings.items() if finding.status == "skip"}
    expected = set() if config.sampling.truncates else {"support"}
    assert skipped == expected | (set() if config.advantage == "gae" else {"values"})


def test_the_doctor_stops_a_run_before_anything_is_learnt(monkeypatch: Patch) -> None:
    _reward_one_token_early(monkeypatch)
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        iterate, models, learners, inputs = small_ppo(CONFIG, PLAIN, OPTIMIZERS, layout)
        unused = Mock()
        iterate = dataclasses.replace(iterate, update_actor=unused, update_critic=unused)
        doctor = Doctor(iterate, Setting(PLAIN, STOP_IDS, STOP_IDS[0], 1e-4, False), strict=True)
        line = r"shaped rewards: .* the score belongs on its last one"
        with pytest.raises(UserError, match=line):
            doctor(learners, models, inputs(0), jax.random.key(0))
    unused.assert_not_called()


class Lenient(Listener):
    """Leaves every update out whose gradient is not finite."""

    def __init__(self) -> None:
        self.left_out: list[tuple[int, str]] = []

    def skip(self, update: int, role: str, model: Any, batch: Any) -> bool:
        self.left_out.append((update, role))
        return True


def test_an_update_may_be_left_out_while_the_doctor_looks() -> None:
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        iterate, models, learners, inputs = small_ppo(CONFIG, PLAIN, OPTIMIZERS, layout)

        def not_finite(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            return state, {"grad_norm": jnp.float32(jnp.nan), "loss": jnp.float32(jnp.nan)}

        iterate = dataclasses.replace(iterate, update_critic=not_finite)
        doctor = Doctor(iterate, Setting(PLAIN, STOP_IDS, STOP_IDS[0], 1e-4, False), strict=False)
        listener, key = Lenient(), jax.random.key(0)
        _, figures, _ = doctor(learners, models, inputs(0), key, True, listener)
    assert listener.left_out == [(1, "critic"), (2, "critic")]
    assert figures["skipped"] == 2.0 and all(map(math.isfinite, figures.values()))
    assert failed(doctor.findings) == {"learning"}  # the critic did not learn, which is true


# bugs; each says where it was seen or what it would do to a user


def _rewards_in_integers(patch: Patch) -> None:
    """Scores below 1 become 0."""
    shaped = rlhf.advantages.shaped_rewards
    patch.setattr(
        rlhf.ppo, "shaped_rewards", lambda *x: shaped(*x).astype(jnp.int32).astype(jnp.float32)
    )


def _nth_temperature(patch: Patch, number: int) -> None:
    """The `number`-th log-probabilities that are traced are at temperature 1: policy, reference, update."""
    right, calls = rlhf.ppo.token_logprobs, itertools.count()

    def token_logprobs(logits: Any, ids: Any, temperature: float, support: Any) -> Any:
        return right(logits, ids, 1.0 if next(calls) == number else temperature, support)

    patch.setattr(rlhf.ppo, "token_logprobs", token_logprobs)


def _positions_jump(patch: Patch) -> None:
    """Decoding goes on counting at the column, as if the prompt had no padding on its left."""
    prefill = Trunk.prefill

    def jumping(self: Trunk, ids: Any, real: Any, room: int, layout: Layout) -> Any:
        hidden, cache = prefill(self, ids, real, room, layout)
        column = jnp.full_like(cache.position, ids.shape[1] - 1)
        assert isinstance(cache, Cache)
        return hidden, cache._replace(position=column)

    patch.setattr(Trunk, "prefill", jumping)


def _attention_to_padding(patch: Patch) -> None:
    """Whole sequences see their padding."""

    def mask(self: Sight) -> Any:
        length = self.segments.shape[1]
        reach = jnp.tril(jnp.ones((length, length), bool))[None]
        return jnp.broadcast_to(reach, (len(self.segments), length, length))

    patch.setattr(Sight, "mask", mask)


def _mask_shifted(patch: Patch) -> None:
    """The response mask begins one token late and ends one token late."""
    generate = glm_jax.sampler.generate

    def shifted(*args: Any, **settings: Any) -> Any:
        found = generate(*args, **settings)
        target = jnp.pad(found.sequences.target[:, :-1], ((0, 0), (1, 0)))
        return found._replace(sequences=found.sequences._replace(target=target))

    patch.setattr(glm_jax.sampler, "generate", shifted)


def _mean_of_means(patch: Patch) -> None:
    """Every accumulated piece divides by its own number of tokens."""
    masked_mean = rlhf.losses.masked_mean

    def own_count(values: Any, mask: Any, count: Any = None) -> Any:
        return masked_mean(values, mask) / CUT.accumulate

    patch.setattr(rlhf.losses, "masked_mean", own_count)


def _whitened_by_shard(patch: Patch) -> None:
    """Each half of the batch has its own mean and deviation."""
    whitened = rlhf.advantages.whitened

    def by_shard(advantages: Any, mask: Any) -> Any:
        halves = [slice(0, ROWS // 2), slice(ROWS // 2, ROWS)]
        return jnp.concatenate([whitened(advantages[half], mask[half]) for half in halves])

    patch.setattr(rlhf.ppo, "whitened", by_shard)


def _no_stop_token(patch: Patch) -> None:
    """Answers that were cut off are scored at their last token."""
    patch.setattr(
        rlhf.ppo,
        "with_stop",
        lambda sequences, *_: jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), sequences),
    )


def _whole_vocabulary_in_training(patch: Patch) -> None:
    """The nucleus is for the rollout only."""
    patch.setattr(rlhf.ppo, "support_of", lambda *_: None)


def _reward_one_token_early(patch: Patch) -> None:
    """The score stands on the token before the last one."""
    last_token = rlhf.advantages.last_token
    patch.setattr(
        rlhf.advantages,
        "last_token",
        lambda mask: jnp.pad(last_token(mask)[:, 1:], ((0, 0), (0, 1))),
    )


def _values_late(patch: Patch) -> None:
    """The critic has seen the token that its value is the baseline of."""
    patch.setattr(rlhf.ppo, "aligned", lambda values: values)


def _answers_of_other_prompts(patch: Patch) -> None:
    """K samples are laid out one round of prompts after the other, and grouped as if they were not."""
    patch.setattr(
        rlhf.ppo_iteration,
        "repeated",
        lambda rows, count: jax.tree.map(lambda x: np.concatenate([np.asarray(x)] * count), rows),
    )


def _kl_as_reward(patch: Patch) -> None:
    """The policy is paid for moving away."""
    shaped = rlhf.advantages.shaped_rewards
    patch.setattr(
        rlhf.ppo,
        "shaped_rewards",
        lambda scores, logp, ref_logp, *rest: shaped(scores, ref_logp, logp, *rest),
    )


def _gae_beyond_the_end(patch: Patch) -> None:
    """The value after the last token is bootstrapped from padding."""

    def gae(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> Any:
        everywhere = jnp.ones_like(mask)
        advantages, returns = rlhf.advantages.gae(rewards, values, everywhere, gamma, lam)
        return jnp.where(mask, advantages, 0.0), jnp.where(mask, returns, 0.0)

    patch.setattr(rlhf.ppo, "gae", gae)


def _stale_weights(patch: Patch) -> None:
    """Rollouts are those of the first policy."""
    first: list[Any] = []

    @contextmanager
    def lend(self: Sampler, policy: Any) -> Iterator[Loan]:
        if not first:
            first.append(jax.tree.map(jnp.copy, self.enter(policy)))
        loan = Loan(first[0])
        yield loan
        loan.policy = policy

    patch.setattr(Sampler, "lend", lend)


def _rows_mixed_up(patch: Patch) -> None:
    """A minibatch has the old log-probabilities of other answers."""
    take_rows = rlhf.ppo.take_rows

    def mixed(experience: Any, index: Any) -> Any:
        rows = take_rows(experience, index)
        return rows._replace(logp=rows.logp[::-1])

    patch.setattr(rlhf.ppo_iteration, "take_rows", mixed)


def _negative_kl(patch: Patch) -> None:
    """The exact KL with its arguments' logarithms the wrong way round."""
    token_kl = rlhf.ppo.token_kl
    patch.setattr(rlhf.ppo, "token_kl", lambda *x: -token_kl(*x))


def _score_beside_the_answer(patch: Patch) -> None:
    """The score is read in the last column, padding or not."""

    def last_column(model: Any, sequences: Sequences, layout: Layout) -> Any:
        return rlhf.ppo.apply_scalar(model, sequences.ids, sequences.valid, layout)[:, -1]

    patch.setattr(rlhf.ppo, "sequence_scores", last_column)


def _aliased(model: Any, optimizer: Any) -> TrainState:
    return TrainState(jnp.int32(0), model, jax.jit(optimizer.init)(model))


def nothing(_: Patch) -> None:
    """The bug is in what `examined` is told."""


WIDER = SamplingConfig(max_new_tokens=ANSWER, temperature=0.7)
HOTTER = SamplingConfig(max_new_tokens=ANSWER, temperature=1.0)
BUGS: dict[str, tuple[Callable[[Patch], None], dict[str, Any], set[str]]] = {
    "rewards in an integer array": (_rewards_in_integers, {}, {"shaped rewards"}),
    "the reference at another temperature": (
        lambda patch: _nth_temperature(patch, 1),
        {},
        {"KL at the start"},
    ),
    "the update at another temperature": (lambda patch: _nth_temperature(patch, 2), {}, {"ratio"}),
    "rollouts at another temperature": (
        nothing,
        {"sampling": HOTTER},
        {"rollout log-probabilities"},
    ),
    "positions that count left padding": (_positions_jump, {}, {"rollout log-probabilities"}),
    "attention to padding": (_attention_to_padding, {}, {"padding"}),
    "a response mask that is off by one": (_mask_shifted, {}, {"response mask"}),
    "a mean of means under accumulation": (
        _mean_of_means,
        {"layout": CUT},
        {"loss normalisation"},
    ),
    "whitening by shard": (
        _whitened_by_shard,
        {"config": WHITENED},
        {"advantages"},
    ),
    "no stop token to be scored at": (_no_stop_token, {}, {"scores"}),
    "top-p in the rollout only": (
        _whole_vocabulary_in_training,
        {"config": NUCLEUS},
        {"support", "rollout log-probabilities"},
    ),
    "top-p in training only": (
        nothing,
        {"config": NUCLEUS, "sampling": WIDER},
        {"rollout log-probabilities"},
    ),
    "the reward on the wrong token": (_reward_one_token_early, {}, {"shaped rewards"}),
    "a reference that shares the policy's memory": (
        nothing,
        {"start": _aliased},
        {"frozen models"},
    ),
    "values one token late": (_values_late, {}, {"values"}),
    "answers grouped with those of other prompts": (
        _answers_of_other_prompts,
        {"config": GROUPS},
        {"shaped rewards"},
    ),
    "a KL that is paid for": (_kl_as_reward, {}, {"shaped rewards"}),
    "GAE beyond the end": (_gae_beyond_the_end, {}, {"advantages"}),
    "stale weights in the rollout": (_stale_weights, {}, {"rollout log-probabilities"}),
    "minibatch rows mixed up": (_rows_mixed_up, {}, {"ratio"}),
    "a negative KL": (_negative_kl, {}, {"KL estimators"}),
    "a score read beside the answer": (_score_beside_the_answer, {}, {"scores"}),
    "a stop token that sampling does not know": (
        nothing,
        {"stop_ids": STOP_IDS[:1]},
        {"response mask"},
    ),
    "a reward model that says the same of all": (nothing, {"score_scale": 0.0}, {"reward scale"}),
    "scores far beyond the clamp": (nothing, {"score_scale": 1000.0}, {"reward scale"}),
}
QUICK = {
    "rewards in an integer array",
    "the reference at another temperature",
    "a response mask that is off by one",
    "a reference that shares the policy's memory",
    "top-p in the rollout only",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in BUGS]
)
def test_a_planted_bug_is_named(name: str, monkeypatch: Patch) -> None:
    plant, illness, expected = BUGS[name]
    plant(monkeypatch)
    findings = examined(**{"config": PLAIN, **illness})
    assert expected <= failed(findings), findings
    assert all(findings[check].advice for check in expected)


RECIPE = """
import dataclasses
from pathlib import Path

from rlhf.recipe_file import load_recipe

oracle, _ = load_recipe(Path({oracle!r}))
config = dataclasses.replace(oracle, output_dir=Path({out!r}))
"""


@pytest.mark.slow
def test_the_command_examines_a_recipe_and_its_exit_status_says_how_it_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.py"
    oracle = Path(__file__).parents[2] / "configs" / "oracle.py"
    recipe.write_text(RECIPE.format(oracle=str(oracle), out=str(tmp_path / "run")))
    assert main(["doctor", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("response mask", "padding", "frozen models"))
    assert not (tmp_path / "run" / "checkpoints").exists()  # nothing is kept
    assert main(["doctor", str(recipe), "--ppo.score-clip", "0.0001"]) == 1
    cells = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "reward scale fail" in cells and "raise ppo.score_clip" in cells


def test_a_recipe_of_a_reward_model_has_no_ppo_to_examine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from rlhf.recipe import RewardRecipe\nconfig = RewardRecipe(devices=8)\n")
    assert main(["doctor", str(recipe)]) == 1
    assert "has no PPO to check" in capsys.readouterr().err
