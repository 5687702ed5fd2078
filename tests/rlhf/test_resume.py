"""A run that was stopped, wherever, ends in the bits of one that was not."""

import dataclasses
import io
import json
import random
import re
import runpy
import shlex
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import sharding.snapshots
from glm_jax.batch import Sequences
from glm_jax.config import GLMConfig
from glm_jax.keeper import Keeper
from glm_jax.model import init_model
from glm_jax.weights import host_weights
from rlhf.data.batches import shuffled
from rlhf.ppo_run import MOMENTS
from rlhf.progress import Journal, SavingConfig, find
from rlhf.recipe import Recipe
from rlhf.recipe_file import load_recipe
from rlhf.run import run
from rlhf.runlog import Position, RunLog
from rlhf.sft import SFTConfig, train_sft
from rlhf.stage_keeper import Training
from rlhf.stop import Stop, Stopped
from sharding.errors import UserError
from sharding.layout import get_layout

runs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("runs.py"))))


class StopAt(Stop):
    """Asks to stop at the `point`-th moment at which a run could; None: never."""

    def __init__(self, point: int | None) -> None:
        super().__init__()
        self.point = point

    def asked(self) -> bool:
        self._points += 1
        return self._points == self.point


def go_on(recipe: Recipe, point: int | None = None) -> str:
    """Where a run, or what is left of one, stopped."""
    directory = recipe.output_dir
    found = find(directory, pytest.fail)
    with RunLog(directory, Console(file=io.StringIO()), found.position) as log:
        journal = Journal(directory, found, recipe.saving, log.position, StopAt(point))
        try:
            run(recipe, log, journal)
        except Stopped as stopped:
            return str(stopped)
    return "done"


