"""A gradient that is not finite is skipped, counted, and at last kept with its batch, whose bad rows a replay names."""

import dataclasses
import math
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.batch import Judged, Pairs, Sequences
from glm_jax.config import PRESETS, GLMConfig
from glm_jax.model import CausalLM, init_model
from glm_jax.optim import OptimConfig
from glm_jax.sampler import Sampler
from glm_jax.scalar import init_scalar
from rlhf.cli import main
from rlhf.data.batches import shuffled
from rlhf.dpo import DPOConfig, LabelledPairs, train_dpo
from rlhf.ppo import Models
from rlhf.ppo_iteration import Iteration, make_iteration
from rlhf.ppo_loop import train_ppo
from rlhf.progress import Journal, SavingConfig, find
from rlhf.recipe import Recipe, RewardRecipe
from rlhf.replay import replay
from rlhf.reward import RewardConfig, train_reward
from rlhf.runlog import Position
from rlhf.sft import SFTConfig, train_sft
from rlhf.stage_keeper import Training
from rlhf.stop import Stop
from rlhf.trials.models import STOP_IDS, place_model, place_scorer, prompts, tiny
from rlhf.trials.ppo import PLAIN
from sharding.errors import UserError
from sharding.layout import Layout

Told = list[tuple[int, dict[str, float]]]


@pytest.fixture(autouse=True)
def mesh() -> Any:
    with jax.set_mesh(Layout().mesh()):
        yield


def sequences(count: int, seed: int) -> Sequences:
    ids = np.random.default_rng(seed).integers(1, 50, (count, 8), dtype=np.int32)
    target = np.ones_like(ids, bool)
    target[:, 0] = False
    return Sequences(ids, np.ones_like(ids, bool), target)


def journal(directory: Path, max_skipped: int) -> Journal:
    found = find(directory, pytest.fail)
    return Journal(directory, found, SavingConfig(), Position, Stop(), max_skipped)


def report_to(told: Told) -> Any:
    return lambda step, metrics, tokens: told.append((step, dict(metrics)))


def test_an_update_is_skipped_then_kept_and_its_row_named(small: GLMConfig, tmp_path: Path) -> None:
    config = RewardConfig(steps=20, batch_size=4)
    recipe = RewardRecipe(output_dir=tmp_path, devices=1, model=small, reward=config, max_skipped=1)
    weight = np.ones(12, np.float32)
    weight[5] = np.nan
    rows = Judged(Pairs(sequences(12, 0), sequences(12, 1)), weight)
    told: Told = []
    model = jax.jit(lambda: init_scalar(small, Layout(), jax.random.key(0)))()
    batches = shuffled(rows, 4, 0)
    with (
        journal(tmp_path, 1).keeper(
            Training("reward", {"batches": batches}, 0), Layout()
        ) as keeper,
        pytest.raises(UserError, match="after max_skipped = 1 such updates were left out") as error,
    ):
        train_reward(model, config, batches, Layout(), report_to(told), keeper=keeper)
    skipped = [step for step, metrics in told if metrics == {"skipped": 1.0}]
    assert len(skipped) == 1
    assert all(math.isfinite(x["loss"]) for step, x in told if step not in skipped)
    fault = tmp_path / "faults" / f"reward-{len(told) + 1}"
    assert f"glm-jax replay RECIPE {fault} names the rows" in str(error.value)
    found = replay(recipe, fault)
    assert found.weights == []
    ((kind, number, loss, _),) = found.rows
    with np.load(fault / "batch.npz") as batch:
        assert (kind, number) == ("row", int(np.flatnonzero(np.isnan(batch["weight"]))[0]))
    assert math.isnan(loss)


