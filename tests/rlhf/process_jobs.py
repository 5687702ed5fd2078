"""What test_processes.py starts, once a process: train some of the jobs of test_layouts.py, and write what came of it.

    python process_jobs.py OUT JOB:LAYOUT,... DEVICES [--coordinator HOST:PORT --num-processes N --process-id I]

OUT gets `JOB:LAYOUT.npz` with every metric of every step and every trained weight, by the first process. The job
`rows` writes `rows:LAYOUT.P.json`: the rows that process P looked up of the batch 0, 1, ... 15. In `fail` process 1
cannot go on.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.config import GLMConfig
from rlhf.cli import override
from rlhf.data.batches import in_order
from sharding.errors import UserError
from sharding.layout import Layout, get_layout, use_devices
from sharding.processes import fetch, is_first, peers_explained, start, together

CONFIG = GLMConfig(64, 32, 2, 8, 2, 8, 64, max_length=64)


def layouts() -> Any:
    """The module test_layouts.py beside this file."""
    path = Path(__file__).with_name("test_layouts.py")
    spec = importlib.util.spec_from_file_location("layouts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(job: str, layout: Layout) -> dict[str, np.ndarray]:
    """Metrics [step] and weights, by name."""
    steps: list[dict[str, float]] = []
    with jax.set_mesh(layout.mesh()):
        trained = layouts().JOBS[job](CONFIG, layout, lambda *told: steps.append(told[1]))
        weights = fetch(trained)
    named = {
        f"weight {jax.tree_util.keystr(path)}": np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }
    return {f"metric {name}": np.array([s[name] for s in steps]) for name in steps[0]} | named


def rows_looked_up(layout: Layout) -> list[int]:
    """The rows of a batch of 16 that this process looks up to put it on the mesh."""
    seen: set[int] = set()

    class Watched(np.ndarray):
        def __getitem__(self, where: Any) -> Any:
            if isinstance(where, tuple):
                seen.update(where[0].tolist())
            return super().__getitem__(where)

    ids = np.arange(32, dtype=np.int32).reshape(16, 2).view(Watched)
    (batch,) = in_order(Sequences(ids, ids > 0, ids > 0), 16)
    with jax.set_mesh(layout.mesh()):
        on_mesh = layout.put(batch)
        np.testing.assert_array_equal(fetch(on_mesh.ids), np.arange(32).reshape(16, 2))
    return sorted(seen)


def fail() -> None:
    """What only one process runs into."""
    if jax.process_index() == 1:
        raise UserError("a disk is full")


def main(out: Path, jobs: str, devices: int, options: list[str]) -> None:
    """Join the other processes and do the jobs."""
    _, processes = override(CONFIG, options, prog="", description="")
    use_devices(devices, start(processes))
    for name in jobs.split(","):
        job, _, layout = name.partition(":")
        if job == "rows":
            rows = rows_looked_up(get_layout(layout, devices))
            (out / f"{name}.{jax.process_index()}.json").write_text(json.dumps(rows))
            continue
        if job == "fail":
            together(fail)
        with peers_explained():
            result = train(job, get_layout(layout, devices))
        if is_first():
            np.savez(out / f"{name}.npz", **result)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
