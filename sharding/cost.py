"""What one run of a compiled program takes of every device: products, memory traffic, and bytes that go to others."""

import dataclasses
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sharding.collectives import Collective, collectives
from sharding.errors import UserError
from sharding.flops import flops
from sharding.hlo import Module, parse
from sharding.kernels import kernel, kernel_flops
from sharding.loops import walk
from sharding.traffic import memory_bytes

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


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

    flops: int  # of matrix products, those of attention kernels too
    memory_bytes: int  # read and written, as instructions ask for it
    cycles: int  # what XLA's TPU compiler estimates of its own instructions, kernels and collectives left out
    loops: tuple[Loop, ...]
    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]  # targets of custom calls whose products are not known -> runs

    @property
    def sent_bytes(self) -> int:
        """By all collectives."""
        return sum(x.times * x.sent_bytes for x in self.collectives)


def cost(module: Module) -> Cost:
    """Read from the program's text; every loop's body counts as often as it runs."""
    products, moved, cycles, loops, kernels = 0, 0, 0, [], Counter[str]()
    for visit in walk(module):
        x, computation = visit.instruction, visit.computation
        inside = kernel_flops(computation, x)
        products += visit.times * (flops(computation, x) + inside)
        if not visit.fused:
            moved += visit.times * memory_bytes(module, computation, x)
            said = _CYCLES.search(x.attributes)
            cycles += visit.times * int(said[1]) if said else 0
        if x.opcode == "while":
            loops.append(Loop(x.name, visit.trips, visit.times))
        target = kernel(x)
        if target and not inside:
            kernels[target] += visit.times
    return Cost(products, moved, cycles, tuple(loops), tuple(collectives(module)), kernels)


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
