"""HLO text, as compilers print it, read into computations and instructions.

The grammar is that of https://openxla.org/xla/operation_semantics and of what `compiled.as_text()` gives; layouts,
metadata and whatever else is not needed stay unread.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from sharding.errors import UserError

BITS = {"pred": 8, "token": 0, "opaque": 0}  # of a type whose name does not end in them
_TYPE = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")
_BITS = re.compile(r"^[a-z]+(\d+)")
_SPACE = re.compile(r"S\((\d+)\)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_RESULT = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_NAME = re.compile(r"%?([^\s%,(){}]+)$")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_VALUE = re.compile(rf"{_QUOTED.pattern}|\{{[^}}]*\}}|[^,\s]+")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|called_computations|true_computation|false_computation)=\{?%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Shape(NamedTuple):
    """An array: its type, its dimensions, and how it lies in which memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # 0: the device's memory, others on the chip
    order: tuple[int, ...] = ()  # dimensions, the one that varies fastest first
    tile: tuple[int, ...] = ()  # the last of these dimensions are padded to multiples of it

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Without padding."""
        return -(-self.size * bits(self.dtype) // 8)

    @property
    def stored_bytes(self) -> int:
        """With the padding of its tiles."""
        if not self.tile or len(self.order) != len(self.dims):
            return self.num_bytes
        dims = list(self.dims)
        for place, side in zip(self.order, reversed(self.tile), strict=False):
            dims[place] = -(-dims[place] // side) * side
        return -(-math.prod(dims) * bits(self.dtype) // 8)


Type = Shape | tuple["Type", ...]


@functools.cache
def bits(dtype: str) -> int:
    """Of an element: 16 of bf16, 8 of f8e4m3fn and pred."""
    found = _BITS.match(dtype)
    return BITS[dtype] if dtype in BITS else int(found[1]) if found else 0


def arrays(kind: Type) -> Iterator[Shape]:
    """Every array of a type, tuples within tuples included."""
    if isinstance(kind, Shape):
        yield kind
    else:
        for part in kind:
            yield from arrays(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: Type
    operands: tuple[str, ...]  # names; of a constant or parameter what stands in its parentheses
    attributes: str  # the rest of the line

    @functools.cached_property
    def _plain(self) -> str:
        """The attributes, blank where they are quoted."""
        return _QUOTED.sub(lambda found: " " * len(found[0]), self.attributes)

    def attribute(self, name: str) -> str | None:
        """The value of `name=value`, with the braces around it or without quotes; None where there is none."""
        found = re.search(rf"\b{name}=", self._plain)
        value = _VALUE.match(self.attributes, found.end()) if found else None
        return value[0].strip('"') if value else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The numbers of an attribute such as `dimensions={0,2}`; none where there is none."""
        return tuple(int(x) for x in re.findall(r"-?\d+", self.attribute(name) or ""))

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it names."""
        found = [*_CALLED.findall(self._plain)]
        for names in _BRANCHES.findall(self._plain):
            found += [name.strip().lstrip("%") for name in names.split(",")]
        return tuple(found)

    @property
    def arrays(self) -> tuple[Shape, ...]:
        """Of the result."""
        return tuple(arrays(self.type))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they are printed, which is that of the schedule where there is one."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @functools.cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """By their numbers."""
        return {
            int(x.operands[0]): x for x in self.instructions.values() if x.opcode == "parameter"
        }

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """Name -> the instructions that take it, in order."""
        found: dict[str, list[Instruction]] = {}
        for x in self.instructions.values():
            if x.opcode not in ("constant", "parameter"):
                for name in dict.fromkeys(x.operands):
                    found.setdefault(name, []).append(x)
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A program."""

    name: str
    computations: Mapping[str, Computation]
    entry: Computation
    num_partitions: int  # devices that run it together

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def read(compiled: jax.stages.Compiled) -> Module:
    """The module of a compiled program. Raises UserError where its backend does not print it."""
    text = compiled.as_text()
    if text is None:
        raise UserError("the program cannot be read: its backend prints no HLO")
    return parse(text)


