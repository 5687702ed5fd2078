"""Run the tests of a module against its mutants: a pytest plugin that forks one process a mutant.

Test files are imported once, before JAX has started a thread. Every mutant gets a fork of that process, in which the
code of the functions it changes is exchanged, and the tests that ran the changed line are run until one fails. What
is evaluated while a module is imported, such as the default of an argument, needs an import of its own in the fork.
"""

import ast
import dataclasses
import functools
import gc
import hashlib
import importlib.machinery
import inspect
import json
import os
import select
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from tests.mutation.operators import Mutant

LONGEST = 20.0  # CPU seconds; a test that takes longer is not one of the fast tests
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A module under mutation and the test files that are to kill its mutants."""

    file: str
    tests: tuple[str, ...]
    mutants: tuple[Mutant, ...]

    @property
    def module(self) -> str:
        """Its dotted name."""
        return self.file.removesuffix(".py").replace("/", ".")


@functools.cache
def digest(file: str) -> str:
    """A short hash of a file's content when this process first asked, which is before it imports the file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


class Runner:
    """Instead of running the collected tests, run them against mutants.

    `known` is what earlier runs found, `save` is called after every mutant; both outlive an interrupted run. `traced`
    are the files whose covered lines are recorded, those of the targets and of other runs on the same `known`.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        traced: Sequence[str],
        known: Json,
        save: Callable[[], None],
        log: Callable[[str], None],
        patience: float = 60.0,  # seconds that a mutant has beyond six times what its tests take
    ) -> None:
        self._targets, self._known, self._save, self._log = targets, known, save, log
        self._traced = traced
        self._patience = patience
        for file in {*traced, *(test for target in targets for test in target.tests)}:
            digest(file)
        self._root = Path.cwd()

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        """Store every compiled program: a fork begins without any."""
        import jax

        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Measure the tests, then run those of every mutant."""
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, (
            f"{threads} threads before the first fork: a test module runs JAX on import"
        )
        self._session = session
        items = {item.nodeid: item for item in session.items}
        gc.collect()
        gc.freeze()  # a collection in a fork would copy all of this process's memory
        self._measure(items)
        for target in self._targets:
            functions = _functions(target.module)
            for mutant in target.mutants:
                self._try(target, mutant, items, functions)
        return True

    # which tests run which lines

    def _measure(self, items: dict[str, pytest.Item]) -> None:
        """CPU seconds and covered lines of every test, each in a process of its own."""
        tests = self._known.setdefault("tests", {})
        sources = {file: digest(file) for file in self._traced}
        paths = {str(self._root / file): file for file in sources}
        for number, (name, item) in enumerate(items.items()):
            own = {
                _file(name): digest(_file(name)),
                "tests/conftest.py": digest("tests/conftest.py"),
            }
            if name in tests and _unchanged(tests[name]["digests"], {**own, **sources}):
                continue
            found, seconds = _forked(functools.partial(_covered, item, paths), 600.0)
            found = found or {"outcome": "timeout", "lines": {}}
            digests = {**own, **{file: sources[file] for file in found["lines"]}}
            tests[name] = {**found, "seconds": seconds, "digests": digests}
            self._log(f"test {number + 1}/{len(items)} {name}: {found['outcome']}, {seconds:.1f} s")
            if found["outcome"] == "failed":
                self._log("  fails without a mutant, and is left out")
            self._save()

    def _covering(self, target: Target, mutant: Mutant) -> list[str]:
        """Fast tests that ran a line of the mutant, the quickest first."""
        lines = range(mutant.line, mutant.last + 1)
        files = set(target.tests)
        found = []
        for name, test in self._known["tests"].items():
            ran = test["lines"].get(target.file, ())
            usable = test["outcome"] == "passed" and test["seconds"] < LONGEST
            runs_it = mutant.at_import or any(line in lines for line in ran)
            if usable and runs_it and _file(name) in files:
                found.append(name)
        return sorted(found, key=lambda name: self._known["tests"][name]["seconds"])

    # mutants

    def _try(
        self,
        target: Target,
        mutant: Mutant,
        items: dict[str, pytest.Item],
        functions: Sequence[types.FunctionType],
    ) -> None:
        verdicts = self._known.setdefault("verdicts", {}).setdefault(target.file, {})
        names = [name for name in self._covering(target, mutant) if name in items]
        digests = {_file(name): digest(_file(name)) for name in names}
        old = verdicts.get(mutant.name)
        if old and old["source"] == digest(target.file):
            killer = old["killed_by"]
            stands = killer not in items or killer in names  # it passes without the mutant
            if killer and stands and old["killer"] == _source(items.get(killer)):
                return
            if not killer:  # tests that it survived need not run again
                names = [n for n in names if old["tests"].get(_file(n)) != digests[_file(n)]]
                if not names:
                    return
        ast.parse(mutant.source)
        limit = self._patience + 6 * sum(self._known["tests"][name]["seconds"] for name in names)
        chosen = [items[name] for name in names]

        def work() -> Json:
            if not mutant.at_import and _exchange(target.module, mutant.source, functions):
                return _first_failure(chosen)
            return _imported_again(target.module, mutant.source, names)

        found, seconds = _forked(work, limit) if names else ({"killed_by": None, "why": ""}, 0.0)
        found = found or {"killed_by": "timeout", "why": ""}
        before = old["seconds"] if old else 0.0
        verdicts[mutant.name] = {
            **found,
            "seconds": before + seconds,
            "source": digest(target.file),
            "tests": digests,
            "killer": _source(items.get(str(found["killed_by"]))),
        }
        self._log(
            f"{target.file}:{mutant.line} {found['killed_by'] or f'SURVIVES {len(names)} tests'} "
            f"({seconds:.1f} s): {mutant.before} => {mutant.after}"
        )
        self._save()


