"""What length balancing and the prior on scores do for a reward model whose training pairs say that longer is better.

    JAX_PLATFORMS=cpu python benchmarks/length_bias.py [SEEDS]    # default: 3; about 3 minutes each

The pipeline of configs/demo.py up to its reward model, of whose training pairs those with the shorter answer preferred
are thinned to a fifth (lengths in characters). From one SFT model a seed, four reward models: of the pairs as they are;
of as many of these as balancing leaves, drawn at random; balanced; balanced without the prior. Prints held-out accuracy
of all pairs, of those with the shorter answer preferred and of those with the longer one (nobody thinned these), the
share of pairs in which the longer answer gets the higher score, and the standard deviation of scores; then the means
over seeds.
"""

import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.model import init_model
from glm_jax.scalar import scalar_model
from glm_jax.tokenizers import ChatGLM3Tokenizer
from rlhf.data.batches import in_order, sft_rows, shuffled
from rlhf.data.filter_config import FilterConfig
from rlhf.data.filters import kept, select, survey
from rlhf.data.pair_rows import judged_rows, token_pairs
from rlhf.data.reading import Found
from rlhf.data.records import Comparison, Preference, prompt_text, uniform_hash
from rlhf.recipe import Recipe
from rlhf.recipe_file import load_recipe
from rlhf.reward import Heldout, train_reward
from rlhf.sft import train_sft
from sharding.layout import Layout

SHARE = 0.2  # of pairs whose shorter answer is preferred that stay
FIGURES = ("pairs", "all", "shorter", "longer", "says longer", "std")


def draw(pair: Preference, seed: int, purpose: str) -> float:
    """A number in [0, 1) of a pair's own."""
    return uniform_hash(seed, purpose, prompt_text(pair.prompt), pair.chosen, pair.rejected)


def planted(pairs: list[Preference], seed: int) -> list[Preference]:
    """Pairs that say that longer is better."""
    return [
        pair
        for pair in pairs
        if len(pair.chosen) >= len(pair.rejected) or draw(pair, seed, "planted") < SHARE
    ]


def balanced(pairs: list[Preference], seed: int) -> list[Preference]:
    """Through the filters; those that can be off are, but for length balancing."""
    config = FilterConfig(min_prompt_chars=0, votes="each", cycles="keep", weigh="pair", seed=seed)
    found = [Found("", Comparison(p.prompt, (p.chosen, p.rejected), (1, 2))) for p in pairs]
    return [pair for _, pair in kept(found, select(survey(found, config, len), config))]


def of_seed(demo: Recipe, seed: int) -> dict[str, list[float]]:
    """run -> FIGURES."""
    splits, layout = demo.data.splits(), Layout()
    texts = (prompt_text(r.prompt) + r.response for r in splits.sft.train)
    tokenizer = ChatGLM3Tokenizer.train(texts, demo.model.vocab_size)
    heldout = list(splits.preferences.heldout)
    asked = token_pairs(heldout, tokenizer, demo.length)
    graded = judged_rows(heldout, asked, demo.length)
    pairs = [heldout[pair.record] for pair in asked]
    gap = np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    biased = planted(list(splits.preferences.train), seed)
    fair = balanced(biased, seed)
    fewer = sorted(biased, key=lambda pair: draw(pair, seed, "fewer"))[: len(fair)]
    no_prior = dataclasses.replace(demo.reward, l2_weight=0.0)
    runs = {
        "as they are": (biased, demo.reward),
        "as they are, as many": (fewer, demo.reward),
        "balanced": (fair, demo.reward),
        "balanced, no prior": (fair, no_prior),
    }

    def silent(*_: Any) -> None:
        pass

    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(init_model, demo.model, layout))(jax.random.key(seed))
        rows = sft_rows(splits.sft.train, tokenizer, demo.length)
        batches = shuffled(rows, demo.sft.batch_size, seed)
        trunk = train_sft(model, demo.sft, batches, layout, silent).trunk
        found = {}
        for name, (train, config) in runs.items():
            judged = judged_rows(train, token_pairs(train, tokenizer, demo.length), demo.length)
            start = scalar_model(trunk, layout, jax.random.key(seed + 1))
            batches = shuffled(judged, config.batch_size, seed)
            reward = train_reward(start, config, batches, layout, silent)
            scores = Heldout(in_order(graded, 64), layout).scores(reward)
            right = scores[0] > scores[1]
            found[name] = [
                len(train),
                right.mean(),
                right[gap < 0].mean(),
                right[gap > 0].mean(),
                np.where(gap > 0, right, ~right)[gap != 0].mean(),
                np.std(scores),
            ]
            print(line(name, str(seed), found[name]), flush=True)
    return found


def line(name: str, seed: str, figures: list[float]) -> str:
    """A row of the table."""
    return f"{name:20} {seed:>4} {figures[0]:11.0f} " + " ".join(f"{x:11.3f}" for x in figures[1:])


def main() -> None:
    """Train and print."""
    demo, _ = load_recipe(Path(__file__).parents[1] / "configs" / "demo.py")
    print(f"{'':20} seed " + " ".join(f"{name:>11}" for name in FIGURES))
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    results = [of_seed(demo, seed) for seed in seeds]
    for name in results[0]:
        columns = zip(*(result[name] for result in results), strict=True)
        print(line(name, "mean", [statistics.fmean(column) for column in columns]))


if __name__ == "__main__":
    main()
