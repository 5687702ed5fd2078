"""What one run of a compiled program takes of every device: products, and bytes that go to others."""

import dataclasses
import gzip
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sharding.collectives import Collective, collectives
from sharding.errors import UserError
from sharding.flops import flops, kernel
from sharding.hlo import Module, parse
from sharding.loops import walk


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a program."""

    name: str
    trips: (
        int | None
    )  # rounds once it has begun; None: the text does not tell, and its body counts once
    times: int  # it is begun


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run, for one device."""

    flops: int  # of matrix products; those of `kernels` are not known
    loops: tuple[Loop, ...]
    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]  # targets of custom calls -> runs

    @property
    def sent_bytes(self) -> int:
        """By all collectives."""
        return sum(x.times * x.sent_bytes for x in self.collectives)


def cost(module: Module) -> Cost:
    """Read from the program's text; every loop's body counts as often as it runs."""
    products, loops, kernels = 0, [], Counter[str]()
    for visit in walk(module):
        x = visit.instruction
        products += visit.times * flops(visit.computation, x)
        if x.opcode == "while":
            loops.append(Loop(x.name, visit.trips, visit.times))
        if target := kernel(x):
            kernels[target] += visit.times
    return Cost(products, tuple(loops), tuple(collectives(module)), kernels)


def read_file(path: Path) -> Module:
    """The module in a file of HLO text, compressed with gzip or not. Raises UserError where there is none."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        text = content.decode()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no HLO text: give what compiled.as_text() prints") from None
    return parse(text, str(path))
