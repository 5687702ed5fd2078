"""Tokens a second of the demo's SFT update, layout against layout on this machine's cores.

    python benchmarks/update_step.py single:1 dp:2 fsdp:2 tp:2

Each LAYOUT:DEVICES runs in a process of its own; rounds alternate between them, so that what else the machine does
hits all alike. Prints the median and the range over the rounds. Tokens are padded ones: rows x length.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 3
STEPS = 20
ROWS, LENGTH = 32, 56


def measure(layout_name: str, devices: int) -> float:
    """Tokens/s over STEPS updates after one that compiles."""
    import runpy
    from functools import partial
    from pathlib import Path

    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import numpy as np

    from glm_jax.batch import Sequences
    from glm_jax.model import init_model
    from glm_jax.optim import OptimConfig, make_optimizer
    from glm_jax.train import init_state
    from rlhf.sft import sft_update
    from sharding.layout import get_layout

    recipe = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "demo.py"))["config"]
    layout = get_layout(layout_name, devices)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, recipe.model.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    everywhere = np.ones((ROWS, LENGTH), bool)
    with jax.set_mesh(layout.mesh()):
        batch = layout.put(Sequences(ids, everywhere, everywhere))
        model = jax.jit(partial(init_model, recipe.model, layout))(jax.random.key(0))
        optimizer = make_optimizer(OptimConfig(), STEPS)
        update = sft_update(optimizer, layout)
        state, metrics = update(init_state(model, optimizer), batch)
        jax.block_until_ready(metrics)
        begin = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = update(state, batch)
        jax.block_until_ready((state, metrics))
        return STEPS * ROWS * LENGTH / (time.perf_counter() - begin)


def main() -> None:
    """Measure every LAYOUT:DEVICES of the command line, in rounds."""
    if sys.argv[1] == "--one":
        layout, devices = sys.argv[2].split(":")
        print(measure(layout, int(devices)))
        return
    rates: dict[str, list[float]] = {case: [] for case in sys.argv[1:]}
    for _ in range(ROUNDS):
        for case in rates:
            command = [sys.executable, __file__, "--one", case]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rates[case].append(float(done.stdout))
    for case, values in rates.items():
        median = statistics.median(values)
        print(f"{case:12} {median:8,.0f} tokens/s  ({min(values):,.0f} to {max(values):,.0f})")


if __name__ == "__main__":
    main()
