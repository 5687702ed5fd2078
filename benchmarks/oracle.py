"""What every switch of PPO does where the true reward is known: tables and a plot, over three seeds.

    JAX_PLATFORMS=cpu python benchmarks/oracle.py [SEEDS] [OUT] [EXPERIMENT ...]    # 3 runs/oracle, all

Seeds run side by side, as many as there are cores; all in half an hour. Everything starts from configs/oracle.py: one
SFT and one reward model a seed, from annotators who like length. Printed as Markdown, and drawn in
OUT/overoptimisation.png:

* `pairs`, `grades`: the reference baseline. How far apart tasks' mean rewards lie at the start, and gain and KL at the
  end, with it and without: for a reward model of pairs without the prior on scores, whose origin nothing fixes, and for
  one of absolute grades to which each task's annotators add an offset of their own;
* `sft`: the SFT loss mixed in, held-out NLL, gain and KL, with it and without;
* `selection`: prompt selection, iterations until the reward reaches what the run without it ends at;
* `methods`: over-optimisation, gold and proxy against KL along PPO, RLOO and GRPO with three coefficients each, of DPO
  at four betas, and of best-of-n (whose KL is log n - (n - 1) / n, Stiennon et al. 2020, appendix G.3).

Gains are over the SFT model: of the proxy (the reward model's score, which is trained on) and of the gold reward.
"""

import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from oracle_lab import History, Lab, new_lab

from rlhf.data.oracle.oracle import TASKS, task_of
from rlhf.kl import KLConfig
from rlhf.plots import dress, png
from rlhf.ppo import PPOConfig
from rlhf.recipe import Recipe, check
from rlhf.recipe_file import load_recipe
from rlhf.reference import SelectionConfig

COEFS = (0.0, 0.05, 0.2)
BETAS = (0.03, 0.1, 0.3, 1.0)
BEST_OF = (1, 2, 4, 8, 16, 32)
OFFSETS = dict(zip(TASKS, (-3.0, -1.0, 1.0, 3.0), strict=True))  # of grades, by task
METHODS = ("PPO", "RLOO", "GRPO", "DPO", "best of n")


