"""Errors that can be known before the first step end the run there, and a corrected command starts."""

import importlib.util
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from glm_jax.checkpoint import Card, load_model, load_scalar, save_model
from glm_jax.config import GLMConfig, Head
from glm_jax.hf.config import Tokens, default_form
from glm_jax.scalar import INIT
from glm_jax.tokenizers import ChatGLM3Tokenizer
from rlhf.cli import main
from sharding.layout import Layout

RECIPE = """
import dataclasses
from pathlib import Path
from glm_jax.config import GLMConfig
from glm_jax.generate import SamplingConfig
from rlhf.data.files.files import FilesData
from rlhf.dpo import DPOConfig
from rlhf.evaluate import EvaluateConfig
from rlhf.ppo import PPOConfig
from rlhf.recipe import Recipe
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig

folder = Path({folder!r})
sampling = SamplingConfig(max_new_tokens=6)
config = Recipe(
    output_dir=folder / "run",
    data=FilesData(folder / "sft", folder / "pairs", heldout_fraction=0.3),
    model=GLMConfig(300, 32, 2, 2, 1, 16, 48, max_length=64),
    length=40,
    prompt_length=24,
    sft=SFTConfig(steps=2, batch_size=8),
    reward=RewardConfig(steps=2, batch_size=8),
    ppo=PPOConfig(iterations=2, batch_size=8, minibatches=2, sft_batch_size=8, sampling=sampling),
    dpo=DPOConfig(steps=2, batch_size=8, sft_batch_size=8, sampling=sampling),
    evaluate=EvaluateConfig(judge="oracle", num_prompts=4, batch_size=8),
)
"""
TEXTS = [f"say {n} good things" for n in range(300)]


class Reached(Exception):
    """The first step is about to be made."""


def tokenizer(texts: list[str] = TEXTS, size: int = 300) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.train(texts, size)


def saved(directory: Path, head: Head, texts: list[str] = TEXTS, max_length: int = 64) -> Path:
    layout, made = Layout(), tokenizer(texts)
    config = GLMConfig(300, 32, 2, 2, 1, 16, 48, max_length=max_length)
    card = Card(config, default_form(config), Tokens(made.eos_id, made.pad_id))
    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(INIT[head], config, layout))(jax.random.key(0))
        save_model(model, layout, card, directory, made.save)
    return directory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a recipe, its data and models; nothing is trained."""
    asked = [{"prompt": f"say {n}", "response": f"{n} good things"} for n in range(60)]
    sides = [("good", "bad and poor"), ("bad and poor", "good")]  # lengths balance in any unit
    pairs = [
        {"prompt": f"say {n}", "chosen": sides[n % 2][0], "rejected": sides[n % 2][1]}
        for n in range(60)
    ]
    for name, lines in (("sft", asked), ("pairs", pairs)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "recipe.py").write_text(RECIPE.format(folder=str(tmp_path)))

    def reach(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr("rlhf.run.Run.train_sft", reach)
    return tmp_path


def start(folder: Path, *options: str) -> int:
    return main(["run", str(folder / "recipe.py"), *options])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path, text: str) -> Callable[[], None]:
    """Append to a file; returns what takes it back."""
    before = path.read_text()
    path.write_text(before + text)
    return lambda: void(path.write_text(before))


def void(_: object) -> None:
    """Nothing."""


OPTIONS = {
    "layout": (["--layout", "nonsense"], "unknown layout"),
    "sft batch": (["--sft.batch-size", "9", "--layout", "dp"], "sft.batch_size = 9"),
    "reward batch": (["--reward.batch-size", "9", "--layout", "dp"], "reward.batch_size = 9"),
    "dpo batch": (["--dpo.batch-size", "9", "--layout", "dp"], "dpo.batch_size = 9"),
    "dpo sft batch": (["--dpo.sft-batch-size", "9", "--layout", "dp"], "dpo.sft_batch_size = 9"),
    "ppo batch": (["--ppo.batch-size", "9"], "ppo.batch_size = 9"),
    "ppo minibatches": (["--ppo.minibatches", "3"], "ppo.minibatches = 3"),
    "ppo sft batch": (["--ppo.sft-batch-size", "9", "--layout", "dp"], "ppo.sft_batch_size = 9"),
    "evaluate batch": (["--evaluate.batch-size", "9", "--layout", "dp"], "evaluate.batch_size = 9"),
    "length": (["--length", "65"], "length = 65 tokens exceed the context"),
    "answers": (["--dpo.sampling.max-new-tokens", "64"], "= 89 tokens exceed the context"),
    "pairs too long": (["--length", "3"], "no record fits into length = 3 tokens"),
    "prompts too long": (["--prompt-length", "3"], "no record fits into prompt_length = 3"),
    "vocabulary": (["--model.vocab-size", "20000"], "cannot make a vocabulary of 20000"),
    "no data": (["--data.sft", "nowhere"], "nowhere: cannot be read"),
    "no pretrained": (["--pretrained", "nowhere"], "cannot read "),
    "no reward model": (["--reward-model", "nowhere"], "cannot read "),
}
# errors that only the data in the folder can show
OF_DATA = ("pairs too long", "prompts too long", "vocabulary", "no data")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_field_is_told_before_the_first_step(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = OPTIONS[name]
    if "dp" in options:
        options = [*options, "--devices", "8"]
    assert start(folder, *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    if name not in OF_DATA:
        assert not (folder / "run").exists()
        return
    with pytest.raises(Reached):
        start(folder)
    assert not (folder / "run.1").exists()


@pytest.mark.parametrize("table", ["sft", "pairs"])
def test_a_wrong_record_is_told_and_mended_in_its_file(
    table: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe stays the same, and its data changes."""
    undo = append(folder / table, '\n{"prompt": 1}')
    assert start(folder) == 1
    error = capsys.readouterr().err
    assert f"{folder / table}:61" in error and error.count("\n") == 1
    undo()
    append(folder / "sft", '\n{"prompt": "say more", "response": "more things"}')
    with pytest.raises(Reached):
        start(folder)
    assert not (folder / "run.1").exists()


