"""Seconds to compile an update of a deep model against a shallow one, for layouts with and without a pipeline.

    python benchmarks/compile_depth.py 1x1x1x1 1x1x2x2 2x1x2x1:circular

Prints the medians for 6 and 48 layers, their ratio and the lines of both programs. Rounds alternate, so that what else
the machine does hits both alike.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np

from glm_jax.batch import Sequences
from glm_jax.config import PRESETS
from glm_jax.model import init_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import init_state
from rlhf.sft import sft_update
from rlhf.trials.models import tiny
from sharding.layout import Layout, get_layout

ROUNDS = 5
DEPTHS = (6, 48)


def compile_seconds(num_layers: int, layout: Layout) -> tuple[float, int]:
    """Seconds of lowering and compiling the SFT update, and the lines of its HLO."""
    config = dataclasses.replace(tiny(PRESETS["chatglm3-6b"]), num_layers=num_layers)
    optimizer = make_optimizer(OptimConfig(), 1)
    jax.clear_caches()
    with jax.set_mesh(layout.mesh()):
        ids = np.zeros((16, 32), np.int32)
        batch = layout.put(Sequences(ids, ids > 0, ids > 0))
        state = jax.eval_shape(
            lambda key: init_state(init_model(config, layout, key), optimizer), jax.random.key(0)
        )
        begin = time.perf_counter()
        compiled = sft_update(optimizer, layout).lower(state, batch).compile()
        return time.perf_counter() - begin, len(compiled.as_text().splitlines())


def main() -> None:
    """Compile for every layout of the command line."""
    jax.config.update("jax_num_cpu_devices", 8)
    for name in sys.argv[1:]:
        layout = get_layout(name, None)
        seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
        lines = {}
        for _ in range(ROUNDS):
            for depth in DEPTHS:
                spent, lines[depth] = compile_seconds(depth, layout)
                seconds[depth].append(spent)
        shallow, deep = (statistics.median(seconds[depth]) for depth in DEPTHS)
        print(
            f"{name:20} {DEPTHS[0]} layers {shallow:5.2f} s {lines[DEPTHS[0]]:6,} lines   "
            f"{DEPTHS[1]} layers {deep:5.2f} s {lines[DEPTHS[1]]:6,} lines   ratio {deep / shallow:.2f}"
        )


if __name__ == "__main__":
    main()
