"""How often the loops of a program go round, found by following the integers that their conditions look at.

Where a loop has so many rounds at most and may end earlier, as decoding does once every answer has ended, the most of
them count.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sharding.hlo import Computation, Instruction, Module, Shape

MOST = 100_000  # rounds beyond which the text is taken not to tell

PARTS = ("fusion", "async-start", "call-start")  # what is made of another computation
CALLS = (*PARTS, "call", "conditional")  # what runs other computations once
_UNARY = (
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "copy-start",
    "copy-done",
    "optimization-barrier",
)
_BINARY: Mapping[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
_COMPARED: Mapping[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "NE": lambda a, b: a != b,
    "EQ": lambda a, b: a == b,
}

# An integer, a tuple of such values, or None: not known
Value = Any


class _Scalars:
    """The integers of one computation, of which the parameters are known as far as `arguments` are."""

    def __init__(self, module: Module, computation: Computation, arguments: Mapping[int, Value]):
        self._module = module
        self._computation = computation
        self._arguments = arguments
        self._known: dict[str, Value] = {}

    def __call__(self, name: str) -> Value:
        if name not in self._known:
            self._known[name] = None  # of what depends on itself nothing is known
            self._known[name] = self._value(self._computation[name])
        return self._known[name]

    def _value(self, x: Instruction) -> Value:
        if x.opcode == "parameter":
            return self._arguments.get(int(x.operands[0]))
        if x.opcode == "constant":
            return _integer(x)
        if x.opcode == "tuple":
            return tuple(self(name) for name in x.operands)
        if x.opcode == "get-tuple-element":
            whole = self(x.operands[0])
            return None if whole is None else whole[x.numbers("index")[0]]
        if x.opcode in ("fusion", "call"):
            inner = self._module[x.called[0]]
            arguments = {place: self(name) for place, name in enumerate(x.operands)}
            return _Scalars(self._module, inner, arguments)(inner.root.name)
        if isinstance(x.type, Shape) and x.type.dims not in ((), (1,)):
            return None
        if x.opcode in _UNARY:
            return self(x.operands[0])
        if x.opcode not in _BINARY and x.opcode != "compare":
            return None
        a, b = (self(name) for name in x.operands)
        if x.opcode == "and" and isinstance(x.type, Shape) and x.type.dtype == "pred":
            a, b = (
                (b if a is None else a),
                (a if b is None else b),
            )  # what is not known ends nothing
        if a is None or b is None:
            return None
        if x.opcode == "compare":
            return int(_COMPARED[x.attribute("direction") or "EQ"](a, b))
        return _BINARY[x.opcode](a, b)


def _integer(x: Instruction) -> int | None:
    text = x.operands[0].strip("{} ")
    if text in ("true", "false"):
        return int(text == "true")
    return int(text) if text.lstrip("-").isdecimal() else None


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the `while` instruction `loop` of `computation` runs its body, at most; None: the text does not tell.

    What the compiler says of it (known_trip_count) counts; else the counter is followed from where it starts, round
    by round, until the condition fails.
    """
    said = loop.attributes.partition("known_trip_count")[2]
    if said:
        digits = "".join(c if c.isdecimal() else " " for c in said[:40]).split()
        return int(digits[0])
    names = {name: loop.attribute(name) or "" for name in ("condition", "body")}
    condition, body = (module[names[name].lstrip("%")] for name in ("condition", "body"))
    state = _Scalars(module, computation, {})(loop.operands[0])
    if state is None:
        return None
    for rounds in range(MOST):
        goes_on = _Scalars(module, condition, {0: state})(condition.root.name)
        if goes_on is None:
            return None
        if not goes_on:
            return rounds
        after = _Scalars(module, body, {0: state})(body.root.name)
        if after is None or after == state:
            return None
        state = after
    return None


class Visit(NamedTuple):
    """An instruction that a run of a program comes to."""

    instruction: Instruction
    computation: Computation  # that it stands in
    times: int
    within: str  # the loop's body, or the entry, that runs it
    trips: int | None = None  # of a `while`: `trips`
    fused: bool = False  # part of another instruction, which the schedule has


def walk(
    module: Module,
    computation: Computation | None = None,
    times: int = 1,
    within: str = "",
    fused: bool = False,
) -> Iterator[Visit]:
    """Every instruction of a program, in the order of its schedule.

    A loop's body is walked once, as often as it is run; one whose rounds are not known counts once. Of a conditional
    every branch is walked. What a fusion does comes after the fusion.
    """
    computation = module.entry if computation is None else computation
    within = within or computation.name
    for x in computation.instructions.values():
        rounds = trips(module, computation, x) if x.opcode == "while" else None
        yield Visit(x, computation, times, within, rounds, fused)
        if x.opcode == "while":
            body = module[(x.attribute("body") or "").lstrip("%")]
            yield from walk(module, body, times * (1 if rounds is None else rounds))
        elif x.opcode in CALLS:
            inside = fused or x.opcode in PARTS
            for name in x.called:
                yield from walk(module, module[name], times, within, inside)