def _file(nodeid: str) -> str:
    return nodeid.split("::")[0]


def _source(item: pytest.Item | None) -> str:
    """A hash of a test's own lines; "" for a time-out, a crash or a failed import."""
    if not isinstance(item, pytest.Function):
        return ""
    return hashlib.sha256(inspect.getsource(item.function).encode()).hexdigest()[:16]


def _unchanged(digests: dict[str, str], now: dict[str, str]) -> bool:
    return all(now.get(file, hash_) == hash_ for file, hash_ in digests.items())


# in the forks


def _forked(work: Callable[[], Json], limit: float) -> tuple[Json | None, float]:
    """Run `work` in a fork of this process: its result, None after `limit` seconds, and the CPU seconds it took."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX warns of forks; it has no thread here
        child = os.fork()
    if not child:
        os.setsid()  # so that what it starts ends with it
        os.close(reader)
        try:
            answer = work()
        except BaseException as error:
            answer = {
                "killed_by": "import",
                "why": repr(error)[:200],
                "outcome": "failed",
                "lines": {},
            }
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        ready, _, _ = select.select([pipe], [], [], limit)
        text = pipe.read() if ready else ""
    os.killpg(child, signal.SIGKILL)
    _, _, used = os.wait4(child, 0)
    if ready and not text:  # it crashed
        text = json.dumps({"killed_by": "crash", "why": "", "outcome": "failed", "lines": {}})
    return (json.loads(text) if text else None), used.ru_utime + used.ru_stime


def _reports(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, list[pytest.TestReport]]]:
    for item, following in zip(items, [*items[1:], None], strict=True):
        yield item, runtestprotocol(item, log=False, nextitem=following)


def _covered(item: pytest.Item, paths: dict[str, str]) -> Json:
    """The outcome of one test and the lines it ran of the files at `paths`."""
    lines: dict[str, set[int]] = {path: set() for path in paths}

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        ran = lines.get(frame.f_code.co_filename)
        if ran is None:
            return None
        ran.add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    ((_, reports),) = _reports([item])
    sys.settrace(None)
    outcomes = {report.outcome for report in reports}
    outcome = next((o for o in ("failed", "skipped") if o in outcomes), "passed")
    covered = {file: sorted(lines[path]) for path, file in paths.items() if lines[path]}
    return {"outcome": outcome, "lines": covered}


def _first_failure(items: Sequence[pytest.Item]) -> Json:
    import jax

    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 1e9
    )  # programs of mutants are not stored
    for item, reports in _reports(items):
        for report in reports:
            if report.failed:
                return {"killed_by": item.nodeid, "why": _why(report)}
    return {"killed_by": None, "why": ""}


def _why(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).split("\n")[0][:200]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _functions(module: str) -> list[types.FunctionType]:
    """Every function there is whose code stands in the module, under decorators too."""
    file = sys.modules[module].__file__
    gc.unfreeze()
    functions = [f for f in gc.get_objects() if isinstance(f, types.FunctionType)]
    gc.freeze()
    return [f for f in functions if f.__code__.co_filename == file]


def _exchange(module: str, source: bytes, functions: Sequence[types.FunctionType]) -> bool:
    """Give the functions of the module the code they have in `source`; False where that cannot be done."""
    loaded = sys.modules[module]
    assert loaded.__file__ is not None and loaded.__spec__ is not None
    loader: Any = loaded.__spec__.loader
    code = loader.source_to_code(source, loaded.__file__)
    new = {(c.co_qualname, c.co_firstlineno): c for c in _codes(code)}
    for function in functions:
        old = function.__code__
        try:
            function.__code__ = new[old.co_qualname, old.co_firstlineno]
        except (KeyError, ValueError):
            return False
    return True


def _imported_again(module: str, source: bytes, names: Sequence[str]) -> Json:
    """Import everything of ours again with this `source` of the module, and run the tests."""
    loaded = sys.modules[module]
    assert loaded.__spec__ is not None
    loader = type(loaded.__spec__.loader)
    get_code = importlib.machinery.SourceFileLoader.get_code

    def mutated(self: Any, fullname: str) -> Any:
        if fullname != module:
            return get_code(self, fullname)
        return self.source_to_code(source, self.path)

    loader.get_code = mutated  # type: ignore[union-attr]
    here, tool = str(Path.cwd()), str(Path(__file__).parent)
    for name, other in list(sys.modules.items()):
        file = getattr(other, "__file__", None) or ""
        ours = file.startswith(here) and "site-packages" not in file
        if ours and not file.startswith(tool) and name != "__main__":
            del sys.modules[name]
    plugin = _FirstFailure()
    code = pytest.main([*ARGUMENTS, *names], plugins=[plugin])
    if plugin.found["killed_by"] is None and code not in (0, 1):
        return {"killed_by": "import", "why": f"pytest ends with {int(code)}"}
    return plugin.found


ARGUMENTS = ("-p", "no:xdist", "-p", "no:terminal")


class _FirstFailure:
    def __init__(self) -> None:
        self.found: Json = {"killed_by": None, "why": ""}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.found = _first_failure(session.items)
        return True
