"""The direction of imports: configs -> rlhf -> glm_jax -> sharding -> jax."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# room -> rooms of ours it may import
ALLOWED = {
    "sharding": {"sharding"},
    "glm_jax": {"glm_jax", "sharding"},
    "rlhf": {"rlhf", "glm_jax", "sharding"},
    "configs": {"rlhf", "glm_jax", "sharding"},
}
OURS = {*ALLOWED, "tests", "benchmarks"}
FOREIGN = {"torch", "tensorflow", "transformers"}


def imports(source: str) -> Iterator[str]:
    """Top-level names that a source text imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else str(node.module).split(".")[0]


def wrong_imports(room: str, source: str) -> set[str]:
    """What a file of `room` may not import; relative imports ('.') hide the direction and count as wrong."""
    return set(imports(source)) & ((OURS - ALLOWED[room]) | FOREIGN | {"."})


def files(room: str) -> list[Path]:
    return sorted((REPOSITORY / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_down(room: str) -> None:
    assert files(room), f"no Python file in {room}/"
    wrong = {
        str(path.relative_to(REPOSITORY)): names
        for path in files(room)
        if (names := wrong_imports(room, path.read_text(encoding="utf-8")))
    }
    assert not wrong


def test_the_check_sees_every_form_of_import() -> None:
    assert wrong_imports("sharding", "import jax, glm_jax.model") == {"glm_jax"}
    assert wrong_imports("sharding", "def f():\n    from rlhf.ppo import gae") == {"rlhf"}
    assert wrong_imports("rlhf", "from .ppo import gae") == {"."}
    assert wrong_imports("rlhf", "import torch.nn as nn") == {"torch"}
    assert wrong_imports("configs", "import configs.demo") == {"configs"}
    assert not wrong_imports("rlhf", "from glm_jax.model import Trunk\nimport numpy")
