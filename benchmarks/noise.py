"""Cost of the random numbers of sampling: JAX's modes of Gumbel noise, alone and within generation.

    JAX_PLATFORMS=cpu python benchmarks/noise.py

The low mode, JAX's default, makes noise of 23 random bits, at most 16: no token below e^-16 = 1e-7 is sampled. The high
and the highest mode make it of 46 and 64 bits. glm-jax samples with the highest mode.

First `glm_jax.generate.draw` alone, 8 rows of ChatGLM4's vocabulary; then new tokens a second of `Sampler` on the model
of `small_glm4.py` (32.5 million weights, vocabulary 8,192), 32 rows of 64 prompt tokens and 32 new ones, float32. The
modes take turns, so that what else the machine does hits all alike. Prints the median and the range.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from sides import spread
from small_glm4 import SHAPE, our_model

from glm_jax.batch import Prompts
from glm_jax.generate import SamplingConfig, draw
from glm_jax.sampler import Sampler
from sharding.layout import Layout

MODES = ("low", "high", "highest")
TURNS = 7
ROWS, VOCAB = 8, 151_552
BATCH, PROMPT, NEW = 32, 64, 32

gumbel = jax.random.gumbel


def in_mode(mode: str) -> Any:
    """A context in which programs are compiled with noise of this mode."""

    def noise(key: jax.Array, shape: tuple[int, ...], **_: Any) -> jax.Array:
        return gumbel(key, shape, mode=mode)

    return patch.object(jax.random, "gumbel", noise)


def tokens() -> Callable[[int], Any]:
    """A token of each row; the argument is the turn."""
    logits = jax.random.normal(jax.random.key(0), (ROWS, VOCAB))
    keys = jax.random.split(jax.random.key(1), ROWS)
    program = jax.jit(partial(draw, sampling=SamplingConfig()))
    return lambda turn: program(logits, keys, jnp.full(ROWS, turn, jnp.int32))


def answers(config: Any, model: Any) -> Callable[[int], Any]:
    """Answers of the static mode, none of which stops early."""
    layout = Layout()
    sample = Sampler(config, SamplingConfig(max_new_tokens=NEW), (), layout)
    ids = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (BATCH, PROMPT))
    real = np.ones((BATCH, PROMPT), bool)
    rows = layout.put(Prompts(ids.astype(np.int32), real, np.arange(BATCH, dtype=np.int32)))
    return lambda turn: sample(model, rows, jax.random.key(turn))


def timed(programs: dict[str, Callable[[int], Any]]) -> dict[str, list[float]]:
    """Seconds of every turn; the first one, which compiles, is left out."""
    seconds: dict[str, list[float]] = {mode: [] for mode in programs}
    for turn in range(TURNS + 1):
        for mode, program in programs.items():
            with in_mode(mode):
                begin = time.perf_counter()
                jax.block_until_ready(program(turn))
            if turn:
                seconds[mode].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Measure and print."""
    jax.set_mesh(Layout().mesh())
    with tempfile.TemporaryDirectory() as shared:
        config, model = our_model(Path(shared))
    for mode, found in timed({mode: tokens() for mode in MODES}).items():
        print(f"{mode:8} {spread([1e3 * x / ROWS for x in found], 1)} ms a token, V = {VOCAB:,}")
    for mode, found in timed({mode: answers(config, model) for mode in MODES}).items():
        rates = spread([BATCH * NEW / x for x in found], 0)
        print(f"{mode:8} {rates} tokens/s, V = {SHAPE['vocab_size']:,}")


if __name__ == "__main__":
    main()
