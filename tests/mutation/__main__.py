"""Mutation testing of the modules that hold numbers: `make mutants`, or for some of them

JAX_PLATFORMS=cpu .venv/bin/python -m tests.mutation glm_jax/loss rlhf/kl
"""

import argparse
import json
import os
import random
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.operators import Mutant, mutants
from tests.mutation.runner import ARGUMENTS, Json, Runner, Target

# module -> the fast tests that are to kill its mutants
TESTS: dict[str, str] = {
    "rlhf/advantages.py": "rlhf/test_estimators.py rlhf/test_estimator_edges.py",
    "rlhf/kl.py": "rlhf/test_estimators.py rlhf/test_estimator_edges.py",
    "rlhf/losses.py": "rlhf/test_estimators.py rlhf/test_losses.py rlhf/test_loss_metrics.py",
    "rlhf/ppo.py": "rlhf/test_ppo_formulas.py",
    "rlhf/dpo.py": "rlhf/test_dpo_formulas.py",
    "rlhf/reward.py": "rlhf/test_reward_loss.py rlhf/test_losses.py",
    "rlhf/sft.py": "glm_jax/test_train.py",
    "rlhf/rollout.py": "rlhf/test_rollout.py",
    "rlhf/data/filters.py": "rlhf/test_data_filters.py",
    "glm_jax/loss.py": "glm_jax/test_loss.py rlhf/test_losses.py",
    "glm_jax/generate.py": "glm_jax/test_generate_loop.py",
    "glm_jax/optim.py": "glm_jax/test_adamw.py",
    "glm_jax/train.py": "glm_jax/test_train.py",
    "glm_jax/metrics.py": "glm_jax/test_metrics.py",
    "glm_jax/scalar.py": "glm_jax/test_scalar_head.py rlhf/test_losses.py",
    "glm_jax/layers.py": "glm_jax/test_layers.py",
    "glm_jax/attention.py": "glm_jax/test_attention.py glm_jax/test_kernels.py glm_jax/test_kernel_inputs.py",
    "sharding/pipeline.py": "sharding/test_pipeline.py sharding/test_pipeline_edges.py",
}
STORE = Path(".mutants/found.json")
REVIEWED = Path("tests/mutation/survivors.toml")


def targets(names: Sequence[str], sample: int | None, seed: int) -> list[Target]:
    """The modules whose path holds one of `names` (none: all), with all mutants or a sample of those of all."""
    chosen = [file for file in TESTS if not names or any(name in file for name in names)]
    found = [(file, mutant) for file in chosen for mutant in mutants(Path(file).read_bytes())]
    if sample is not None:
        found = random.Random(seed).sample(found, min(sample, len(found)))
    return [
        Target(
            file,
            tuple(f"tests/{test}" for test in TESTS[file].split()),
            tuple(mutant for of, mutant in found if of == file),
        )
        for file in chosen
        if any(of == file for of, _ in found)
    ]


def run(found: Sequence[Target], known: Json, save: Any, log: Any) -> None:
    """Fill `known` with the verdicts of the mutants of these modules."""
    files = dict.fromkeys(file for target in found for file in target.tests)
    missing = [file for file in files if not Path(file).exists()]
    if missing:
        sys.exit(f"no such test file: {', '.join(missing)}")
    # before NumPy is imported: processes with threads cannot be forked
    os.environ.update(OPENBLAS_NUM_THREADS="1", JAX_PLATFORMS="cpu")
    runner = Runner(found, list(TESTS), known, save, log)
    if code := pytest.main([*ARGUMENTS, *files], plugins=[runner]):
        sys.exit(int(code))


def reviews(path: Path = REVIEWED) -> dict[str, dict[str, str]]:
    """file -> name of a mutant -> why it cannot matter."""
    entries = tomllib.loads(path.read_text()) if path.exists() else {}
    return {
        file: {f"{e['function']} | {e['before']} | {e['after']}": e["reason"] for e in rows}
        for file, rows in entries.items()
    }


def report(found: Sequence[Target], known: Json) -> tuple[list[str], int]:
    """The survivors that nobody has reviewed, a table of the modules, and the number of these survivors."""
    lines = [
        "| module | mutants | killed | share | equivalent | survive | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    open_, totals, reviewed = [], [0] * 5, reviews()
    for target in found:
        verdicts: Json = known.get("verdicts", {}).get(target.file, {})
        survivors = [m for m in target.mutants if not verdicts[m.name]["killed_by"]]
        unknown = [m for m in survivors if m.name not in reviewed.get(target.file, {})]
        seconds = sum(verdicts[m.name]["seconds"] for m in target.mutants)
        row = [
            len(target.mutants),
            len(target.mutants) - len(survivors),
            len(survivors) - len(unknown),
            len(unknown),
            round(seconds),
        ]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        lines.append(_row(target.file, row))
        open_ += [_survivor(target.file, mutant) for mutant in unknown]
    lines.append(_row("all", totals))
    return [*open_, *lines], len(open_)


def _row(name: str, figures: Sequence[int]) -> str:
    number, killed, equivalent, survive, seconds = figures
    share = f"{killed / number:.1%}"
    return f"| {name} | {number} | {killed} | {share} | {equivalent} | {survive} | {seconds} |"


def _survivor(file: str, mutant: Mutant) -> str:
    """Entry of survivors.toml for this mutant, with an empty reason."""
    texts = {"function": mutant.function, "before": mutant.before, "after": mutant.after}
    rows = [f"{name} = {json.dumps(text, ensure_ascii=False)}" for name, text in texts.items()]
    return "\n".join([f"# line {mutant.line}", f'[["{file}"]]', *rows, 'reason = ""', ""])


def main() -> int:
    """Run what has changed since the last time, print the table; 1 where a survivor is not reviewed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", help="parts of paths of modules; none: all")
    parser.add_argument("--sample", type=int, help="only so many mutants, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    options = parser.parse_args()
    chosen = targets(options.modules, options.sample, options.seed)
    STORE.parent.mkdir(exist_ok=True)
    known: Json = {}
    if STORE.exists() and not options.fresh:
        known = json.loads(STORE.read_text())

    def save() -> None:
        part = STORE.with_suffix(".part")
        part.write_text(json.dumps(known))
        part.replace(STORE)

    out = sys.stdout  # pytest puts another in its place

    def log(line: str) -> None:
        out.write(f"{line}\n")
        out.flush()

    run(chosen, known, save, log)
    lines, number = report(chosen, known)
    log("\n".join(lines))
    return int(number > 0)


if __name__ == "__main__":
    sys.exit(main())
