"""Verdicts on disk: what was asked before of the same code is read, and no process starts to trace it again."""

import functools
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

from rlhf.plan.verdict import Request, Verdict, as_json, ask, from_json
from sharding.described import ENVIRONMENT
from sharding.disk.directory import explained, write_json

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("glm_jax", "rlhf", "sharding")
_SETTINGS = ("CUDA_", "JAX_", "LIBTPU_", "TPU_", "XLA_")  # how the variables of compilers begin


def ask_once(request: Request, cache: Path) -> Verdict:
    """The verdict, of now or of before; errors are not kept. Raises UserError where it cannot be written."""
    place = cache / "verdicts" / f"{verdict_key(request)}.json"
    if place.exists():
        return from_json(json.loads(place.read_text()))
    found = ask(request, cache)
    if found.error is None:
        with explained(place.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, as_json(found))
    return found


def verdict_key(request: Request, root: Path = _ROOT) -> str:
    """A hash of what a verdict depends on: what is asked, our code in `root`, what is installed, settings."""
    settings = {k: v for k, v in os.environ.items() if k.startswith(_SETTINGS)}
    parts = (request, _code(root), sorted({**settings, **ENVIRONMENT}.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _code(root: Path) -> str:
    """A hash of every module of ours, and of the names and versions of all that is installed."""
    modules = sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py"))
    found = hashlib.sha256()
    for path in modules:
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    installed = {(one.name, one.version) for one in importlib.metadata.distributions()}
    found.update(repr(sorted(installed)).encode())
    return found.hexdigest()