def end(history: History, name: str) -> float:
    """Mean of the last tenth."""
    last = history[-max(1, len(history) // 10) :]
    return statistics.fmean(line[name] for line in last)


def gains(history: History) -> dict[str, float]:
    """What PPO gained in proxy and gold, and its KL in nats an answer."""
    start = history[0]
    return {
        "proxy": end(history, "score") - start["score"],
        "gold": end(history, "judged") - start["judged"],
        "KL": end(history, "kl") * end(history, "length"),
    }


def of_pairs(lab: Lab) -> dict[str, dict[str, float]]:
    """The reference baseline where the reward model has no prior on its scores."""
    return of_baseline(
        lab.with_proxy("pairs", dataclasses.replace(lab.recipe.reward, l2_weight=0.0))
    )


def of_grades(lab: Lab) -> dict[str, dict[str, float]]:
    """The reference baseline where every task's grades have an offset."""
    return of_baseline(lab.with_grades("grades", OFFSETS))


def of_baseline(lab: Lab) -> dict[str, dict[str, float]]:
    """With and without the reference baseline."""
    found = {}
    scores, tasks = lab.two_scores(), np.array([task_of(text) for text in lab.data.texts])
    for name, used in (("with", True), ("without", False)):
        ppo = dataclasses.replace(lab.recipe.ppo, reference_baseline=used)
        _, history = lab.ppo(f"baseline-{name}", ppo=ppo)
        rewards = scores[:, 1] - (scores[:, 0] if used else 0.0)
        means = [rewards[tasks == task].mean() for task in TASKS]
        start = {
            "tasks apart": float(np.std(means, ddof=1)),
            "reward at start": history[0]["reward"],
        }
        found[name] = {**start, **gains(history)}
    return found


def of_sft(lab: Lab) -> dict[str, dict[str, float]]:
    """With and without the SFT loss."""
    found, start = {}, lab.nll(lab.sft)
    for weight in (0.0, 0.05, 0.5):
        ppo = dataclasses.replace(lab.recipe.ppo, sft_weight=weight)
        policy, history = lab.ppo(f"sft-{weight}", ppo=ppo)
        found[f"weight {weight:g}"] = {"NLL": lab.nll(policy) - start, **gains(history)}
    return found


def of_selection(lab: Lab) -> dict[str, dict[str, float]]:
    """With and without prompt selection: iterations to what the run without it ends at."""
    found, target = {}, None
    for name, selection in (
        ("all prompts", SelectionConfig()),
        ("half of them", SelectionConfig(4, lab_median(lab))),
    ):
        _, history = lab.ppo(f"selection-{name.replace(' ', '-')}", selection=selection)
        score = smoothed([line["score"] for line in history])
        target = 0.95 * score[-1] if target is None else target
        reached = next((n for n, x in enumerate(score, 1) if x >= target), math.inf)
        found[name] = {"iterations": float(reached), **gains(history)}
    return found


def lab_median(lab: Lab) -> float:
    """The median over prompts of the variance of four answers' scores."""
    proxy, _ = lab.answers(4)
    return float(np.median(np.var(proxy, axis=1, ddof=1)))


def smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    """Means of the last `width` values."""
    return [statistics.fmean(values[max(0, n - width + 1) : n + 1]) for n in range(len(values))]


Point = dict[str, float]  # KL in nats an answer, gains of proxy and gold


def of_methods(lab: Lab) -> dict[str, list[list[Point]]]:
    """Method -> curves."""
    plain = lab.recipe.ppo
    grouped = {"samples": 4, "batch_size": plain.batch_size}
    settings: dict[str, dict[str, Any]] = {
        "PPO": {},
        "RLOO": {"advantage": "rloo", **grouped},
        "GRPO": {"advantage": "grpo", **grouped},
    }
    curves: dict[str, list[list[Point]]] = {}
    for method, fields in settings.items():
        curves[method] = []
        for coef in COEFS:
            place = "loss" if method == "GRPO" else "reward"
            kl = KLConfig(coef=coef, place=place)  # type: ignore[arg-type]
            ppo: PPOConfig = dataclasses.replace(plain, kl=kl, **fields)
            _, history = lab.ppo(f"{method}-{coef:g}", ppo=ppo)
            curves[method].append([point(line, history[0]) for line in history])
    start = lab.seen(lab.sft)
    dpo = [point(lab.seen(policy), start) for policy in lab.dpo(BETAS)]
    curves["DPO"] = [sorted(dpo, key=lambda x: x["KL"])]
    curves["best of n"] = [best_of(*lab.answers(max(BEST_OF)))]
    return curves


def point(line: Mapping[str, float], start: Mapping[str, float]) -> Point:
    """Where a policy is, from its metrics."""
    return {
        "KL": max(0.0, line["kl"] * line["length"]),
        "proxy": line["score"] - start["score"],
        "gold": line["judged"] - start["judged"],
    }


def best_of(proxy: np.ndarray, gold: np.ndarray) -> list[Point]:
    """Of n answers the one that the proxy likes best, over disjoint groups of n."""
    points = []
    for n in BEST_OF:
        groups = proxy.reshape(len(proxy), -1, n)
        best = groups.argmax(axis=2)[..., None]
        of_gold = np.take_along_axis(gold.reshape(groups.shape), best, axis=2)
        points.append(
            {
                "KL": math.log(n) - (n - 1) / n,
                "proxy": float(groups.max(axis=2).mean() - proxy.mean()),
                "gold": float(of_gold.mean() - gold.mean()),
            }
        )
    return points


def table(title: str, found: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """A Markdown table of means and ranges over seeds."""
    rows = found[0]
    columns = list(next(iter(rows.values())))
    print(f"\n| {' | '.join((title, *columns))} |\n{'|---' * (len(columns) + 1)}|")
    for name in rows:
        cells = []
        for column in columns:
            values = [seed[name][column] for seed in found]
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


def peaks(curves: Mapping[str, list[list[Point]]]) -> dict[str, dict[str, float]]:
    """Of every curve: the best gold gain, where it was, and where it ended."""
    found = {}
    for method, several in curves.items():
        labels = [f"coefficient {c:g}" for c in COEFS] if len(several) > 1 else [""]
        for label, curve in zip(labels, several, strict=True):
            width = 5 if len(several) > 1 else 1
            gold = smoothed([x["gold"] for x in curve], width)
            kl = smoothed([x["KL"] for x in curve], width)
            at = int(np.argmax(gold))
            found[f"{method} {label}".strip()] = {
                "best gold": gold[at],
                "at KL": kl[at],
                "gold at the end": gold[-1],
                "proxy at the end": smoothed([x["proxy"] for x in curve], width)[-1],
                "KL at the end": kl[-1],
            }
    return found


def draw(curves: Mapping[str, list[list[Point]]], path: Path) -> None:
    """Gold and proxy against the root of the KL, a panel a method."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, len(METHODS), sharey=True)
    for axes, method in zip(panels, METHODS, strict=True):
        dress(axes, method, "square root of KL, nats an answer", "gain over SFT")
        for number, curve in enumerate(curves[method]):
            several = len(curves[method]) > 1
            width = 5 if several else 1
            x = [math.sqrt(kl) for kl in smoothed([p["KL"] for p in curve], width)]
            shade = 0.4 + 0.3 * number if several else 1.0
            label = f", beta {COEFS[number]:g}" if several else ""
            for kind, colour in (("gold", "goldenrod"), ("proxy", "steelblue")):
                y = smoothed([p[kind] for p in curve], width)
                axes.plot(
                    x,
                    y,
                    color=colour,
                    alpha=shade,
                    label=f"{kind}{label}",
                    marker="" if several else "o",
                )
        axes.legend(fontsize=6, frameon=False)
    path.write_bytes(png(figure))


TABLES: Mapping[str, tuple[str, Callable[[Lab], dict[str, dict[str, float]]]]] = {
    "pairs": ("reference baseline, pairs", of_pairs),
    "grades": ("reference baseline, grades", of_grades),
    "sft": ("SFT loss", of_sft),
    "selection": ("prompt selection", of_selection),
}


def of_seed(base: Recipe, out: Path, wanted: Collection[str], seed: int) -> dict[str, Any]:
    """The experiments of a seed by name."""
    recipe = dataclasses.replace(base, seed=seed, output_dir=out / f"seed-{seed}", doctor=False)
    layout, generation = check(recipe)
    jax.config.update("jax_compilation_cache_dir", str(out / "programs"))  # of runs that are alike
    with jax.set_mesh(layout.mesh()):
        lab = new_lab(recipe, layout, generation)
        found: dict[str, Any] = {
            name: of(lab) for name, (_, of) in TABLES.items() if name in wanted
        }
        if "methods" in wanted:
            found["methods"] = of_methods(lab)
    print(f"seed {seed} done", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Run, print, draw."""
    base, _ = load_recipe(Path(__file__).parents[1] / "configs" / "oracle.py")
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    out = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/oracle")
    wanted = sys.argv[3:] or [*TABLES, "methods"]
    workers = min(seeds, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(partial(of_seed, base, out, wanted), range(seeds)))
    (out / "found.json").write_text(json.dumps(found))
    for name, (title, _) in TABLES.items():
        if name in wanted:
            table(title, [seed[name] for seed in found])
    if "methods" in wanted:
        table("over-optimisation", [peaks(seed["methods"]) for seed in found])
        draw(found[0]["methods"], out / "overoptimisation.png")


if __name__ == "__main__":
    main()
