"""Bytes that an instruction moves through the device's memory; what lies on the chip moves none."""

from collections.abc import Iterator
from typing import NamedTuple

from sharding.hlo import Computation, Instruction, Module, Shape, arrays

# what moves nothing by itself: names of what is there, and what is counted where its parts run
STILL = (
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
)
# in the background, between memories
COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
DEVICE, HOST = 0, 5  # memory spaces; the others are on the chip
_SLICES = ("dynamic-slice", "slice", "gather")


class Copy(NamedTuple):
    """One that runs in the background; memory spaces of its ends."""

    num_bytes: int
    source: int
    target: int


def copied(x: Instruction) -> Copy:
    """What an instruction of `COPIES` moves."""
    assert not isinstance(x.type, Shape)
    (first, *more), (second, *_) = (tuple(arrays(part)) for part in x.type[:2])
    if x.opcode == "copy-start":  # target, source
        return Copy(first.stored_bytes, second.space, first.space)
    if x.opcode == "dynamic-update-slice-start":  # what is written into, what is written
        return Copy(more[0].stored_bytes, more[0].space, first.space)
    return Copy(second.stored_bytes, first.space, second.space)


def memory_bytes(module: Module, computation: Computation, x: Instruction) -> int:
    """Read and written by one run of a scheduled instruction, the padding of tiles included.

    Of an array that is only cut from, the part that is cut; of one that is written into, the part that is written.
    What runs in the background counts where it starts.
    """
    if x.opcode in STILL or x.opcode.endswith("-done"):
        return 0
    if x.opcode == "fusion":
        inner = module[x.called[0]]
        return sum(_read(module, inner, n) for n in inner.parameters) + _written(inner, inner.root)
    if x.opcode in COPIES:
        copy = copied(x)
        return copy.num_bytes * [copy.source, copy.target].count(DEVICE)
    if x.opcode in _SLICES:
        source = computation[x.operands[0]].arrays[0]
        cut = sum(shape.stored_bytes for shape in x.arrays)
        return _sum(x.arrays) + (cut if source.space == DEVICE else 0)
    if x.opcode == "dynamic-update-slice":
        return _written(computation, x) + _sum(computation[x.operands[1]].arrays)
    return _sum(x.arrays) + sum(_sum(computation[name].arrays) for name in x.operands)


def _read(module: Module, computation: Computation, number: int) -> int:
    """What a fused computation reads of its parameter."""
    parameter = computation.parameters[number]
    whole = _sum(parameter.arrays)
    if not whole:
        return 0
    found = 0
    for name, user in _users(computation, parameter.name):
        if user.opcode in _SLICES and user.operands[0] == name:
            found += sum(shape.stored_bytes for shape in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # only written into
        elif user.opcode == "fusion":
            inner = module[user.called[0]]
            places = (n for n, operand in enumerate(user.operands) if operand == name)
            found += sum(_read(module, inner, n) for n in places)
        else:
            return whole
    return min(found, whole)


def _users(computation: Computation, name: str) -> Iterator[tuple[str, Instruction]]:
    """Those that take an array, also under another shape, and its name there."""
    for user in computation.users.get(name, ()):
        if user.opcode == "bitcast":
            yield from _users(computation, user.name)
        elif user.opcode != "tuple":  # handed through
            yield name, user


def _written(computation: Computation, x: Instruction) -> int:
    if x.opcode == "tuple":
        return sum(_written(computation, computation[name]) for name in x.operands)
    if x.opcode in ("parameter", "get-tuple-element", "custom-call") or not _sum(x.arrays):
        return 0  # handed through, or on the chip
    if x.opcode == "bitcast":
        return _written(computation, computation[x.operands[0]])
    if x.opcode == "dynamic-update-slice":
        return sum(shape.stored_bytes for shape in computation[x.operands[1]].arrays)
    return _sum(x.arrays)


def _sum(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.stored_bytes for shape in shapes if shape.space == DEVICE)
