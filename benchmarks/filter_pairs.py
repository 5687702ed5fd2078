"""Seconds and peak memory of `glm-jax data filter` on synthetic pairs, with every filter switched on.

    python benchmarks/filter_pairs.py [PAIRS]    # default: 1,000,000

Writes a file of pairs (about 600 bytes each) with ten annotators who contradict each other in a fifth of what they say,
tasks of very different sizes and a bias to longer answers, filters it in a process of its own, and prints what each
filter dropped, the seconds and the largest resident memory of that process.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = {
    "min-intention": 1,
    "min-semantics": 1,
    "intent-cap": 500,
    "min-kappa": -1,
}


def write(path: Path, count: int) -> None:
    """Three answers to a prompt, compared again and again."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)
    ]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % 4 == 0:
                prompt, task = text(1, 30), f"task {int(rng.expovariate(0.3))}"
                answers = sorted((text(5, 60) for _ in range(3)), key=len, reverse=True)
            better, worse = sorted(rng.sample(range(3), 2))
            if rng.random() < 0.2:
                better, worse = worse, better
            line = {
                "prompt": prompt,
                "chosen": answers[better],
                "rejected": answers[worse],
                "annotator": f"annotator {rng.randint(0, 9)}",
                "task": task,
            }
            file.write(json.dumps(line) + "\n")


def main() -> None:
    """Write, filter, print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        write(pairs, count)
        print(f"{count:,} pairs, {pairs.stat().st_size / 1e6:.0f} MB")
        options = [f"--filters.{name}={value}" for name, value in OPTIONS.items()]
        command = [sys.executable, "-m", "rlhf.cli", "data", "filter", str(pairs), *options]
        begin = time.perf_counter()
        subprocess.run([*command, "--filters.answerable", "--out", f"{folder}/out"], check=True)
        seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{seconds:.0f} s, peak resident memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
