"""The command: reading a recipe, overriding its fields, and what a user sees when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf.cli import main
from rlhf.progress import Progress
from rlhf.recipe import Recipe
from rlhf.recipe_file import load_recipe, override
from rlhf.runlog import RunLog
from sharding.errors import UserError
from sharding.layout import Layout, use_devices

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "configs" / "demo.py"


def write_recipe(directory: Path, text: str) -> Path:
    path = directory / "recipe.py"
    path.write_text(f'"""What this recipe is for."""\nfrom rlhf.recipe import Recipe\n{text}\n')
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path,
        f"from pathlib import Path\nconfig = Recipe(seed=3, output_dir=Path({str(tmp_path / 'run')!r}))",
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that came to be run; nothing is trained."""
    seen: list[Recipe] = []

    def run(recipe: Recipe, log: RunLog, progress: Progress) -> dict[str, Any]:
        seen.append(recipe)
        with log.stage("sft", total=1) as stage:
            stage.step(1, {"loss": 1.5})
        return {"seed": recipe.seed, "wall_s": log.wall_s}

    monkeypatch.setattr("rlhf.recipe.check", lambda recipe: None)
    monkeypatch.setattr("rlhf.run.run", run)
    return seen


def fail(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what stands on stderr."""
    try:
        status = main(arguments)
    except SystemExit as stop:  # tyro
        status = int(str(stop.code))
    return status, capsys.readouterr().err


def test_run_overrides_fields_and_reports(
    recipe: Path, tmp_path: Path, runs: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "second"
    options = ["--output-dir", str(out), "--layout", "dp", "--ppo.batch_size", "16"]
    assert main(["run", str(recipe), *options, "--model.no-qkv-bias"]) == 0
    (config,) = runs
    assert config.seed == 3  # of the recipe file
    assert (config.output_dir, config.layout) == (out, "dp")
    assert (config.ppo.batch_size, config.model.qkv_bias) == (16, False)
    assert json.loads((out / "recipe.json").read_text())["ppo"]["batch_size"] == 16
    assert (out / "metrics.jsonl").read_text().count("\n") == 1
    screen = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in screen
    assert "Seed: 3" in screen
    assert (out / "report.html").exists()


def test_a_second_run_goes_on_or_keeps_the_first(
    recipe: Path, tmp_path: Path, runs: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output-dir", str(tmp_path / "out")]
    for _ in range(2):
        assert main(["run", str(recipe), *options, "--seed", "1"]) == 0
    assert "going on from the beginning" in capsys.readouterr().out
    status, error = fail("run", str(recipe), *options, "--seed", "2", capsys=capsys)
    assert (status, error.count("\n")) == (1, 1)
    assert "holds a run of another recipe (seed: 1 -> 2)" in error
    assert main(["run", str(recipe), *options, "--seed", "2", "--restart"]) == 0
    assert f"kept the earlier run: {tmp_path / 'out'} is now" in capsys.readouterr().out
    seeds = [
        json.loads((tmp_path / d / "recipe.json").read_text())["seed"] for d in ("out.1", "out")
    ]
    assert seeds == [1, 2]


def test_a_finished_run_prints_its_summary_again(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Recipe] = []

    def run(recipe: Recipe, log: RunLog, progress: Progress) -> dict[str, Any]:
        seen.append(recipe)
        (recipe.output_dir / "summary.json").write_text(json.dumps({"seed": recipe.seed}))
        progress.finish("evaluate")
        return {"seed": recipe.seed}

    monkeypatch.setattr("rlhf.recipe.check", lambda recipe: None)
    monkeypatch.setattr("rlhf.run.run", run)
    command = ["run", str(recipe), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    before = capsys.readouterr().out
    assert main(command) == 0
    again = capsys.readouterr().out
    assert again == f"the run is finished, nothing is left to do; --restart begins anew\n{before}"
    assert len(seen) == 1


def test_only_a_run_goes_on_with_one(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["doctor", str(recipe)], ["replay", str(recipe), "fault"]):
        assert fail(*command, "--resume", capsys=capsys)[0] == 2


@pytest.mark.parametrize("field", ["--ppo.bach-size", "--ppo.bach_size"])
def test_a_misspelt_field_exits_with_2_and_names_the_nearest(
    field: str, recipe: Path, runs: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([field, "16"], [f"{field}=16"]):
        status, error = fail("run", str(recipe), *options, capsys=capsys)
        assert status == 2
        assert field in error
        assert "--ppo.batch-size" in error
    assert fail("run", str(recipe), "--sede", "1", capsys=capsys)[0] == 2
    assert fail("rnu", str(recipe), capsys=capsys)[0] == 2
    status, error = fail("run", str(recipe), "--seed", "one", capsys=capsys)
    assert status == 2
    assert "--seed" in error
    assert not runs


def test_help_of_every_level(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in {
        ("--help",): ["run", "Run a recipe"],
        ("run", "--help"): ["configs/demo.py", "override"],
        ("run", str(recipe), "--help"): [
            "What this recipe is for.",  # the docstring of the file
            "--seed INT",
            "--output-dir PATH",
            "--ppo.batch-size INT",
            "answers an iteration",  # the comment beside the field
            "--debug",
        ],
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(part in text for part in expected), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = Recipe()", "recipe.py: no `config`: a recipe ends in"),
        ("config = 3", "recipe.py: config is a int: make it a rlhf.recipe.Recipe"),
        ("config = Recipe(sede=1)", "recipe.py:3: TypeError: "),
        ("config = Recipe(", "recipe.py:3: '(' was never closed"),
        ("import no_such_module", "recipe.py:3: ModuleNotFoundError: "),
    ],
)
def test_a_bad_recipe_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = fail("run", str(write_recipe(tmp_path, text)), capsys=capsys)
    assert status == 1
    assert error.startswith("glm-jax: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_errors_are_one_line_unless_debug(
    recipe: Path, tmp_path: Path, runs: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail("run", "missing.py", capsys=capsys) == (
        1,
        f"glm-jax: error: recipe {Path('missing.py').absolute()}: no such file\n",
    )
    (tmp_path / "file").write_text("mine")
    options = ["--output-dir", str(tmp_path / "file")]
    status, error = fail("run", str(recipe), *options, capsys=capsys)
    assert (status, error.count("\n")) == (1, 1)
    assert "is a file" in error
    status, debug = fail("run", str(recipe), *options, "--debug", capsys=capsys)
    assert status == 1
    assert debug.startswith("Traceback")
    assert debug.endswith(error)
    # refused by the dataclass that the field belongs to
    status, error = fail("run", str(recipe), "--model.num-heads", "3", capsys=capsys)
    assert (status, error.count("\n")) == (1, 1)
    assert "model.num_heads = 3" in error


def test_interrupted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(recipe: Recipe, log: RunLog, progress: Progress) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.recipe.check", lambda recipe: None)
    monkeypatch.setattr("rlhf.run.run", run)
    status, error = fail("run", str(recipe), capsys=capsys)
    assert (status, error.count("\n")) == (130, 1)


def test_a_device_that_fails_is_one_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(recipe: Recipe, log: RunLog, progress: Progress) -> dict[str, Any]:
        raise jax.errors.JaxRuntimeError("INTERNAL: the chip\nis gone")

    monkeypatch.setattr("rlhf.recipe.check", lambda recipe: None)
    monkeypatch.setattr("rlhf.run.run", run)
    status, error = fail("run", str(recipe), capsys=capsys)
    assert (status, error.count("\n")) == (1, 1)
    assert (
        "failed (INTERNAL: the chip is gone). Resume from the last snapshot with: glm-jax" in error
    )


def test_a_field_of_several_types_keeps_the_recipes_choice(tmp_path: Path) -> None:
    text = (
        "from pathlib import Path\nfrom rlhf.data.files.files import FilesData\n"
        "config = Recipe(data=FilesData(Path('a'), Path('b'), Path('c')))"
    )
    config, description = load_recipe(write_recipe(tmp_path, text))
    assert description == "What this recipe is for."
    changed, *_ = override(config, ["--data.sft", "d"], prog="glm-jax", description="")
    assert changed.data.sft == Path("d").absolute()
    assert changed.data.preferences == Path("b").absolute()
    assert type(changed) is Recipe


def test_devices_are_set_before_jax_counts_them(tmp_path: Path) -> None:
    text = (
        "import jax, sys\nfrom pathlib import Path\nimport rlhf.recipe, rlhf.run\nfrom rlhf.cli import main\n"
        "def run(recipe, log, progress):\n    print('devices', len(jax.devices()))\n    return {}\n"
        "rlhf.recipe.check = lambda recipe: None\nrlhf.run.run = run\nsys.exit(main())"
    )
    recipe = write_recipe(tmp_path, "config = Recipe()")
    options = ["--devices", "3", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", text, "run", str(recipe), *options],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "devices 3\n" in done.stdout


def test_devices_that_cannot_be(tmp_path: Path) -> None:
    use_devices(None)
    with pytest.raises(UserError, match="--devices 0: give a positive number"):
        use_devices(0)
    count = len(jax.devices())
    with pytest.raises(UserError, match="JAX has counted its devices already"):
        use_devices(count + 1)


def test_help_does_not_wait_for_jax() -> None:
    text = (
        "import sys\nfrom rlhf.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0


def test_the_cost_of_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, report = Layout(data=8), tmp_path / "cost.json"
    with jax.set_mesh(layout.mesh()):
        x = layout.put(np.ones((16, 32), np.float32))
        weights = jax.device_put(
            jnp.ones((3, 32, 32)), NamedSharding(layout.mesh(), PartitionSpec())
        )

        def loss(weights: jax.Array) -> jax.Array:
            return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

        text = jax.jit(jax.grad(loss)).lower(weights).compile().as_text()
    assert text is not None
    path = tmp_path / "f.hlo"
    path.write_text(text)
    assert main(["cost", str(path), "--json", str(report)]) == 0
    screen = capsys.readouterr().out
    found = json.loads(report.read_text())
    # forward, and two products backward, of the two rows of a device
    assert found["flops"] == 3 * 3 * 2 * 2 * 32 * 32
    assert sorted(loop["trips"] for loop in found["while_loops"]) == [3, 3]
    reduced = [x for x in found["collectives"] if x["kind"] == "all-reduce" and x["group"] == 8]
    assert sum(x["times"] * x["sent_bytes"] for x in reduced) == 2 * (3 * 32 * 32 * 4) * 7 // 8
    assert f"on 8 devices: of each {found['flops']:,} FLOPs of products" in screen
    assert main(["cost", str(tmp_path / "absent.hlo")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_the_demo_recipe_is_one() -> None:
    config, description = load_recipe(DEMO)
    assert isinstance(config, Recipe)
    assert description
