"""What the collectives of a program move: which devices talk, and how many bytes each of them sends."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sharding.hlo import Computation, Instruction, Module
from sharding.loops import Visit, walk

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# a fusion of this name wraps an all-reduce of which every device keeps its part: that is a reduce-scatter
SCATTERED = "all-reduce-scatter"
_MESH = re.compile(r"'([^']+)'=(\d+)")
# between TPU slices a collective is a message to the runtime, which brings back the result
_ACROSS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}')

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program; bytes and devices of one run of it."""

    kind: str
    name: str  # of the instruction
    groups: (
        Groups  # of devices, by their place in the mesh; of a permute its pairs, source and target
    )
    num_bytes: int  # of the whole data that a device gives or takes: what is gathered, reduced, or passed on
    times: int  # runs

    @property
    def group_size(self) -> int:
        """Devices of a group; of a permute 2."""
        return len(self.groups[0]) if self.groups else 1

    @property
    def sent_bytes(self) -> int:
        """What one device sends in one run: (n - 1) / n of the data, twice where it is reduced and given back."""
        if self.kind == "collective-permute":
            return self.num_bytes
        once = self.num_bytes * (self.group_size - 1) // self.group_size
        return 2 * once if self.kind == "all-reduce" else once

    def at(self, places: Sequence[int]) -> "Collective":
        """With its devices numbered by where each stands."""
        groups = tuple(tuple(places[device] for device in group) for group in self.groups)
        return dataclasses.replace(self, groups=groups)

    def axes(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ; `sizes` of the mesh, in order."""
        shape = tuple(sizes.values())
        varying: set[int] = set()
        for group in self.groups:
            places = np.stack(np.unravel_index(np.array(group), shape))
            varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
        return tuple(name for number, name in enumerate(sizes) if number in varying)


def collectives(module: Module) -> Iterator[Collective]:
    """Those of a program that move anything, in the order of its schedule.

    One that runs in the background may be spread over several fusions, which say the same channel: it counts once.
    """
    seen: set[tuple[str, str]] = set()
    for visit in walk(module):
        x, channel = visit.instruction, visit.instruction.attribute("channel_id")
        if kind_of(x) is None:
            continue
        if channel is not None and visit.computation.name != visit.within:
            if (channel, visit.within) in seen:
                continue
            seen.add((channel, visit.within))
        found = collective(visit, module.num_partitions)
        if found.group_size > 1:
            yield found


def kind_of(x: Instruction) -> str | None:
    """What collective an instruction starts; None where it starts none."""
    if x.opcode == "send":
        across = _ACROSS.search(x.attributes)
        return across[1].lower().replace("_", "-") if across else None
    kind = x.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def rendezvous(x: Instruction) -> str | None:
    """What the two messages of a collective between slices have in common."""
    found = _RENDEZVOUS.search(x.attributes)
    return found[1] if found else None


def count_collectives(module: Module) -> Counter[str]:
    """How many instructions of each kind the text has; one in a loop's body counts once."""
    kinds = (
        x.opcode.removesuffix("-start")
        for computation in module.computations.values()
        for x in computation.instructions.values()
    )
    return Counter(kind for kind in kinds if kind in KINDS)


def collective(visit: Visit, num_devices: int) -> Collective:
    """The one that an instruction starts; `num_devices` run the program, of several slices those of one."""
    x, computation = visit.instruction, visit.computation
    kind = kind_of(x) or x.opcode
    given = sum(_num_bytes(computation, name) for name in x.operands)
    if x.opcode == "send":
        data = _num_bytes(computation, x.operands[0])
        return Collective(kind, x.name, _across_slices(x, num_devices), data, visit.times)
    if kind == "collective-permute":
        numbers = [int(n) for n in re.findall(r"\d+", _nested(x, "source_target_pairs"))]
        pairs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        return Collective(kind, x.name, pairs, given, visit.times)
    groups = replica_groups(x, num_devices)
    whole = given * len(groups[0]) if kind == "all-gather" else given
    if kind == "all-reduce" and computation.name.startswith(SCATTERED):
        kind = "reduce-scatter"
    return Collective(kind, x.name, groups, whole, visit.times)


def _across_slices(x: Instruction, slice_devices: int) -> Groups:
    """The same device of every slice; devices of a slice are numbered one after the other."""
    found = _SLICES.search(x.attributes)
    count = len(found[1].split(",")) if found else 2
    ids = np.arange(count * slice_devices).reshape(count, slice_devices)
    return _rows(ids.T, [count])


def replica_groups(x: Instruction, num_devices: int) -> Groups:
    """The devices that talk to each other, from any of the three ways in which HLO spells them.

    {{0,1},{2,3}}; [2,2]<=[2,2]T(1,0), which numbers devices in a transposed order; and mesh['a'=2,'b'=2] {'a'}.
    """
    text = x.attributes.partition("replica_groups=")[2]
    if text.startswith("mesh["):
        sizes, _, rest = text[len("mesh[") :].partition("]")
        axes = {name: int(size) for name, size in _MESH.findall(sizes)}
        talking = re.findall(r"'([^']+)'", rest.partition("{")[2].partition("}")[0])
        ids = np.arange(num_devices).reshape(tuple(axes.values()))
        last = [list(axes).index(name) for name in talking]
        return _rows(np.moveaxis(ids, last, range(-len(last), 0)), [axes[n] for n in talking])
    listed = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if listed:
        shape, order = _numbers(listed[1]), _numbers(listed[2])
        ids = np.arange(num_devices).reshape(order)
        if listed[3]:
            ids = ids.transpose(_numbers(listed[3]))
        return _rows(ids, shape[1:])
    groups = re.findall(r"\{([\d,]+)\}", _nested(x, "replica_groups"))
    if not groups:  # all of them
        return (tuple(range(num_devices)),)
    return tuple(tuple(_numbers(group)) for group in groups)


def _rows(ids: np.ndarray, group: Sequence[int]) -> Groups:
    return tuple(tuple(row) for row in ids.reshape(-1, int(np.prod(group))).tolist())


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _nested(x: Instruction, name: str) -> str:
    """The value of `name={{...},{...}}`."""
    text = x.attributes.partition(f"{name}=")[2]
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[: place + 1]
    return text


def _num_bytes(computation: Computation, name: str) -> int:
    return sum(shape.num_bytes for shape in computation[name].arrays)
