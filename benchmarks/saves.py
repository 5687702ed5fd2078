"""What saving costs a training, and how long going on takes as the model grows.

    JAX_PLATFORMS=cpu python benchmarks/saves.py [MILLIONS ...]    # default: 12 50 100 million parameters

SFT of a GLM-4 of each size, float32, AdamW, on one device: the median of steps without a save; of steps while one is
being written in the background; how long a step waits at the beginning of a save, where the state is copied; bytes on
disk over bytes of the state; and how long a restart takes to check every hash and to restore. The disk's cache is warm.
"""

import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.config import GLMConfig
from glm_jax.model import init_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import TrainState, init_state
from rlhf.progress import Journal, SavingConfig, find
from rlhf.runlog import Position
from rlhf.sft import sft_update
from rlhf.stage_keeper import Training
from rlhf.stop import Stop
from sharding.host_memory import keep_freed_memory
from sharding.layout import Layout, use_devices

ROWS, LENGTH, STEPS = 8, 256, 5
WIDTHS = {12: (256, 8), 50: (512, 14), 100: (768, 12)}  # millions -> width, layers


def config_of(millions: int) -> GLMConfig:
    """About so many parameters, a sixth of them in the two vocabularies."""
    width, layers = WIDTHS[millions]
    return GLMConfig(8192, width, layers, width // 64, 2, 64, 3 * width, max_length=LENGTH)


def num_bytes(tree: Any) -> int:
    """Of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def measure(millions: int, folder: Path) -> str:
    """A row of the table."""
    config, layout = config_of(millions), Layout()
    optimizer = make_optimizer(OptimConfig(), 1000)
    update = sft_update(optimizer, layout)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    batch = layout.put(Sequences(ids, np.ones_like(ids, bool), np.ones_like(ids, bool)))

    def begin() -> TrainState:
        return init_state(
            jax.jit(partial(init_model, config, layout))(jax.random.key(0)), optimizer
        )

    state = begin()
    parameters = sum(x.size for x in jax.tree.leaves(state.model))

    def step(state: TrainState) -> tuple[TrainState, float]:
        begun = time.perf_counter()
        state, metrics = update(state, batch)
        jax.block_until_ready((state, metrics))
        return state, time.perf_counter() - begun

    journal = Journal(folder, find(folder, print), SavingConfig(), Position, Stop())
    alone, during, waits = [], [], []
    with journal.keeper(Training("sft", {}, 1), layout) as keeper:
        state, _ = step(state)
        keeper.keep(state, 1)  # compiles the copy
        keeper.snapshots.wait()
        for number in range(2, 2 + STEPS):
            for _ in range(2):
                state, seconds = step(state)
                alone.append(seconds)
            begun = time.perf_counter()
            keeper.keep(state, number)
            waits.append(time.perf_counter() - begun)
            while keeper.snapshots.is_saving():
                state, seconds = step(state)
                during.append(seconds)
        keeper.snapshots.wait()
        written = sum(
            x.stat().st_size for x in (folder / "state/sft" / str(number)).rglob("*") if x.is_file()
        )
    begun = time.perf_counter()
    found = find(folder, print)
    checked = time.perf_counter() - begun
    journal = Journal(folder, found, SavingConfig(), Position, Stop())
    with journal.keeper(Training("sft", {}, 1), layout) as keeper:
        begun = time.perf_counter()
        restored = jax.block_until_ready(keeper.restore(begin))
        seconds = time.perf_counter() - begun
    size = num_bytes(restored)
    return (
        f"| {parameters / 1e6:.0f} M | {size / 1e9:.2f} | {statistics.median(alone):.2f} | "
        f"{statistics.mean(during):.2f} | {statistics.mean(during) / statistics.mean(alone):.2f} | "
        f"{statistics.median(waits):.2f} | {written / size:.3f} | {checked:.2f} | {seconds:.2f} |"
    )


def main() -> None:
    """Print the table."""
    keep_freed_memory()
    use_devices(1)
    sizes = [int(x) for x in sys.argv[1:]] or list(WIDTHS)
    print(
        "| parameters | state, GB | step, s | with a save in flight | ratio | wait, s | bytes | check, s | restore, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for millions in sizes:
        folder = Path(tempfile.mkdtemp(prefix="saves-", dir="."))
        try:
            with jax.set_mesh(Layout().mesh()):
                print(measure(millions, folder), flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
