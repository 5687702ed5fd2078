"""What test_processes.py starts, once a process: train some of the jobs of rlhf.trials, and write what came of it.

    python process_jobs.py OUT JOB:LAYOUT,... DEVICES [--coordinator HOST:PORT --num-processes N --process-id I]

OUT gets `JOB:LAYOUT.npz` with every step's losses and every trained weight, by the first process. The job
`rows` writes `rows:LAYOUT.P.json`: the rows that process P looked up of the batch 0, 1, ... 15. `order` writes the same
of six shuffled batches, the last three after a restart. `rollout` writes what slots answer to prompts of many lengths.
In `fail` process 1 cannot go on; in `folder` all must see one working directory.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.batch import Judged, Pairs, Prompts, Sequences
from glm_jax.config import PRESETS
from glm_jax.continuous import RolloutConfig
from glm_jax.generate import SamplingConfig
from glm_jax.model import init_model
from glm_jax.sampler import Sampler
from rlhf import certify
from rlhf.data.batches import in_order, shuffled
from rlhf.recipe_file import override
from rlhf.trials.models import tiny
from sharding.errors import UserError
from sharding.layout import Layout, get_layout, use_devices
from sharding.processes import (
    Processes,
    check_shared,
    fetch,
    is_first,
    peers_explained,
    start,
    together,
)

CONFIG = tiny(PRESETS["chatglm3-6b"])


def train(job: str, layout: Layout) -> dict[str, np.ndarray]:
    """Losses of every update and trained weights, by name."""
    trained = certify.train(job, CONFIG, 16, layout)
    losses = {
        f"{name}, {seen.where}": np.array(loss)
        for seen in trained.seen
        for name, loss in seen.losses.items()
    }
    return losses | {f"weight {name}": weight for name, weight in trained.weights.items()}


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


def rows_in_order(layout: Layout) -> list[list[int]]:
    """The rows of six shuffled batches that this process holds, in the order of the batch."""
    table = np.arange(44, dtype=np.int32)[:, None]
    rows = Judged(
        Pairs(*[Sequences(table, table >= 0, table >= 0)] * 2), table[:, 0].astype(np.float32)
    )
    held = []
    batches = shuffled(rows, 16, seed=5)
    for number in range(6):
        if number == 3:
            state = json.loads(json.dumps(batches.get_state()))
            batches = shuffled(rows, 16, seed=5)
            batches.set_state(state)
        with jax.set_mesh(layout.mesh()):
            shards = layout.put(next(batches)).weight.addressable_shards
        by_place = {shard.index[0].start or 0: np.asarray(shard.data) for shard in shards}
        held.append([int(row) for place in sorted(by_place) for row in by_place[place]])
    return held


def answers(layout: Layout) -> dict[str, np.ndarray]:
    """Two answers each to 16 prompts of 1 to 12 tokens, through 16 slots, 8 at last."""
    rng = np.random.default_rng(0)
    valid = np.arange(12) >= 12 - rng.integers(1, 13, (16, 1))
    ids = np.where(valid, rng.integers(3, 64, (16, 12)), 0).astype(np.int32)
    prompts = Prompts(ids, valid, np.arange(16, dtype=np.int32))
    rollout = RolloutConfig(slots=16, buckets=(6, 12), prefill_tokens=48)
    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(init_model, CONFIG, layout))(jax.random.key(0))
        sample = Sampler(CONFIG, SamplingConfig(10), (2, 5, 7), layout, None, rollout)
        drawn = fetch(sample(model, layout.put(prompts), jax.random.key(1), samples=2))
    return {"ids": drawn.sequences.ids, "logp": drawn.logp, "ended": drawn.ended}


def fail() -> None:
    """What only one process runs into."""
    if jax.process_index() == 1:
        raise UserError("a disk is full")


def main(out: Path, jobs: str, devices: int, options: list[str]) -> None:
    """Join the other processes and do the jobs."""
    _, processes = override(CONFIG, options, "", "", Processes())
    use_devices(devices, start(processes))
    for name in jobs.split(","):
        job, _, layout = name.partition(":")
        if job in ("rows", "order"):
            looked_up = {"rows": rows_looked_up, "order": rows_in_order}[job]
            rows = looked_up(get_layout(layout, devices))
            (out / f"{name}.{jax.process_index()}.json").write_text(json.dumps(rows))
            continue
        if job == "fail":
            together(fail)
        if job == "folder":
            check_shared(Path.cwd(), "output_dir")
        with peers_explained():
            work = answers if job == "rollout" else partial(train, job)
            result = work(get_layout(layout, devices))
        if is_first():
            np.savez(out / f"{name}.npz", **result)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
