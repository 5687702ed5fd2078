"""Measure how often the longer answer wins in the buckets of length balancing, by pairs and by their weight.

    python benchmarks/balance_weight.py [FILE [LENGTH [TOKENIZER]]]

Without FILE a constructed set: the longer answer wins in rankings of six, the shorter one in single pairs. Prints for
the training side, over the pairs that fit into LENGTH tokens (default: 384) of TOKENIZER (a model's directory; default:
ChatGLM3's rules trained on the pairs, 300 pieces), in lengths of its tokens: all pairs; balanced by number and weighed
by prompt afterwards (the rule until 0.2); as a run trains on them. A row a bucket, and the largest distance from 50 %.
"""

import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

from glm_jax.tokenizers import ChatGLM3Tokenizer, Tokenizer, load_tokenizer
from rlhf.data.accounts import Account
from rlhf.data.balance import Bucket, buckets
from rlhf.data.files.files import FilesData
from rlhf.data.filter_config import FilterConfig
from rlhf.data.mistakes import OnMistake
from rlhf.data.pair_rows import TokenPair, debiased_pairs, token_pairs
from rlhf.data.pairs import PairColumns, PairTable, as_comparison
from rlhf.data.records import Preference, prompt_text


def constructed(path: Path) -> Path:
    """600 rankings of six answers, best and longest first, and 9,000 pairs whose shorter answer is better."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(400)]
    lines = []
    for number in range(600):
        sizes = range(60, 0, -10)
        answers = [" ".join(rng.choices(words, k=size + rng.randint(0, 4))) for size in sizes]
        lines.append({"prompt": f"ranking {number}", "responses": answers})
    for number in range(9000):
        size, more = rng.randint(5, 15), rng.choice([10, 20, 30, 40, 50]) + rng.randint(-4, 4)
        short, long = (" ".join(rng.choices(words, k=k)) for k in (size, size + more))
        lines.append({"prompt": f"pair {number}", "chosen": short, "rejected": long})
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def table(records: list[Preference], pairs: list[TokenPair]) -> PairTable:
    """Columns of the pairs, with lengths in tokens."""
    columns = PairColumns(lambda text: 0)
    for pair in pairs:
        columns.add(as_comparison(records[pair.record]))
    lengths = {
        "chosen_length": np.array([len(pair.chosen) for pair in pairs], np.int32),
        "rejected_length": np.array([len(pair.rejected) for pair in pairs], np.int32),
    }
    return dataclasses.replace(columns.table(), **lengths)


def rates(found: list[Bucket]) -> list[float]:
    """The longer answer's share of the weight, a bucket; NaN without pairs."""
    return [np.nan if bucket.win_rate is None else bucket.win_rate for bucket in found]


def main() -> None:
    """Read, balance, print."""
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(given[0]) if given else constructed(Path(folder) / "constructed.jsonl")
        data = FilesData(preferences=path, mistakes=OnMistake.skip_all())
        records = list(data.undebiased().splits().preferences.train)
    length = int(given[1]) if len(given) > 1 else 384
    texts = (f"{prompt_text(r.prompt)}\n{r.chosen}\n{r.rejected}" for r in records)
    tokenizer: Tokenizer
    tokenizer = (
        load_tokenizer(Path(given[2])) if len(given) > 2 else ChatGLM3Tokenizer.train(texts, 300)
    )
    pairs, account = token_pairs(records, tokenizer, length), Account("preferences", "train")
    config = FilterConfig()
    kept, tokens = debiased_pairs(records, pairs, config, None, account)
    weight = np.array([pair.weight for pair in kept])
    after = table(kept, tokens)
    _, number, counts = np.unique(after.prompt, return_inverse=True, return_counts=True)
    columns = [
        buckets(table(records, pairs)),
        buckets(after, weight=np.ones(len(kept))),
        buckets(after, weight=1 / counts[number]),
        buckets(after, weight=weight),
    ]
    print(
        f"{path.name}: {len(records):,} training pairs, {len(pairs):,} of them fit, {len(kept):,} balanced"
    )
    heads = ("tokens apart", "all", "pairs", "before: pairs", "by weight", "now: by weight")
    print(" | ".join(f"{head:>14}" for head in heads))
    for bucket, *shares in zip(columns[0], *map(rates, columns), strict=True):
        total = bucket.longer_wins + bucket.shorter_wins + bucket.equal
        cells = [bucket.range, f"{total:,}", *(f"{100 * share:.2f} %" for share in shares)]
        print(" | ".join(f"{cell:>14}" for cell in cells))
    far = [np.nanmax(np.abs(np.array(rates(found)) - 0.5)) for found in columns]
    print(f"{'farthest from 50 %':>31} | " + " | ".join(f"{100 * x:>12.4f} %" for x in far))


if __name__ == "__main__":
    main()
