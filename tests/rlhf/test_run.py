"""What cannot run is refused in one line, before any work."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from glm_jax.config import GLMConfig
from glm_jax.continuous import RolloutConfig
from rlhf.cli import main
from rlhf.data.reviews.reviews import ReviewsData
from rlhf.recipe import Recipe
from rlhf.run import run
from rlhf.runlog import RunLog
from rlhf.sft import SFTConfig
from sharding.errors import UserError

ONE = Recipe(devices=1)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(devices=16, layout="dp"), "asks for 16 devices but 8 exist"),
        (Recipe(devices=6, layout="pp_dp_tp"), "needs a multiple of 4 devices but has 6"),
        (Recipe(devices=8, layout="ddp"), "unknown layout 'ddp'"),
        (
            Recipe(devices=8, layout="dp", sft=SFTConfig(batch_size=30)),
            r"sft.batch_size = 30 .* multiple of 8",
        ),
        (
            Recipe(devices=8, layout="tp", model=GLMConfig(64, 32, 3, 4, 2, 8, 64)),
            r"model.num_heads = 4 does not divide over tensor 8: sizes that would work are 1, 2, 4",
        ),
        (
            dataclasses.replace(ONE, generation_layout="1x2x1x1"),
            r"--layout 1x2x1x1: layout \(data 2\) needs 2 devices but has 1",
        ),
        (
            dataclasses.replace(ONE, data=ReviewsData(pos=Path("nowhere.txt"))),
            r"nowhere.txt: cannot be read",
        ),
        (dataclasses.replace(ONE, pretrained=Path("nowhere")), r"cannot read nowhere"),
        (
            dataclasses.replace(ONE, length=9000),
            r"length = 9000 tokens exceed the context of model.max_length = 8192",
        ),
        (
            dataclasses.replace(ONE, prompt_length=8000),
            r"max_new_tokens \+ 1 = 8257 tokens exceed the context",
        ),
        (
            Recipe(devices=8, layout="dp", rollout=RolloutConfig(slots=12)),
            r"rollout.slots = 12 does not divide over 8 batch shards",
        ),
        (
            dataclasses.replace(ONE, prompt_length=300, rollout=RolloutConfig(slots=8)),
            r"prompts of 300 tokens are longer than the last of rollout.buckets = \(32, 64, 128, 256\)",
        ),
    ],
)
def test_one_line_names_what_cannot_run(recipe: Recipe, message: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, output_dir=tmp_path)
    with (
        RunLog(tmp_path, Console(file=io.StringIO())) as log,
        pytest.raises(UserError, match=message) as error,
    ):
        run(recipe, log)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "summary.json").exists()


def test_what_cannot_run_leaves_an_earlier_run_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "run"
    earlier.mkdir()
    (earlier / "metrics.jsonl").write_text("{}\n")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from pathlib import Path\nfrom rlhf.recipe import Recipe\n"
        f"config = Recipe(output_dir=Path({str(earlier)!r}))\n"
    )
    assert main(["run", str(recipe), "--layout", "dp", "--sft.batch-size", "30"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in earlier.iterdir()] == ["metrics.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.py", "run"]
