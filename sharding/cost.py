"""What a compiled program costs, read from the program itself."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", re.MULTILINE)
_LOOP = re.compile(r" while\(.*?body=%?([\w.\-]+)")


def count_collectives(text: str) -> Counter[str]:
    """How many instructions of each kind the HLO text has; one in a loop's body counts once."""
    return Counter(_INSTRUCTION.findall(text))


def computations(text: str) -> Mapping[str, str]:
    """Name -> text of every computation of an HLO module."""
    starts = [(match.group(1), match.start()) for match in _COMPUTATION.finditer(text)]
    ends = [start for _, start in starts[1:]] + [len(text)]
    return {name: text[start:end] for (name, start), end in zip(starts, ends, strict=True)}


def loop_bodies(text: str) -> Iterator[str]:
    """The text of every loop's body."""
    found = computations(text)
    for name in _LOOP.findall(text):
        yield found[name]
