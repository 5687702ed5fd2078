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
from sharding.disk.seal import digest

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
    return _hash((request, _code(root), sorted({**settings, **ENVIRONMENT}.items())))


@functools.cache
def _code(root: Path) -> str:
    """A hash of every module of ours, and of the names and versions of all that is installed."""
    installed = {(one.name, one.version) for one in importlib.metadata.distributions()}
    return _hash(([digest(root / package, "*.py") for package in _PACKAGES], sorted(installed)))


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]
