"""Memory and speed of import and export, beside `cp` of the same bytes.

    python benchmarks/convert.py --gigabytes 8 --directory /tmp/convert

Writes a synthetic checkpoint of ChatGLM3-6B's shape with as many layers as fit into --gigabytes (at least one),
bfloat16, in shards; then runs, each in a process of its own whose peak memory is read from outside: `cp -r`,
`glm-jax import --stream`, `glm-jax export`, `cp -r` once more. Prints seconds, GB/s, the ratio to the mean of both
`cp`, and peak resident memory.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from glm_jax import hf
from glm_jax.config import CHATGLM3_6B
from glm_jax.hf_config import Form, to_hf
from sharding.disk.directory import write_json
from sharding.disk.find import find_tensors
from sharding.disk.writer import ShardWriter, Spec


def write_source(directory: Path, num_bytes: float) -> int:
    """A checkpoint of random finite bits; returns its bytes."""
    layers = 1
    while (
        2 * hf.num_parameters(dataclasses.replace(CHATGLM3_6B, num_layers=layers + 1)) < num_bytes
    ):
        layers += 1
    config = dataclasses.replace(CHATGLM3_6B, num_layers=layers)
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = [
        Spec(name, dtype, hf.tensor_shape(row, config))
        for name, row, _ in hf.tensor_names(config, Form.CHATGLM3)
    ]
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    with ShardWriter(directory, specs, 2 * 10**9) as writer:
        for spec in specs:
            bits = (
                rng.integers(0, 1 << 16, spec.shape, np.uint16) & 0xBFFF
            )  # an exponent below infinity
            writer.put(spec.name, bits.view(dtype))
    write_json(directory / "config.json", to_hf(config, Form.CHATGLM3, "bfloat16"))
    return sum(spec.nbytes for spec in specs)


def run(*command: str | Path) -> tuple[float, float]:
    """Seconds of a command, and its peak resident GiB as the kernel tells while it runs."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [str(word) for word in command], env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    status = Path("/proc") / str(process.pid) / "status"
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it may end meanwhile
            lines = [line for line in status.read_text().splitlines() if "VmHWM" in line]
            peak = max([peak, *(int(line.split()[1]) for line in lines)])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{command} failed")
    return time.monotonic() - began, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    root: Path = options.directory
    shutil.rmtree(root, ignore_errors=True)
    count = write_source(root / "source", options.gigabytes * 1e9)
    largest = max(stored.nbytes for stored in find_tensors(root / "source").values())
    print(f"{count / 1e9:.2f} GB, the largest tensor {largest / 2**30:.2f} GiB")
    glm = Path(sys.executable).with_name("glm-jax")
    os.sync()
    results = {"cp": run("cp", "-r", root / "source", root / "copy")}
    os.sync()
    results["import --stream"] = run(
        glm, "import", root / "source", root / "checkpoint", "--stream"
    )
    os.sync()
    results["export"] = run(glm, "export", root / "checkpoint", root / "hf")
    shutil.rmtree(root / "copy")
    os.sync()
    results["cp again"] = run("cp", "-r", root / "source", root / "copy")
    copying = (results["cp"][0] + results["cp again"][0]) / 2
    for name, (seconds, peak) in results.items():
        print(
            f"{name:16} {seconds:6.1f} s  {count / seconds / 1e9:5.2f} GB/s  {copying / seconds:5.2f} of cp  "
            f"peak {peak:5.2f} GiB"
        )
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
