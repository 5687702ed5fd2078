"""Memory and speed of import and export, beside `cp` of the same bytes.

    python benchmarks/convert.py --gigabytes 8 --directory /tmp/convert

Writes a synthetic checkpoint of ChatGLM3-6B's shape with as many layers as fit into --gigabytes (at least one),
bfloat16, in shards; then runs in rounds, each in a process of its own whose peak memory is read from outside: `cp -r`,
`glm-jax import --stream`, `glm-jax export`, each from files in the page cache to a directory that does not exist yet.
Between them "hash and copy": two threads read the files, compute their sha256 and write them again, turn and check
nothing and do not start JAX. No converter that knows the hashes of its tensors can be faster.

Prints the median seconds over the rounds and their range, GB/s and the ratio to `cp`: until the command returns, when
much of what it wrote is in the page cache only, and until that is on the disk. Needs disk space for three copies and
one of the machine's memory.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from glm_jax.config import CHATGLM3_6B, Head
from glm_jax.hf.config import Form, read_config, to_hf
from glm_jax.hf.tables import BLOCK, num_parameters, tensor_names, tensor_shape, weight_shapes
from sharding.disk.directory import write_json
from sharding.disk.writer import ShardWriter, Spec

HEAD = Head.VOCABULARY


def write_source(directory: Path, num_bytes: float) -> int:
    """A checkpoint of random finite bits; returns its bytes."""
    layers = 1
    while (
        2 * num_parameters(dataclasses.replace(CHATGLM3_6B, num_layers=layers + 1), HEAD)
        < num_bytes
    ):
        layers += 1
    config = dataclasses.replace(CHATGLM3_6B, num_layers=layers)
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = [
        Spec(name, dtype, tensor_shape(row, config, HEAD))
        for name, row, _ in tensor_names(config, Form.CHATGLM3, HEAD)
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


def fill_page_cache(filler: Path, *needed: Path) -> None:
    """Leave no memory unused but what cached files occupy, those in `needed` among them.

    As on a machine that has been up for a while. A virtual machine gives unused memory back to its host, and is slow to
    get it again: what finds the more of it in use would look faster.
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    block = bytearray(1 << 24)
    if not filler.exists():
        with filler.open("wb") as file:
            for _ in range(0, size, len(block)):
                file.write(block)
    os.sync()
    for path in (filler, *(path for root in needed for path in root.rglob("*") if path.is_file())):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


class Run(NamedTuple):
    seconds: float  # until the command returned
    on_disk: float  # seconds until the kernel had written what it left in the page cache
    peak: float  # GiB, resident


def run(*command: str | Path) -> Run:
    """Run a command; its peak is read from the kernel while it runs."""
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
    seconds = time.monotonic() - began
    os.sync()
    return Run(seconds, time.monotonic() - began, peak / 2**20)


def hash_and_copy(source: Path, out: Path) -> None:
    """Hash and copy all files of a directory, in pieces that stay in the processor's cache, in two threads."""
    out.mkdir()
    piece = 1 << 20

    def move(path: Path) -> None:
        digest, buffer = hashlib.sha256(), bytearray(piece)
        with path.open("rb", buffering=0) as reads, (out / path.name).open("wb", 0) as writes:
            while count := reads.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                writes.write(memoryview(buffer)[:count])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(move, sorted(source.iterdir())))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--only-hash-and-copy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    root: Path = options.directory
    if options.only_hash_and_copy:
        hash_and_copy(root / "source", root / "hashed")
        return
    shutil.rmtree(root, ignore_errors=True)
    count = write_source(root / "source", options.gigabytes * 1e9)
    config = read_config(root / "source")
    largest = max(
        2 * math.prod(shape) * (config.num_layers if name.startswith(BLOCK) else 1)
        for name, shape in weight_shapes(config, HEAD).items()
    )
    print(f"{count / 1e9:.2f} GB, the largest parameter of all layers {largest / 2**30:.2f} GiB")
    glm = Path(sys.executable).with_name("glm-jax")
    source, copy, hashed, checkpoint, exported = (
        root / name for name in ("source", "copy", "hashed", "checkpoint", "exported")
    )
    itself = (sys.executable, Path(__file__), "--directory", root)
    commands = {
        "cp": (source, copy, "cp", "-r", source, copy),
        "hash and copy": (source, hashed, *itself, "--only-hash-and-copy"),
        "import --stream": (source, checkpoint, glm, "import", source, checkpoint, "--stream"),
        "export": (checkpoint, exported, glm, "export", checkpoint, exported),
    }
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, (reads, writes, *command) in commands.items():
            shutil.rmtree(writes, ignore_errors=True)
            fill_page_cache(root / "filler", Path(reads))
            results[name].append(run(*command))
            if writes != checkpoint:  # nothing reads it
                shutil.rmtree(writes)
    for number, title in ((0, "until it returns"), (1, "until it is on the disk")):
        times = {name: [run[number] for run in runs] for name, runs in results.items()}
        copying = statistics.median(times["cp"])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(
                f"{title:24} {name:16} {median:5.1f} s ({min(seconds):.1f} to {max(seconds):.1f}) "
                f"{count / median / 1e9:5.2f} GB/s {copying / median:5.2f} of cp"
            )
    for name, runs in results.items():
        print(f"{'peak resident memory':24} {name:16} {max(run.peak for run in runs):5.2f} GiB")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
