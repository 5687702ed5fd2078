"""A reward model alone, by the command: trained, kept, graded; its checkpoint and export are graded alike."""

import json
import random
from pathlib import Path

import pytest

from rlhf import cli
from sharding.errors import UserError

RECIPE = """
from pathlib import Path
from glm_jax.config import GLMConfig
from glm_jax.optim import OptimConfig
from rlhf.data.files.files import FilesData
from rlhf.recipe import RewardRecipe
from rlhf.reward import RewardConfig

config = RewardRecipe(
    output_dir=Path({out!r}),
    data=FilesData(preferences=Path({data!r}), heldout_fraction=0.4),
    model=GLMConfig(320, 32, 2, 2, 1, 16, 48, max_length=64),
    length=40,
    reward=RewardConfig(
        steps=30, batch_size=8, pack_length=96, eval_every=15, optim=OptimConfig(learning_rate=5e-3)
    ),
)
"""


def write_pairs(path: Path) -> None:
    """A hundred prompts whose better answer holds the word 'good', in either place."""
    rng = random.Random(0)
    lines = []
    for number in range(100):
        fill = [f"thing {rng.randint(0, 9)}" for _ in range(2)]
        texts = [f"a good {fill[0]}", f"a poor {fill[1]}"]
        better = rng.randint(0, 1)
        line = {"prompt": f"say {number}", "responses": texts[:: 1 if better == 0 else -1]}
        lines.append(
            json.dumps({**line, "ranks": [1, 2] if better == 0 else [2, 1], "task": "say"})
        )
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    write_pairs(folder / "pairs.jsonl")
    recipe = RECIPE.format(out=str(folder / "run"), data=str(folder / "pairs.jsonl"))
    (folder / "recipe.py").write_text(recipe, encoding="utf-8")
    assert cli.main(["run", str(folder / "recipe.py")]) == 0
    return folder


def test_it_learns_what_is_easy_and_its_card_says_so(trained: Path) -> None:
    card = json.loads((trained / "run" / "card.json").read_text())
    summary = json.loads((trained / "run" / "summary.json").read_text())
    assert card["accuracy"]["value"] > 0.9
    assert summary["reward_model"]["accuracy"] == card["accuracy"]["value"]
    assert summary["reward_model"]["grade"] == card["verdict"]["grade"] == "good"
    assert card["tasks"]["rows"][0]["name"] == "say"
    assert card["position"]["judges"]["value"] == pytest.approx(0.5, abs=0.25)
    seen = [point["step"] for point in card["history"] if point["heldout_accuracy"] is not None]
    assert seen == [15, 30]
    assert (trained / "run" / "card.html").read_text().count("<img") >= 4


def test_checkpoint_and_export_are_graded_alike(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, exported = trained / "run" / "checkpoints" / "reward", trained / "hf"
    assert cli.main(["export", str(checkpoint), str(exported)]) == 0
    cards = []
    for number, model in enumerate((checkpoint, exported)):
        out = trained / f"card{number}"
        command = ["reward", "report", str(model), str(trained / "pairs.jsonl"), "--out", str(out)]
        assert cli.main([*command, "--length", "40"]) == 0
        cards.append(json.loads((out / "card.json").read_text()))
    assert cards[0].pop("history") and not cards[1].pop("history")
    for card in cards:
        card.pop("verdict")  # which may speak of the history
    assert cards[0] == cards[1]
    assert cards[0]["accuracy"]["count"] == 100
    out = trained / "whole context"  # 64 tokens
    command = ["reward", "report", str(checkpoint), str(trained / "pairs.jsonl")]
    assert cli.main([*command, "--out", str(out)]) == 0
    assert json.loads((out / "card.json").read_text())["accuracy"]["count"] == 100
    assert "report card:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "hhh"], "form 'hhh' is not known: choose one of pair, ranking"),
        (["--length", "65"], "--length = 65 tokens exceed the context of model.max_length = 64"),
        (["--length", "3"], "no record fits into length = 3 tokens"),
        (["--batch-size", "3", "--layout", "dp", "--devices", "8"], "--batch-size = 3"),
    ],
)
def test_wrong_options_are_one_clear_line(
    trained: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pairs = trained / "run" / "checkpoints" / "reward", trained / "pairs.jsonl"
    command = ["reward", "report", str(model), str(pairs), "--out", str(trained / "never")]
    assert cli.main([*command, *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (trained / "never").exists()


def test_a_language_model_scores_nothing(tmp_path: Path) -> None:
    from glm_jax.checkpoint import Card
    from glm_jax.config import GLMConfig
    from glm_jax.hf.config import Form, Tokens

    Card(GLMConfig(320, 32, 2, 2, 1, 16, 48), Form.CHATGLM3, Tokens(2, 0)).write(tmp_path)
    from glm_jax.checkpoint import load_scalar
    from sharding.layout import Layout

    with pytest.raises(UserError, match="holds a language model, which scores nothing"):
        load_scalar(tmp_path, Layout(), "float32")
