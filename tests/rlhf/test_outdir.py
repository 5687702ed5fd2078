"""The folder of a run: new, moved aside, or gone on with."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.outdir import Resume, run_directory
from rlhf.recipe_file import resume_command
from rlhf.runlog import METRICS_FILE
from sharding.disk.lock import NAME as LOCK
from sharding.errors import UserError

RECIPE: dict[str, Any] = {"seed": 0, "sft": {"steps": 10, "batch_size": 8}, "output_dir": Path("a")}


def use(
    path: Path,
    recipe: dict[str, Any] = RECIPE,
    how: Resume = Resume(),
    note: Callable[[str], None] = pytest.fail,
) -> bool:
    """Whether a run goes on."""
    with run_directory(path, recipe, how, note) as resumed:
        return resumed


def make_run(path: Path, recipe: dict[str, Any] = RECIPE) -> None:
    """What a run leaves that can go on."""
    (path / "state").mkdir(parents=True)
    (path / "state" / "journal.json").write_text("{}")
    (path / METRICS_FILE).write_text("{}\n")
    (path / "recipe.json").write_text(json.dumps(recipe, default=str))


def test_a_run_that_cannot_go_on_moves_aside(tmp_path: Path) -> None:
    directory, notes = tmp_path / "runs" / "demo", list[str]()
    assert not use(directory)
    assert not use(directory)  # still empty: nothing to move
    for number in (1, 2):
        (directory / METRICS_FILE).write_text(f"run {number}\n")
        assert not use(directory, note=notes.append)
        assert [path.name for path in directory.iterdir()] == [LOCK]
        assert (tmp_path / f"runs/demo.{number}" / METRICS_FILE).read_text() == f"run {number}\n"
        assert notes[-1] == f"kept the earlier run: {directory} is now {directory}.{number}"


def test_a_run_of_the_same_recipe_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    elsewhere = RECIPE | {"output_dir": tmp_path}
    assert use(tmp_path / "run", elsewhere)
    assert use(tmp_path / "run", elsewhere, Resume(resume=True))


def test_a_recipe_with_paths_in_another_spelling_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", RECIPE | {"pretrained": "m", "data": {"files": ["d"]}})
    spellings = (Path("m"), tmp_path / "m", Path("elsewhere/../m"), tmp_path / "link" / "m")
    for path in spellings:
        same = {"pretrained": path, "data": {"files": (path.with_name("d"),)}}
        assert use(tmp_path / "run", RECIPE | same)
    other = RECIPE | {"pretrained": Path("elsewhere/m"), "data": {"files": (Path("d"), Path("e"))}}
    message = r"pretrained: m -> elsewhere/m; data.files: \['d'\] -> \['d', 'e'\]"
    with pytest.raises(UserError, match=message):
        use(tmp_path / "run", other)
    with pytest.raises(UserError, match="pretrained: m -> None"):
        use(tmp_path / "run", RECIPE | {"pretrained": None, "data": {"files": (Path("d"),)}})


def test_another_recipe_is_refused_with_its_fields(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    changed = RECIPE | {"sft": {"steps": 20, "batch_size": 8}, "seed": 1}
    with pytest.raises(UserError) as error:
        use(tmp_path / "run", changed)
    assert "(seed: 0 -> 1; sft.steps: 10 -> 20): --resume-with-changes goes on" in str(error.value)
    assert (tmp_path / "run" / METRICS_FILE).exists()
    notes: list[str] = []
    assert use(tmp_path / "run", changed, Resume(resume_with_changes=True), notes.append)
    assert notes == ["the recipe has changed: seed: 0 -> 1; sft.steps: 10 -> 20"]


def test_restart_keeps_the_run_aside(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    notes: list[str] = []
    assert not use(tmp_path / "run", RECIPE, Resume(restart=True), notes.append)
    assert (tmp_path / "run.1" / "state" / "journal.json").exists()
    assert len(notes) == 1


# environment of the first start and of the second -> whether --restart begins anew once more
SLURM = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "alps"}
REQUEUED = {"SLURM_RESTART_COUNT": "1"}
NAMED = {"GLM_JAX_SUBMISSION": "monday"}


@pytest.mark.parametrize(
    ("first", "second", "anew"),
    [
        ({}, {}, True),
        (SLURM, SLURM, True),  # a second command in one allocation
        (SLURM, SLURM | REQUEUED, False),
        (SLURM | REQUEUED, SLURM | {"SLURM_RESTART_COUNT": "2"}, False),
        (SLURM, {"SLURM_JOB_ID": "8", "SLURM_CLUSTER_NAME": "alps"} | REQUEUED, True),
        (SLURM, {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "jura"} | REQUEUED, True),
        ({}, SLURM | REQUEUED, True),  # begun by hand
        (NAMED, NAMED, False),
        (NAMED, NAMED | {"JOB_COMPLETION_INDEX": "0"}, False),
        (NAMED, {"GLM_JAX_SUBMISSION": "tuesday"}, True),
        (SLURM | NAMED, SLURM | REQUEUED | {"GLM_JAX_SUBMISSION": "tuesday"}, True),
    ],
)
def test_restart_begins_anew_once_a_submission(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: dict[str, str],
    second: dict[str, str],
    anew: bool,
) -> None:
    directory, notes = tmp_path / "run", list[str]()
    make_run(directory)
    for number, environment in enumerate((first, second, second)):
        for name in (*SLURM, *REQUEUED, *NAMED, "JOB_COMPLETION_INDEX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if number == 2:  # a requeue of the second
            requeued = {name: "9" for name in REQUEUED if "SLURM_JOB_ID" in environment}
            for name, value in requeued.items():
                monkeypatch.setenv(name, value)
        resumed = use(directory, RECIPE, Resume(restart=True), notes.append)
        if number == 0:
            assert not resumed and (tmp_path / "run.1").exists()
        elif number == 1:
            assert resumed is not anew and (tmp_path / "run.2").exists() is anew
        elif environment:
            assert resumed and "has begun the run: it resumes" in notes[-1]
        if not resumed:
            make_run(directory)
    assert not (tmp_path / "run.3").exists() or not second


def test_restart_in_a_job_that_cannot_be_told_from_its_retries_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLM_JAX_SUBMISSION", raising=False)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    make_run(tmp_path / "run")
    with pytest.raises(UserError, match="--restart would begin the run anew at every retry"):
        use(tmp_path / "run", RECIPE, Resume(restart=True))
    assert use(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_that_resumes_begins_nothing_anew() -> None:
    options = ["--restart", "--output-dir", "a b", "--resume_with_changes", "--seed", "1"]
    command = resume_command(Path("my recipe.py"), [*options, "--resume", "--resume-with-changes"])
    assert command == "glm-jax run 'my recipe.py' --output-dir 'a b' --seed 1 --resume"


def make_start(path: Path) -> None:
    """Files of a run that failed before its first step."""
    make_run(path)
    (path / METRICS_FILE).write_text("")
    (path / "state" / "journal.json").write_text('{"digests": {"data": "other"}}')
    (path / "state" / "sft").mkdir()
    (path / "data" / "0123").mkdir(parents=True)
    (path / "tensorboard").mkdir()
    (path / ".recipe.json.tmp").touch()


@pytest.mark.parametrize("how", [Resume(), Resume(restart=True), Resume(resume=True)])
def test_a_start_that_failed_refuses_no_corrected_command(tmp_path: Path, how: Resume) -> None:
    make_start(tmp_path / "run")
    assert not use(tmp_path / "run", RECIPE | {"seed": 1}, how)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run" / "state").exists() and (tmp_path / "run/data/0123").exists()


@pytest.mark.parametrize(
    "left", ["state/sft/2/seal.json", "checkpoints/sft/model.json", "notes.txt", METRICS_FILE]
)
def test_a_run_that_has_got_further_is_not_taken_for_one(tmp_path: Path, left: str) -> None:
    make_start(tmp_path / "run")
    (tmp_path / "run" / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / left).write_text("{}\n")
    with pytest.raises(UserError, match="holds a run of another recipe"):
        use(tmp_path / "run", RECIPE | {"seed": 1})
    assert (tmp_path / "run" / "state" / "journal.json").exists()


def test_resume_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run that can go on"):
        use(tmp_path / "run", how=Resume(resume=True))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="exclude each other"):
        Resume(resume=True, restart=True)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "old")
    for name in ("new", "old"):
        with run_directory(tmp_path / name, RECIPE, Resume(), print):
            (tmp_path / name / METRICS_FILE).touch()
            for how in (Resume(), Resume(restart=True)):
                with pytest.raises(UserError, match=f"in use by process {os.getpid()}: choose"):
                    use(tmp_path / name, how=how)
            assert (tmp_path / name / METRICS_FILE).exists()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / ".sft.partial-17").mkdir(parents=True)
    (tmp_path / "run" / ".hf.partial-17").mkdir()
    (tmp_path / "run" / ".summary.json.tmp").touch()
    assert use(tmp_path / "run")
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert left == {LOCK, METRICS_FILE, "recipe.json", "state", "journal.json", "checkpoints"}


def test_a_damaged_recipe_is_told(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*recipe.json .*: --restart begins anew"):
        use(tmp_path / "run")


def test_folders_that_are_not_ours_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for name in ("state", "data"):  # of another program
        (tmp_path / "project" / name).mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / METRICS_FILE).write_text("{}\n")
    monkeypatch.chdir(tmp_path / "run")
    for path, reason in {
        tmp_path / "file": "is a file",
        tmp_path / "file" / "below": "cannot be made: Not a directory",
        tmp_path / "folder": "holds files that are no earlier run",
        tmp_path / "project": "holds files that are no earlier run",
        Path("."): "is the folder you are in",
    }.items():
        with pytest.raises(UserError, match=f"{reason}: choose another --output-dir"):
            use(path)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thesis.tex"]
    assert {path.name for path in (tmp_path / "project").iterdir()} == {"state", "data"}
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="is not writable: choose another --output-dir"):
        use(tmp_path / "new")


def test_a_run_that_was_killed_at_once_leaves_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / METRICS_FILE).touch()
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / ".recipe.json.tmp").touch()
    (tmp_path / LOCK).touch()
    assert not use(tmp_path)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))
