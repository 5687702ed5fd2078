"""The folder of a run: new, moved aside, or gone on with."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.outdir import Resume, run_directory
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
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / METRICS_FILE).write_text("{}\n")
    monkeypatch.chdir(tmp_path / "run")
    for path, reason in {
        tmp_path / "file": "is a file",
        tmp_path / "file" / "below": "cannot be made: Not a directory",
        tmp_path / "folder": "holds files that are no earlier run",
        Path("."): "is the folder you are in",
    }.items():
        with pytest.raises(UserError, match=f"{reason}: choose another --output-dir"):
            use(path)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thesis.tex"]
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
