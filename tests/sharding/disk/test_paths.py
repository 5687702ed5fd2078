"""Every spelling of a path becomes one that any library opens, and leads where the operating system goes."""

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.disk.paths import absolute, absolute_paths, same
from sharding.errors import UserError

NAMES = ["a", "b c", "zwei %20", "木", "#?"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders in folders, and links to folders elsewhere."""
    root = tmp_path_factory.mktemp("tree")
    for outer in NAMES:
        for inner in NAMES:
            (root / outer / inner).mkdir(parents=True)
    (root / "up").symlink_to(root / "a" / "b c")
    (root / "木" / "across").symlink_to(root / "#?")
    return root


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(st.sampled_from([*NAMES, "..", ".", "up", "across", "new"]), max_size=6),
    relative=st.booleans(),
    slash=st.sampled_from(["", "/"]),
)
def test_a_spelling_leads_where_the_operating_system_goes(
    tree: Path, steps: list[str], relative: bool, slash: str
) -> None:
    before = Path.cwd()
    os.chdir(tree)
    try:
        path = Path("/".join(steps if relative else [str(tree), *steps]) + slash)
        found = absolute(path)
        assert found.is_absolute() and ".." not in found.parts and "~" not in found.parts
        assert same(path, found) and same(found, path)
        if path.exists():
            assert os.path.samefile(path, found)
        os.chdir("/")  # wherever the process goes afterwards
        assert absolute(found) == found
    finally:
        os.chdir(before)


def test_links_that_no_dots_follow_keep_their_names(tree: Path) -> None:
    assert absolute(tree / "up" / "new") == tree / "up" / "new"
    assert absolute(tree / "up" / ".." / "new") == (tree / "a" / "new").resolve()
    assert same(tree / "up", tree / "a" / "b c") and not same(tree / "up", tree / "a")


def test_home_is_that_of_the_user(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert absolute(Path("~/a")) == tree / "a"
    assert absolute(Path("~")) == tree
    assert absolute(Path("a~/~")).name == "~"


def test_what_is_no_path_is_one_clear_line(tree: Path) -> None:
    for path, message in (
        (Path("~nobody-of-this-name/x"), "no such path can be opened"),
        (Path(os.fsdecode(b"\xff")), "is not UTF-8: rename it"),
    ):
        with pytest.raises(UserError, match=message) as error:
            absolute(path)
        assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class _Inner:
    paths: tuple[Path, ...] = (Path("x"),)
    number: int = 3


@dataclasses.dataclass(frozen=True)
class _Outer:
    inner: _Inner
    path: Path | None = None


def test_paths_in_settings_are_found_at_any_depth(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree / "a")
    found = absolute_paths((_Outer(_Inner(), Path("../x")), "y", Path("y")))
    assert found == (_Outer(_Inner((tree / "a" / "x",)), tree / "x"), "y", tree / "a" / "y")
    settings = _Inner(())
    assert absolute_paths(settings) is settings