def recipe_in(directory: Path) -> Recipe:
    """The tiny recipe."""
    directory.mkdir()
    recipe: Recipe
    recipe, _ = load_recipe(runs.RECIPE)
    return dataclasses.replace(recipe, output_dir=directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped."""
    recipe = recipe_in(tmp_path_factory.mktemp("whole") / "run")
    assert go_on(recipe) == "done"
    return recipe.output_dir


# moments from where the run goes on to where it stops, and what it says there
STOPS = [
    (3, "at sft 3"),
    (6 + 5, "at reward 5"),
    (4 + 3 + 1 + 2 + 3, "at ppo 2"),  # the first two iterations are watched, the third has begun
    (2 + 1 + 5 + 1 + 1 + 3 + 1 + 2, "at dpo 2"),
]


def test_a_run_stopped_in_every_stage_ends_in_the_same_bits(whole: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "run")
    for point, where in STOPS:
        assert go_on(recipe, point) == where
    assert go_on(recipe) == "done"
    assert runs.bits(recipe.output_dir) == runs.bits(whole)


def test_what_is_kept_for_good_is_every_second_and_the_best(whole: Path) -> None:
    by_stage: dict[str, dict[int, dict[str, Any]]] = {}
    for line in runs.metrics(whole):
        by_stage.setdefault(line["stage"], {})[line["step"]] = line
    for stage, metric, moments in (
        ("reward", "heldout_accuracy", 1),
        ("ppo", "reward", MOMENTS),
        ("sft", "none", 1),
    ):
        kept = {int(path.name): path for path in (whole / "state" / stage).iterdir()}
        worths = {step: line.get(metric) for step, line in by_stage[stage].items()}
        for number, path in kept.items():
            noted = json.loads((path / "facts" / "metadata").read_text())
            assert noted["worth"] == worths[number // moments]
        # snapshots are made of every second update, and of every iteration
        saved = [step for step in worths if moments > 1 or step % 2 == 0]
        known = [step for step in saved if worths[step] is not None]
        best = max(known, key=lambda step: (worths[step], step), default=saved[-1])
        expected = {*(step for step in saved if step % 2 == 0), best}
        assert kept.keys() == {step * moments for step in expected}, stage
    assert [step for step, line in by_stage["reward"].items() if "heldout_accuracy" in line] == [
        3,
        6,
        8,
    ]


@pytest.mark.slow
def test_a_run_stopped_at_every_moment_ends_in_the_same_bits(whole: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "run")
    stops, point = list[str](), 1
    while (where := go_on(recipe, point)) not in ("done", "after evaluate"):
        # a stage that begins anew comes to the same moment again
        point = point + 1 if where.endswith("begins anew") else 1
        stops.append(where)
    assert len(stops) > 50
    assert runs.bits(recipe.output_dir) == runs.bits(whole)


# place of killed.py -> at which of its next visits a run is killed at most, and how many seconds after
PLACES = {
    "step": (6, 0.05),
    "rollout": (2, 0.3),
    "snapshot": (3, 0.1),
    "commit": (3, 0.02),
    "checkpoint": (1, 0.1),
    "journal": (2, 0.01),
    "export": (1, 0.05),
    "exported": (1, 0.0),
    "evaluate": (4, 0.3),
}
# so that none of them is behind the run when its turn comes
FIRST = ("journal", "step", "commit", "snapshot", "checkpoint", "step", "rollout")
THEN = ("snapshot", "commit", "step", "export", "exported", "evaluate")
RUNS, KILLS = 5, 60


def test_a_run_killed_in_a_save_and_then_told_to_end_ends_in_the_same_bits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the command of a requeued job, which has --restart, in a folder spelt with dots."""
    monkeypatch.setenv("GLM_JAX_SUBMISSION", "monday")
    recipe = recipe_in(tmp_path / "run")
    cache = tmp_path / "programs"
    (tmp_path / "deep" / "elsewhere").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    spelt = tmp_path / "link" / "elsewhere" / ".." / ".." / "run"
    assert runs.kill(spelt, cache, "commit", 1, 0.0, ["--restart"])
    run = runs.start(spelt, cache, ["--restart"])
    deadline = time.monotonic() + 300
    while all(line["stage"] == "sft" for line in runs.metrics(recipe.output_dir)):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    run.terminate()
    output = runs.finished(run)
    assert "glm-jax: stopped " in output
    (command,) = re.findall(r"everything is saved. Resume with: (glm-jax run .*)\n$", output)
    assert shlex.split(command)[2:] == [str(runs.RECIPE), "--output-dir", str(spelt)]
    assert "--restart: this submission (monday) has begun the run: it resumes" in output
    assert not (tmp_path / "run.1").exists()
    assert go_on(recipe) == "done"
    assert runs.bits(recipe.output_dir) == runs.bits(whole)


@pytest.mark.slow
def test_runs_killed_anywhere_end_in_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """Whole runs, each killed in every stage, at random moments of every place."""
    rng, cache = random.Random(0), tmp_path / "programs"
    kills = Counter[str]()
    for number in range(RUNS):
        directory = tmp_path / f"run-{number}"
        for place in (*FIRST, *THEN):
            visits, seconds = PLACES[place]
            moment = rng.randint(1, visits), rng.uniform(0.0, seconds)
            kills[place] += runs.kill(directory, cache, place, *moment)
        runs.finished(runs.start(directory, cache))
        assert runs.bits(directory) == runs.bits(whole), (number, kills)
        shutil.rmtree(directory)
    assert kills.total() >= KILLS, kills
    assert all(kills[place] for place in PLACES), kills


@pytest.mark.slow
def test_equal_runs_write_equal_files_wherever(whole: Path, tmp_path: Path) -> None:
    directories = tmp_path / "one", tmp_path / "another folder" / ".." / "zwei %20"
    directories[1].parent.parent.mkdir()
    for directory in directories:
        runs.finished(runs.start(directory, tmp_path / "programs"))
    one, other = (runs.contents(directory.resolve()) for directory in directories)
    assert {"recipe.json", "report.html"} <= one.keys()
    assert one == other
    assert runs.bits(directories[0]) == runs.bits(whole)


def train_six(
    config: GLMConfig,
    directory: Path,
    layout_name: str,
    point: int | None = None,
    tell: Callable[[str], None] = pytest.fail,
    every: int = 0,
    report: Callable[[int], None] = lambda _: None,
) -> dict[str, np.ndarray] | None:
    """Weights after six updates of SFT, each of which is reported, or None where they were stopped."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (24, 16), dtype=np.int32)
    rows = Sequences(ids, np.ones_like(ids, bool), np.ones_like(ids, bool))
    rows.target[:, 0] = False
    layout = get_layout(layout_name, 1 if layout_name == "single" else 8)
    found = find(directory, tell)
    journal = Journal(directory, found, SavingConfig(), Position, StopAt(point))
    batches = shuffled(rows, 8, 0)
    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(init_model, config, layout))(jax.random.key(0))
        with journal.keeper(Training("sft", {"batches": batches}, every), layout) as keeper:
            try:
                six = SFTConfig(steps=6, batch_size=8)
                model = train_sft(
                    model, six, batches, layout, lambda step, *_: report(step), keeper
                )
            except Stopped:
                return None
        return host_weights(model, layout)


@pytest.fixture(scope="module")
def six_updates(
    small: GLMConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Weights that were trained on one device without a stop."""
    found = train_six(small, tmp_path_factory.mktemp("six"), "single")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [("single", "fsdp_tp"), ("2x1x1x4:circular", "single"), ("tp", "2x1x2x2:gpipe")],
)
def test_a_training_goes_on_under_another_layout(
    before: str,
    after: str,
    small: GLMConfig,
    six_updates: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    assert train_six(small, tmp_path, before, 3) is None
    resumed = train_six(small, tmp_path, after)
    assert resumed is not None
    for name, weights in six_updates.items():
        np.testing.assert_allclose(resumed[name], weights, rtol=0, atol=1e-5, err_msg=name)


def test_a_training_does_not_wait_for_a_slow_disk(
    small: GLMConfig,
    six_updates: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The snapshot of update 4 is not finished before update 6 is."""
    may_finish, seal = threading.Event(), sharding.snapshots.seal
    snapshot = tmp_path / "state" / "sft" / "4"

    def slow(directory: Path) -> None:
        assert may_finish.wait(120), "the training waits for the snapshot"
        seal(directory)

    def report(step: int) -> None:
        assert not snapshot.exists()
        if step == 6:
            may_finish.set()

    monkeypatch.setattr(sharding.snapshots, "seal", slow)
    weights = train_six(small, tmp_path, "single", every=4, report=report)
    assert weights is not None and snapshot.exists()
    for name, expected in six_updates.items():
        np.testing.assert_array_equal(weights[name], expected, err_msg=name)


def test_a_damaged_journal_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "journal.json").write_text('{"stages": ')
    with pytest.raises(UserError, match=r"cannot read .*journal.json .*: --restart begins anew"):
        find(tmp_path, print)


def test_a_log_that_has_lost_lines_is_one_clear_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, Console(file=io.StringIO())) as log:
        journal = Journal(tmp_path, find(tmp_path, print), SavingConfig(), log.position, Stop())
        with log.stage("sft") as stage:
            stage.step(1, {"loss": 1.0})
        journal.finish("sft")
    assert find(tmp_path, print).history == {"sft": [{"step": 1, "loss": 1.0}]}
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(
        UserError, match=r"cannot go on with .*metrics.jsonl \(0 bytes instead of \d+\)"
    ):
        find(tmp_path, print)


def test_a_run_does_not_go_on_with_other_contents(tmp_path: Path) -> None:
    def journal() -> Journal:
        return Journal(tmp_path, find(tmp_path, print), SavingConfig(), Position, Stop())

    journal().require_same("data", "a")
    journal().require_same("data", "a")
    with pytest.raises(UserError, match="data holds other contents than when the run began"):
        journal().require_same("data", "b")


def test_where_every_snapshot_is_damaged_the_stage_begins_anew(
    small: GLMConfig, six_updates: dict[str, np.ndarray], tmp_path: Path
) -> None:
    assert train_six(small, tmp_path, "single", 3) is None
    (tmp_path / "state" / "sft" / "3" / "seal.json").unlink()
    told: list[str] = []
    assert find(tmp_path, told.append).stage is None
    assert told == [f"{tmp_path}/state/sft/3 was never finished and is not used: it has no seal"]
    again = train_six(small, tmp_path, "single", tell=told.append)
    assert again is not None
    for name, weights in six_updates.items():
        np.testing.assert_array_equal(again[name], weights, err_msg=name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own takes the right to mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_with_room_the_run_goes_on(
    small: GLMConfig, six_updates: dict[str, np.ndarray], small_disk: Path
) -> None:
    assert train_six(small, small_disk, "single", 2) is None
    room = shutil.disk_usage(small_disk).free
    filler = small_disk / "filler"
    filler.write_bytes(bytes(room - 100_000))
    with pytest.raises(UserError, match="the disk is full: make room or write elsewhere"):
        train_six(small, small_disk, "single", 2)
    filler.unlink()
    assert find(small_disk, pytest.fail).step == 2
    again = train_six(small, small_disk, "single")
    assert again is not None
    for name, weights in six_updates.items():
        np.testing.assert_array_equal(again[name], weights, err_msg=name)


def test_nothing_is_kept_by_default() -> None:
    keeper = Keeper()
    keeper.keep({}, 3)
    assert keeper.restore(lambda: 5) == 5
    assert (keeper.facts, keeper.count) == (None, 0)
