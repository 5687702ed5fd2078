"""A seal says what has changed since, by file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.disk.seal import broken, is_sealed, seal
from sharding.errors import UserError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "0.0").write_bytes(bytes(range(100)))
    (tmp_path / "model.json").write_text("{}")
    return tmp_path


def test_what_is_unharmed(directory: Path) -> None:
    assert not is_sealed(directory)
    with pytest.raises(UserError, match=r"seal\.json: No such file or directory: it was never"):
        broken(directory)
    for _ in range(2):  # the seal is no part of what it seals
        seal(directory)
        assert is_sealed(directory)
        assert broken(directory) == []


def flip(directory: Path) -> None:
    content = bytearray((directory / "weights" / "0.0").read_bytes())
    content[41] ^= 4
    (directory / "weights" / "0.0").write_bytes(content)


def cut(directory: Path) -> None:
    (directory / "weights" / "0.0").write_bytes(bytes(range(99)))


def remove(directory: Path) -> None:
    (directory / "weights" / "0.0").unlink()


def add(directory: Path) -> None:
    (directory / "weights" / "0.1").write_bytes(b"")


def garble(directory: Path) -> None:
    (directory / "seal.json").write_text('{"model.json": 3')


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip, "weights/0.0 has changed"),
        (cut, "weights/0.0 has 99 bytes instead of 100"),
        (remove, "weights/0.0: No such file or directory"),
        (add, "weights/0.1 does not belong there"),
        (garble, "seal.json cannot be read"),
    ],
)
def test_every_damage_is_told_with_its_file(
    directory: Path, damage: Callable[[Path], None], told: str
) -> None:
    seal(directory)
    damage(directory)
    (problem,) = broken(directory)
    assert told in problem
