"""What pyproject.toml says is what the folders hold."""

import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_packages_listed_by_name_are_those_on_disk() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    rooms = [REPOSITORY / room for room in ("sharding", "glm_jax", "rlhf")]
    found = [path.parent for room in rooms for path in room.rglob("__init__.py")]
    names = {".".join(path.relative_to(REPOSITORY).parts) for path in found}
    assert sorted(listed) == sorted(names)
    assert all((room / "py.typed").exists() for room in rooms)
