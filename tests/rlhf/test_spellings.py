"""Every command that takes a folder takes any spelling of it."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from glm_jax.checkpoint import Card, save_model
from glm_jax.config import GLMConfig
from glm_jax.hf.config import Form, Tokens
from glm_jax.model import init_model
from glm_jax.scalar import init_scalar
from glm_jax.tokenizers import ChatGLM3Tokenizer
from rlhf.cli import main
from rlhf.recipe import Recipe
from sharding.layout import Layout
from sharding.snapshots import Snapshots

LAYOUT = Layout()
HOME = "a home 100% é#?"  # where the folder lies
SPELLINGS: dict[str, Callable[[Path, str], str]] = {
    "absolute": lambda home, name: f"{home}/{name}",
    "relative": lambda home, name: name,
    "dots": lambda home, name: f"empty/../{name}",
    "absolute dots": lambda home, name: f"{home}/../{HOME}/{name}",
    "dots behind a link": lambda home, name: f"elsewhere/../{name}",  # not home/name
    "through a link": lambda home, name: f"link/{name}",
    "slashes": lambda home, name: f".//{name}//",
    "home": lambda home, name: f"~/{name}",
}
# slow commands are tried by default in the two spellings that no library opens by itself
RARE = ["dots behind a link", "home"]
EASY = [pytest.param(name, marks=pytest.mark.slow) for name in SPELLINGS if name not in RARE]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a Hugging Face directory, and pairs."""
    home = tmp_path_factory.mktemp("spellings") / HOME
    (home / "empty").mkdir(parents=True)
    (home / "link").symlink_to(home)
    # behind it, `..` is another folder, which has the same
    (home.parent / "else" / "where").mkdir(parents=True)
    (home / "elsewhere").symlink_to(home.parent / "else" / "where")
    texts = [f"say {n} good things" for n in range(300)]
    tokenizer = ChatGLM3Tokenizer.train(texts, 300)
    config = GLMConfig(300, 32, 2, 2, 1, 16, 48, max_length=64)
    card = Card(config, Form.CHATGLM3, Tokens(tokenizer.eos_id, tokenizer.pad_id))
    with jax.set_mesh(LAYOUT.mesh()):
        model = jax.jit(partial(init_model, config, LAYOUT))(jax.random.key(0))
        scorer = jax.jit(partial(init_scalar, config, LAYOUT))(jax.random.key(0))
        for name, saved in (("sft", model), ("reward", scorer)):
            path = home / "run" / "checkpoints" / name
            save_model(saved, LAYOUT, card, path, tokenizer.save)
        with Snapshots(home / "run" / "state" / "sft") as snapshots:
            snapshots.save(3, {"model": model}, {})
    assert main(["export", f"{home}/run/checkpoints/sft", f"{home}/hf"]) == 0
    pairs = [
        {"prompt": f"say {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)
    ]
    (home / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for name in ("run", "hf", "pairs.jsonl"):
        (home.parent / "else" / name).symlink_to(home / name)
    return home


@pytest.fixture
def spelt(
    home: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """The spelling of the test, of a name in `home`, where the test is."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    return partial(SPELLINGS[request.param], home)


each = pytest.mark.parametrize("spelt", SPELLINGS, indirect=True)
rare = pytest.mark.parametrize("spelt", [*RARE, *EASY], indirect=True)


@rare
def test_commands_that_compute_nothing(
    spelt: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, hf, pairs = spelt("run/checkpoints/sft"), spelt("hf"), spelt("pairs.jsonl")
    for number, command in enumerate(
        (
            ["inspect", sft],
            ["inspect", hf],
            ["export", sft, spelt("new")],
            ["import", hf, spelt("new"), "--stream"],
            ["verify", hf, "--manifest"],
            ["checkpoint", "ls", spelt("run")],
            ["checkpoint", "show", sft],
            ["checkpoint", "show", spelt("run/state/sft/3")],
            ["checkpoint", "verify", spelt("run")],
            ["checkpoint", "prune", spelt("run")],
            ["checkpoint", "extract", spelt("run/state/sft/3"), spelt("new")],
            ["data", "stats", pairs, "--tokenizer", hf, "--json", spelt("new")],
            ["data", "filter", pairs, "--out", spelt("new"), "--tokenizer", hf],
            ["data", "convert", pairs, spelt("new")],
        )
    ):
        status = main(command)
        screen = capsys.readouterr()
        assert status == 0, (command, screen.err)
        made = Path(os.path.expanduser(spelt("new")))
        assert made.exists() == (spelt("new") in command)
        if made.exists():
            made.rename(tmp_path / str(number))


@rare
def test_commands_that_compute(
    spelt: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, reward, new = spelt("run/checkpoints/sft"), spelt("run/checkpoints/reward"), spelt("new")
    for number, command in enumerate(
        (
            ["generate", sft, "--prompt", "say 1", "--max-new-tokens", "3"],
            ["reward", "report", reward, spelt("pairs.jsonl"), "--out", new, "--length", "32"],
            ["checkpoint", "reshard", sft, new, "--layout", "single"],
            ["import", spelt("hf"), new],
        )
    ):
        status = main(command)
        screen = capsys.readouterr()
        assert status == 0, (command, screen.err)
        if new in command:
            Path(os.path.expanduser(new)).rename(tmp_path / str(number))


@each
def test_recipes(spelt: Callable[[str], str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders of a recipe and of its command line, whatever the current folder is later."""
    seen: list[Recipe] = []
    monkeypatch.setattr("rlhf.cli._run", lambda recipe, how: seen.append(recipe))
    text = (
        "from pathlib import Path\nfrom rlhf.recipe import Recipe\n"
        "from rlhf.data.files.files import FilesData\n"
        f"config = Recipe(output_dir=Path({spelt('out')!r}),\n"
        f"    data=FilesData(preferences=(Path({spelt('pairs.jsonl')!r}),)))\n"
    )
    (home / "recipe.py").write_text(text)
    link = home.parent / "else" / "recipe.py"
    link.unlink(missing_ok=True)
    link.symlink_to(home / "recipe.py")
    options = ["--pretrained", spelt("hf"), "--reward-model", spelt("run/checkpoints/reward")]
    assert main(["run", spelt("recipe.py"), *options]) == 0
    (recipe,) = seen
    monkeypatch.chdir("/")
    assert isinstance(recipe.data.preferences, tuple)  # type: ignore[union-attr]
    found = {
        "out": recipe.output_dir,
        "hf": recipe.pretrained,
        "run/checkpoints/reward": recipe.reward_model,
        "pairs.jsonl": recipe.data.preferences[0],  # type: ignore[union-attr]
    }
    for name, path in found.items():
        assert path is not None and ".." not in path.parts, path
        places = [home / name, home.parent / "else" / name]
        assert any(os.path.realpath(path) == os.path.realpath(place) for place in places)


@each
def test_library_calls_take_them_too(
    spelt: Callable[[str], str], home: Path, tmp_path: Path
) -> None:
    """`~` alone is of the command line."""
    from glm_jax.checkpoint import load_model

    path = Path(spelt("run/checkpoints/sft")).expanduser()
    with jax.set_mesh(LAYOUT.mesh()):
        model: Any = load_model(path, LAYOUT, "float32")
        with Snapshots(Path(spelt("snapshots")).expanduser()) as snapshots:
            snapshots.save(1, {"x": jnp.arange(3.0)}, {})
            snapshots.wait()
            assert snapshots.newest(pytest.fail) == 1
        (Path(spelt("snapshots")).expanduser()).rename(tmp_path / "snapshots")
    assert model.w_head.shape == (32, 300)
