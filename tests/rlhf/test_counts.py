"""Every count of a recipe says what 0 is, before anything runs: an error that names it, or a stage that is left out."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import pytest

from glm_jax.config import CHATGLM3_6B, CHATGLM_6B
from glm_jax.continuous import RolloutConfig
from glm_jax.generate import SamplingConfig
from rlhf.cli import main
from rlhf.data.files.files import FilesData
from rlhf.data.filter_config import Endpoint
from rlhf.data.oracle.oracle import OracleData
from rlhf.data.public import PublicData
from rlhf.data.reviews.reviews import ReviewsData
from rlhf.dpo import DPOConfig
from rlhf.ppo import PPOConfig
from rlhf.recipe import Recipe, RewardRecipe, remarks
from rlhf.run import Run
from rlhf.sft import SFTConfig, train_sft
from rlhf.trials.models import place_model, tiny
from sharding.errors import UserError
from sharding.fingerprint import fingerprint
from sharding.layout import Layout

RECIPE = Path(__file__).with_name("tiny_recipe.py")
# 0 means something there: nothing, never, all, or a stage that is left out
ZERO_IS_A_VALUE = {
    "critic_warmup",
    "eval_every",
    "every",
    "every_iterations",
    "doctor_every",
    "gmask_id",
    "halvings",
    "keep_best",
    "mask_id",
    "max_skipped",
    "min_intention",
    "min_prompt_chars",
    "min_semantics",
    "num_samples",
    "samples",  # of SelectionConfig; of others not, see below
    "seed",
    "sop_id",
    "steps",  # of SFT and DPO
    "top_k",
}
ZERO_IS_AN_ERROR = {("PPOConfig", "samples"), ("DPOConfig", "samples"), ("RewardConfig", "steps")}


def configs() -> Iterator[Any]:
    """An instance of every dataclass of a recipe."""
    several: list[Any] = [RewardRecipe(), CHATGLM_6B, CHATGLM3_6B, RolloutConfig(slots=2)]
    several += [FilesData(), PublicData("hh-rlhf", Path()), ReviewsData(), OracleData()]
    todo, seen = [Recipe(), Endpoint("http://x", "y"), *several], set[type]()
    while todo:
        config = todo.pop()
        if type(config) in seen and not isinstance(config, RolloutConfig):
            continue
        seen.add(type(config))
        yield config
        values = (getattr(config, field.name) for field in dataclasses.fields(config))
        todo += [value for value in values if dataclasses.is_dataclass(value)]


def counts() -> Iterator[Any]:
    """(instance, field) of every whole number."""
    for config in configs():
        for name, hint in typing.get_type_hints(type(config)).items():
            if int in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not tuple:
                yield pytest.param(config, name, id=f"{type(config).__name__}.{name}")


COUNTS = list(counts())


def test_the_counts_of_all_parts_of_a_recipe_are_looked_at() -> None:
    found = {param.id for param in COUNTS}
    wanted = (
        "SFTConfig.steps DPOConfig.prompts PPOConfig.epochs RewardConfig.pack_length Recipe.devices"
    )
    wanted += (
        " EvaluateConfig.num_prompts SavingConfig.keep_last SamplingConfig.top_k KLConfig.horizon"
    )
    wanted += (
        " SelectionConfig.samples GLMConfig.num_layers GLMV1Config.num_heads OracleData.prompts"
    )
    assert set(wanted.split()) <= found and len(found) > 60


@pytest.mark.parametrize(("config", "name"), COUNTS)
def test_a_count_below_its_least_value_is_named(config: Any, name: str) -> None:
    zero_fits = name in ZERO_IS_A_VALUE and (type(config).__name__, name) not in ZERO_IS_AN_ERROR
    # the seed of data is a part of a text that is hashed
    any_fits = name == "seed" and not isinstance(config, Recipe | RewardRecipe)
    for value in (-1, 0):
        if any_fits or (value == 0 and zero_fits):
            dataclasses.replace(config, **{name: value})
            continue
        with pytest.raises(UserError, match=rf"\b{name} = {value}\b"):
            dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--sft.batch-size", "sft.batch_size = 0 is out of range: give 1 or more"),
        ("--reward.steps", "reward.steps = 0 is out of range: give 1 or more"),
        ("--ppo.iterations", "ppo.iterations = 0 is out of range: give 1 or more"),
        ("--ppo.minibatches", "ppo.minibatches = 0 is out of range: give 1 or more"),
        ("--dpo.prompts", "dpo.prompts = 0 is out of range: give 1 or more"),
        ("--evaluate.num-prompts", "evaluate.num_prompts = 0 is out of range: give 1 or more"),
        ("--max-prompts", "max_prompts = 0 is out of range: give 1 or more"),
        ("--length", "length = 0 is out of range: give 1 or more"),
        ("--devices", "devices = 0 is out of range: give 1 or more"),
        ("--model.num-kv-groups", "model.num_kv_groups = 0 is out of range: give 1 or more"),
        ("--data.prompts", "data.prompts = 0 is out of range: give 2 or more"),
    ],
)
def test_a_run_of_nothing_ends_before_it_begins(
    option: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["run", str(RECIPE), option, "0", "--output-dir", str(out)]) == 1
    assert capsys.readouterr().err == f"glm-jax: error: {line}\n"
    assert not out.exists()


@pytest.mark.parametrize("size", [-8, 0])
def test_a_batch_of_nothing_divides_over_no_layout(size: int) -> None:
    with pytest.raises(UserError, match=rf"--batch-size = {size} is out of range"):
        Layout(data=4).check_batch(size, "--batch-size")


def test_without_sft_updates_the_model_is_what_it_was() -> None:
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        model = place_model(tiny(CHATGLM3_6B), layout)
        found = train_sft(model, SFTConfig(steps=0), iter(()), layout, Mock())
        assert fingerprint(found) == fingerprint(model)


@pytest.mark.parametrize("steps", [0, 5])
def test_dpo_without_updates_is_left_out(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[set[str]] = []

    class Short(Run):
        def __init__(self) -> None:
            self.recipe = Recipe(dpo=DPOConfig(steps=steps))
            self.log = self.progress = self.layout = self.directory = Mock()

        def evaluate(self, policies: Any) -> Any:
            evaluated.append(set(policies))
            raise LookupError

    for name in ("judge", "load_data", "train_sft", "make_samplers", "train_dpo"):
        monkeypatch.setattr(Short, name, Mock())
    for name in ("reward_model", "train_ppo"):
        monkeypatch.setattr(Short, name, Mock(return_value=(Mock(), {})))
    short = Short()
    with pytest.raises(LookupError):
        short.run()
    assert evaluated == [{"sft", "ppo", "dpo"} if steps else {"sft", "ppo"}]
    assert short.train_dpo.called == bool(steps)  # type: ignore[attr-defined]
    told = [call.args[0] for call in short.log.note.call_args_list]  # type: ignore[attr-defined]
    assert any("dpo.steps = 0: DPO is left out" in line for line in told) == (not steps)


def _recipe(room: int, **fields: Any) -> Recipe:
    sampling = SamplingConfig(max_new_tokens=room)
    stages = {"ppo": PPOConfig(sampling=sampling), "dpo": DPOConfig(sampling=sampling)}
    return Recipe(length=64, prompt_length=16, **{**stages, **fields})


def test_answers_longer_than_the_reward_models_training_are_named(tmp_path: Path) -> None:
    assert remarks(_recipe(47)) == []  # 16 + 47 and the appended stop token
    ppo, dpo = remarks(_recipe(48))
    for line, stage in ((ppo, "ppo"), (dpo, "dpo")):
        assert line.startswith(
            f"{stage}: prompt_length + {stage}.sampling.max_new_tokens + 1 = 65 tokens are more than length = 64"
        )
    assert len(remarks(_recipe(48, dpo=DPOConfig(sampling=SamplingConfig(47))))) == 1
    left_out, only = remarks(_recipe(48, dpo=DPOConfig(steps=0)))
    assert "DPO is left out" in left_out and only == ppo

    # a reward model from elsewhere: its run's recipe says what it was trained on
    model = tmp_path / "checkpoints" / "reward"
    model.mkdir(parents=True)
    elsewhere = _recipe(48, reward_model=model)
    assert remarks(elsewhere) == []
    (tmp_path / "recipe.json").write_text(json.dumps({"length": 40}))
    ppo, dpo = remarks(elsewhere)
    assert f"= 65 tokens are more than length of {tmp_path / 'recipe.json'} = 40" in ppo
    (tmp_path / "recipe.json").write_text(json.dumps({"length": 80}))
    assert remarks(elsewhere) == []
    for damaged in ("[]", "{", '{"length": null}'):
        (tmp_path / "recipe.json").write_text(damaged)
        assert remarks(elsewhere) == []


def test_a_stage_that_is_left_out_is_named() -> None:
    assert remarks(_recipe(8, sft=SFTConfig(steps=0))) == [
        "sft.steps = 0: SFT is left out, PPO and DPO start from the model as it is"
    ]
