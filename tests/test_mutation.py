"""The mutation tool makes the mutants it says, and tells killed ones from survivors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.__main__ import REVIEWED, TESTS, reviews, targets
from tests.mutation.operators import mutants

REPOSITORY = Path(__file__).parents[1]


def _changes(source: str) -> list[str]:
    return [mutant.after for mutant in mutants(source.encode())]


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("x = a + b * 2", ["x = a - b * 2", "x = a + b / 2", "x = a + b * 3"]),
        ("x = a < 1", ["x = a <= 1", "x = a > 1", "x = a < 2", "x = a < 0"]),
        ("x = not a and b", ["x = not a or b", "x = a and b"]),
        ("x = jnp.sum(-a, axis=1)", [
            "x = jnp.mean(-a, axis=1)", "x = jnp.sum(a, axis=1)", "x = jnp.sum(-a)",
            "x = jnp.sum(-a, axis=2)", "x = jnp.sum(-a, axis=0)",
        ]),
        ("x = jnp.where(m, a, 0.0)", ["x = (a)", "x = (0.0)", "x = jnp.where(m, a, 1.0)"]),
        ("x = a[:, 1:]", ["x = a[:, 2:]", "x = a[:, 0:]"]),
        ("x = a[0]", ["x = a[1]"]),
        ("x = loss(a, b.c)", ["x = loss(b.c, a)"]),
        ("x = a.astype(jnp.float32)", ["x = a"]),
        ("a = a * m", ["pass", "a = a / m"]),
        ("log(a)", ["pass", "(a)"]),
        ("raise ValueError(1 + 1)", ["pass"]),
        ("x = y if a else z", ["x = (y)", "x = (z)"]),
        ("x = [b for b in c if b]", ["x = [b for b in c if True]"]),
        ("assert a < 1", []),
        ("x = f'{a + 1}'", []),
        ("x_spec = f(1)", []),
        ("x = f(a, out_sharding=layout.spec(1))", []),
        ("x = a.shape[1]", []),
    ],
)  # fmt: skip
def test_mutants_of_a_line(line: str, changes: list[str]) -> None:
    source = f'def f(a, m):\n    """1 + 1"""\n    {line}\n'
    assert sorted(_changes(source)) == sorted(changes)


def test_mutants_of_our_modules_are_python() -> None:
    for file in ("rlhf/losses.py", "glm_jax/metrics.py", "glm_jax/train.py"):
        for mutant in mutants((REPOSITORY / file).read_bytes()):
            compile(mutant.source, file, "exec")


def test_annotations_and_decorators_are_left_alone() -> None:
    source = (
        "@cached(1)\ndef f(a: int | None = 3, *, b: float = 0.5) -> Literal[1]:\n    return a\n"
    )
    found = mutants(source.encode())
    assert [mutant.at_import for mutant in found] == [True, True]
    assert [mutant.source.count(b"\n") for mutant in found] == [3, 3]


def test_a_mutant_of_several_lines_moves_no_other_line() -> None:
    source = "def f(a, b):\n    a = (\n        a\n        + b\n    )\n    return a\n"
    for mutant in mutants(source.encode()):
        assert mutant.source.decode().splitlines()[5] == "    return a"


TOY = """\
import functools

def total(values, start=10):
    if not values:
        return start
    while start < 0:
        start += 5
    return start + sum(values)

@functools.cache
def twice(x):
    def inner(y):
        return y * 2 + 0
    return inner(x)

def untested(x):
    return x + 1
"""
TOY_TESTS = """\
import os
from toy import total, twice

def test_empty():
    assert total([]) == 10

def test_total():
    assert total([1, 2], -5) == 3

def test_twice():
    assert twice(4) == 8

def test_broken():
    assert twice(4) == 9
"""
DRIVER = """\
import json, sys, pytest
from pathlib import Path
from tests.mutation.operators import mutants
from tests.mutation.runner import ARGUMENTS, Runner, Target
target = Target("toy.py", ("test_toy.py", "test_more.py"), tuple(mutants(Path("toy.py").read_bytes())))
known, log = json.loads(Path("known.json").read_text()), []
sys.path.insert(0, ".")
pytest.main([*ARGUMENTS, "-p", "no:cacheprovider", *target.tests],
            plugins=[Runner([target], ["toy.py"], known, lambda: None, log.append, patience=3.0)])
Path("known.json").write_text(json.dumps(known))
Path("log.json").write_text(json.dumps(log))
"""


def _toy_run(folder: Path) -> tuple[dict[str, str | None], list[str]]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    known = json.loads((folder / "known.json").read_text())
    verdicts = known["verdicts"]["toy.py"]
    return {name: v["killed_by"] for name, v in verdicts.items()}, json.loads(
        (folder / "log.json").read_text()
    )


def test_a_toy_module_has_the_verdicts_one_expects(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TOY_TESTS)
    (tmp_path / "test_more.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/conftest.py").touch()
    (tmp_path / "known.json").write_text("{}")
    verdicts, log = _toy_run(tmp_path)
    test = "test_toy.py::test_"
    assert verdicts["total | def total(values, start=10): | def total(values, start=11):"] == (
        f"{test}empty"
    )
    assert verdicts["total | return start + sum(values) | return start - sum(values)"] == (
        f"{test}total"
    )
    assert verdicts["total | start += 5 | pass"] == "timeout"
    assert verdicts["twice.inner | return y * 2 + 0 | return y / 2 + 0"] == f"{test}twice"
    assert verdicts["twice.inner | return y * 2 + 0 | return y * 2 - 0"] is None
    assert verdicts["untested | return x + 1 | return x - 1"] is None
    assert sum("fails without a mutant" in line for line in log) == 1
    # a new test runs for survivors alone, and kills one
    (tmp_path / "test_more.py").write_text(
        "from toy import untested\n\ndef test_more():\n    assert untested(1) == 2\n"
    )
    killed = {name for name, killer in verdicts.items() if killer}
    again, log = _toy_run(tmp_path)
    assert again["untested | return x + 1 | return x - 1"] == "test_more.py::test_more"
    assert {name: again[name] for name in killed} == {name: verdicts[name] for name in killed}
    assert all("test_more" in line for line in log)


def test_reviewed_survivors_are_mutants_of_today() -> None:
    for file, reasons in reviews(REPOSITORY / REVIEWED).items():
        names = {mutant.name for mutant in mutants((REPOSITORY / file).read_bytes())}
        assert not reasons.keys() - names, f"{file}: reviewed, and no longer a mutant"
        assert all(reason.endswith(".") and len(reason) > 20 for reason in reasons.values())


def test_targets_name_files_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for file, tests in TESTS.items():
        for path in (file, *(f"tests/{test}" for test in tests.split())):
            assert (REPOSITORY / path).exists(), path
    sample = targets([], 60, 0)
    assert sum(len(target.mutants) for target in sample) == 60
    assert sample == targets([], 60, 0) != targets([], 60, 1)


@pytest.mark.slow
def test_a_sample_of_60_mutants_is_killed_or_reviewed() -> None:
    command = [sys.executable, "-m", "tests.mutation", "--sample", "60"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