def test_a_model_that_cannot_serve_is_told_before_the_first_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language = saved(folder / "language", Head.VOCABULARY)
    scorer = saved(folder / "scorer", Head.SCALAR)
    short = saved(folder / "short", Head.SCALAR, max_length=20)
    other = saved(folder / "other", Head.SCALAR, [f"quite other words {n}" for n in range(300)])
    partly = saved(folder / "partly", Head.VOCABULARY)
    cut(partly / "weights" / "trunk.embedding" / "0.0")
    bare = saved(folder / "bare", Head.VOCABULARY)
    for file in (bare / "hf").iterdir():
        file.unlink()
    with_language = ["--pretrained", str(language)]
    for options, message in (
        (["--reward-model", str(language)], "holds a language model, which scores nothing"),
        (["--reward-model", str(short)], "prompt_length + ppo.sampling.max_new_tokens + 1 = 31"),
        ([*with_language, "--reward-model", str(other)], "in other tokens than the policy's"),
        (["--pretrained", str(scorer)], "holds a scalar head"),
        (["--pretrained", str(partly)], "trunk.embedding/0.0 has "),
        (["--pretrained", str(bare)], "no tokenizer in "),
    ):
        assert start(folder, *options) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    with pytest.raises(Reached):
        start(folder, *with_language, "--reward-model", str(scorer))
    assert not (folder / "run.1").exists()


def test_a_judge_that_is_not_installed_is_told_before_the_folder_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *x: None if name == "snownlp" else find(name, *x)
    )
    assert start(folder, "--evaluate.judge", "snownlp") == 1
    assert "evaluate.judge = snownlp needs the snownlp package" in capsys.readouterr().err
    assert not (folder / "run").exists()
    with pytest.raises(Reached):
        start(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_every_model_is_loaded_to_compute_as_the_recipe_says(
    folder: Path, dtype: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run and in the doctor's, whose models come from its folder or from elsewhere."""
    language, scorer = saved(folder / "language", Head.VOCABULARY), folder / "scorer"
    options = ["--pretrained", str(language), "--model.compute-dtype", dtype]
    if elsewhere:
        saved(scorer, Head.SCALAR)
        options += ["--reward-model", str(scorer)]
    else:
        saved(folder / "run" / "checkpoints" / "sft", Head.VOCABULARY)
        saved(folder / "run" / "checkpoints" / "reward", Head.SCALAR)
    seen: list[Any] = []

    def look(*models: Any, **named: Any) -> None:
        seen.extend([*models, *named.values()])
        raise Reached

    monkeypatch.setattr("rlhf.doctor.visit.Models", look)
    with pytest.raises(Reached):
        main(["doctor", str(folder / "recipe.py"), *options])
    if elsewhere:
        monkeypatch.setattr("rlhf.run.Run.train_sft", lambda run: run.load_model())
        monkeypatch.setattr("rlhf.run.Run.train_ppo", look)
        with pytest.raises(Reached):
            start(folder, *options)
    models = [model for model in seen if hasattr(model, "trunk")]
    assert len(models) == (6 if elsewhere else 4)
    assert {model.trunk.config.compute_dtype for model in models} == {dtype}


@pytest.mark.parametrize("load", [load_model, load_scalar])
def test_no_loader_has_a_dtype_of_its_own(load: Any) -> None:
    parameter = inspect.signature(load).parameters["compute_dtype"]
    assert parameter.default is inspect.Parameter.empty