def test_weights_that_are_no_numbers_are_named(
    small: GLMConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SFTConfig(steps=3, batch_size=4)
    model: CausalLM = jax.jit(lambda: init_model(small, Layout(), jax.random.key(0)))()
    model.trunk.final_norm = model.trunk.final_norm.at[3].set(jnp.inf)
    batches = shuffled(sequences(8, 0), 4, 0)
    with (
        journal(tmp_path, 0).keeper(Training("sft", {"batches": batches}, 0), Layout()) as keeper,
        pytest.raises(UserError, match="sft: the gradient of update 1 is not finite"),
    ):
        train_sft(model, config, batches, Layout(), report_to([]), keeper)
    path = tmp_path / "recipe.py"
    path.write_text(
        "from pathlib import Path\nfrom glm_jax.config import GLMConfig\nfrom rlhf.recipe import Recipe\n"
        f"config = Recipe(devices=8, layout='tp', model={small!r})\n"
    )
    assert main(["replay", str(path), str(tmp_path / "faults" / "sft-1")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights: trunk.final_norm holds what is no number"
    assert [line.split(":")[0] for line in lines[1:]] == ["row 0", "row 1", "row 2", "row 3"]


def test_a_pair_of_dpo_is_named(small: GLMConfig, tmp_path: Path) -> None:
    config = DPOConfig(steps=2, batch_size=4, sft_batch_size=4, optim=OptimConfig())
    ref_logp = np.full((4, 2), -9.0, np.float32)
    ref_logp[2, 1] = np.nan
    pairs = LabelledPairs(Pairs(sequences(4, 0), sequences(4, 1)), ref_logp)
    model = jax.jit(lambda: init_model(small, Layout(), jax.random.key(0)))()
    rows = sequences(8, 2)
    with (
        journal(tmp_path, 0).keeper(Training("dpo", {}, 0), Layout()) as keeper,
        pytest.raises(UserError, match="dpo: the gradient of update 1 is not finite"),
    ):
        train_dpo(
            model,
            config,
            iter([pairs]),
            shuffled(rows, 4, 0),
            Layout(),
            report_to([]),
            keeper,
        )
    recipe = Recipe(devices=1, model=small, dpo=config)
    found = replay(recipe, tmp_path / "faults" / "dpo-1")
    assert [(kind, number) for kind, number, *_ in found.rows] == [("pair", 2)]


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_an_answer_of_ppo_is_named(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layout = dataclasses.replace(tiny(PRESETS["chatglm3-6b"]), num_layers=2), Layout()
    config = dataclasses.replace(PLAIN, iterations=3, epochs=2)
    kind = "advantages" if role == "actor" else "returns"

    def ill(*args: Any) -> Iteration:
        """Iterations, in each of which one answer has nothing that could be learnt from."""
        iterate = make_iteration(*args)

        def poisoned(*args: Any) -> Any:
            experience, *rest = iterate.experience_of(*args)
            bad = getattr(experience, kind).at[5].set(jnp.nan)
            return experience._replace(**{kind: bad}), *rest

        return dataclasses.replace(iterate, experience_of=poisoned)

    monkeypatch.setattr("rlhf.ppo_loop.make_iteration", ill)
    policy, scorer = place_model(model, layout), place_scorer(model, layout)
    batches = (prompts(model, f"prompts {number}", config.batch_size) for number in count())
    told: Told = []
    with (
        journal(tmp_path, 3).keeper(Training("ppo", {}, 0), layout) as keeper,
        pytest.raises(UserError, match="after max_skipped = 3 such updates were left out") as error,
    ):
        train_ppo(
            Models(policy, scorer, policy, scorer),
            config,
            batches,
            (sequences(8, number) for number in count()),
            np.zeros(config.batch_size, np.float32),
            Sampler(model, config.sampling, STOP_IDS, layout),
            STOP_IDS[0],
            jax.random.key(0),
            layout,
            report_to(told),
            keeper=keeper,
        )
    ((number, metrics),) = told
    # one of the two updates of each epoch has the answer in it
    assert (number, metrics["updates"], metrics["skipped"]) == (1, 4.0, 2.0)
    assert all(map(math.isfinite, metrics.values()))
    (fault,) = (tmp_path / "faults").iterdir()
    step = int(fault.name.split("-")[1])
    assert fault.name == f"ppo-{step}-{role}" and step in (7, 8)
    assert f"ppo: the gradient of update {step} of the {role} is not finite" in str(error.value)
    assert isinstance(model, GLMConfig)
    found = replay(Recipe(devices=1, model=model, ppo=config), fault)
    assert found.weights == []
    name = f"[0].{kind}" if role == "actor" else kind
    with np.load(fault / "batch.npz") as batch:
        (place,) = np.flatnonzero(np.isnan(batch[name]).all(axis=1))
    assert [(kind, number) for kind, number, *_ in found.rows] == [("answer", int(place))]


def test_a_folder_that_holds_no_update_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a folder below faults/ of a run"):
        replay(Recipe(devices=1), tmp_path)