def parse(text: str, where: str = "the program") -> Module:
    """Read a module. Raises UserError, with `where` and the line, where the text is none."""
    name, partitions = "", 1
    computations: dict[str, Computation] = {}
    entry: str | None = None
    current: str | None = None
    found: dict[str, Instruction] = {}
    root: Instruction | None = None
    for number, line in _lines(text):
        if line.startswith("HloModule "):
            name = line.split()[1].rstrip(",")
            counts = re.search(r"\bnum_partitions=(\d+)", line)
            replicas = re.search(r"\breplica_count=(\d+)", line)
            partitions = int(counts[1]) if counts else int(replicas[1]) if replicas else 1
        elif current is None:
            header = _HEADER.match(line)
            if header:
                current, found, root = header[2], {}, None
                entry = current if header[1] else entry
        elif line.startswith("}"):
            root = root or next(reversed(found.values()), None)
            if root is None:
                raise UserError(f"{where}:{number}: computation {current} is empty")
            computations[current] = Computation(current, found, root)
            current = None
        elif line.strip():
            try:
                instruction, is_root = _instruction(line)
            except (ValueError, KeyError, TypeError, IndexError):
                raise UserError(
                    f"{where}:{number}: no HLO instruction: {line.strip()[:80]}"
                ) from None
            found[instruction.name] = instruction
            root = instruction if is_root else root
    if current is not None:
        raise UserError(f"{where}: the text ends within computation {current}")
    if entry is None or not name:
        raise UserError(f"{where} is no HLO module: give what compiled.as_text() prints")
    return Module(name, computations, computations[entry], partitions)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The text's lines and their numbers; an instruction whose attributes go on in further lines is one."""
    held: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), 1):
        if held and _goes_on(line) and _is_open(" ".join(held)):
            held.append(line)
            continue
        if held:
            yield first, " ".join(held)
        held, first = [line], number
    if held:
        yield first, " ".join(held)


def _goes_on(line: str) -> bool:
    """Whether a line begins nothing of its own: no instruction, computation or its end."""
    if not line or line[0] == " ":
        return bool(line) and _RESULT.match(line) is None and not line.isspace()
    return line.rstrip() != "}" and not line.startswith("HloModule ") and not _HEADER.match(line)


def _is_open(text: str) -> bool:
    plain = _QUOTED.sub("", text)
    return plain.count("{") > plain.count("}")


def _instruction(line: str) -> tuple[Instruction, bool]:
    result = _RESULT.match(line)
    if result is None:
        raise ValueError(line)
    kind, place = _type(line, result.end())
    opcode = _OPCODE.match(line, place)
    if opcode is None:
        raise ValueError(line)
    end = _closing(line, opcode.end() - 1)
    inside = _COMMENT.sub("", line[opcode.end() : end])
    if opcode[1] in ("constant", "parameter"):
        operands: tuple[str, ...] = (inside.strip(),)
    else:
        names = (_NAME.search(part.strip()) for part in _split(inside))
        operands = tuple(name[1] for name in names if name)
    instruction = Instruction(result[2], opcode[1], kind, operands, line[end + 1 :].lstrip(", "))
    return instruction, bool(result[1])


def _type(line: str, place: int) -> tuple[Type, int]:
    """The type that stands at `place`, and where it ends."""
    if line[place] == "(":
        parts: list[Type] = []
        place += 1
        while line[place] != ")":
            skipped = re.compile(r"(?:\s|,|/\*.*?\*/)*").match(line, place)
            place = skipped.end() if skipped else place
            if line[place] != ")":
                part, place = _type(line, place)
                parts.append(part)
        return tuple(parts), place + 1
    found = _TYPE.match(line, place)
    if found is None:
        raise ValueError(line)
    dims = tuple(int(x.lstrip("<=")) for x in found[2].split(",") if x)
    layout = found[3] or ""
    space, tile = _SPACE.search(layout), _TILE.search(layout)
    order = re.findall(r"\d+", layout.partition(":")[0])
    shape = Shape(
        found[1],
        dims,
        int(space[1]) if space else 0,
        tuple(int(x) for x in order),
        tuple(int(x) for x in tile[1].split(",")) if tile else (),
    )
    return shape, found.end()


def _closing(line: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes; quoted text is skipped."""
    depth, quoted, place = 0, False, opening
    while True:
        letter = line[place]
        if letter == '"' and line[place - 1] != "\\":
            quoted = not quoted
        elif not quoted and letter in "({":
            depth += 1
        elif not quoted and letter in ")}":
            depth -= 1
            if not depth:
                return place
        place += 1
        if place == len(line):
            raise ValueError(line)


def _split(text: str) -> Iterator[str]:
    """At the commas that stand in no braces, brackets or parentheses."""
    depth = start = 0
    for place, letter in enumerate(text):
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and not depth:
            yield text[start:place]
            start = place + 1
    if text[start:].strip():
        yield text[start:]
