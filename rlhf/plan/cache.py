"""Compiled programs on disk: a program that was compiled once for a pod is read, not compiled, the next time.

JAX's own cache cannot be read back without the devices. Here the key is what was to be compiled, by content, and what
compiled it; kept are the program's text and the figures of its memory, from which everything else is computed anew.
"""

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path

import jax
from jax.sharding import Mesh

from sharding.chips import Pod
from sharding.compile import REDUCE_MEANWHILE, WHOLE_PRODUCTS
from sharding.described import (
    OutOfMemory,
    compile_for_pod,
    compiler_version,
    peak_bytes,
)
from sharding.disk.directory import new_directory
from sharding.gpus import target


@dataclasses.dataclass(frozen=True)
class Entry:
    """A compiled program."""

    peak_bytes: int  # of one that does not fit, what it needs
    text: str | None  # None: the compiler found no room


class Cache:
    """Entries in a folder, one folder each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def compiled(self, lowered: jax.stages.Lowered, mesh: Mesh, pod: Pod) -> Entry:
        """The program for the mesh, compiled now or before. Raises UserError where it cannot be kept."""
        place = self._directory / cache_key(lowered, mesh, pod)
        if not place.exists():
            _keep(_compile(lowered), place)
        fields = json.loads((place / "entry.json").read_text())
        text = place / "program.hlo.gz"
        return Entry(
            **fields, text=gzip.decompress(text.read_bytes()).decode() if text.exists() else None
        )


def cache_key(lowered: jax.stages.Lowered, mesh: Mesh, pod: Pod) -> str:
    """The name of a program's folder: a hash of all that its compilation depends on."""
    # the text has neither the options of programs that train, nor which device stands where, nor what a GPU is
    options = sorted({**WHOLE_PRODUCTS, **REDUCE_MEANWHILE}.items())
    order = [device.id for device in mesh.devices.flat]
    gpu = () if pod.chip.dims else (target(pod.chip),)
    parts = (
        lowered.as_text(),
        order,
        compiler_version(pod.chip),
        jax.__version__,
        pod.name,
        options,
        *gpu,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _compile(lowered: jax.stages.Lowered) -> Entry:
    try:
        compiled = compile_for_pod(lowered)
    except OutOfMemory as verdict:
        return Entry(verdict.needed, None)
    return Entry(peak_bytes(compiled), compiled.as_text())


def _keep(entry: Entry, place: Path) -> None:
    with new_directory(place, replace=True) as partial:
        (partial / "entry.json").write_text(json.dumps({"peak_bytes": entry.peak_bytes}))
        if entry.text is not None:
            packed = gzip.compress(entry.text.encode(), mtime=0)
            (partial / "program.hlo.gz").write_bytes(packed)
