"""Accelerators and the pods they come in, with the figures that their makers publish."""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping

from sharding.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device; bytes and floating point operations are a second's."""

    name: str
    flops: float  # of products in bfloat16
    memory_bandwidth: float
    memory_bytes: int  # that a program may use
    link_bandwidth: (
        float  # one way, of one link to a neighbour; of a GPU, of all its links together
    )
    network_bandwidth: float  # to other slices, of a GPU to other hosts
    clock: float = 0.0  # cycles a second; 0: not known
    dims: int = 0  # of the torus that its links make; 0: a switch joins the devices of a host
    largest: tuple[int, ...] = ()  # sides of the largest slice; of GPUs the devices of a host
    ring: int = 1  # sides that are multiples of it are closed to a ring
    per_chip: int = 1  # devices that JAX shows of a chip
    host_bandwidth: float = 16e9  # to the host's memory, and as much back

    def utilisation(self, flops: float, seconds: float, devices: int) -> float:
        """The share of the peak of so many devices that so many FLOPs in so many seconds are: the MFU."""
        return flops / (seconds * devices * self.flops)


# Peak figures of Google's and NVIDIA's data sheets. Memory is what a program may use: XLA's own messages say so.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1228e9, int(30.75 * GIB), 45e9, 6.25e9, 1.05e9, 3, (16, 16, 16), 4),
        Chip("v5e", 197e12, 819e9, int(15.75 * GIB), 45e9, 6.25e9, 1.5e9, 2, (16, 16), 16),
        Chip("v5p", 459e12, 2765e9, int(95.74 * GIB), 90e9, 6.25e9, 1.75e9, 3, (16, 20, 28), 4),
        Chip(
            "v6e", 918e12, 1640e9, int(31.25 * GIB), 90e9, 12.5e9, 1.75e9, 2, (16, 16), 16, 1, 32e9
        ),
        Chip("tpu7x", 1153e12, 3690e9, int(94.75 * GIB), 100e9, 6.25e9, 0.0, 3, (16, 24, 24), 4, 2),
        Chip("a100", 312e12, 2039e9, 75 * GIB, 300e9, 25e9, largest=(8,)),
        Chip("h100", 989e12, 3352e9, 75 * GIB, 450e9, 50e9, largest=(8,)),
        Chip("h200", 989e12, 4800e9, 135 * GIB, 450e9, 50e9, largest=(8,)),
        Chip("b200", 2250e12, 8000e9, 175 * GIB, 900e9, 50e9, largest=(8,)),
    )
}

# what a device calls itself (jax.Device.device_kind), in lower case -> its chip
_KINDS = (
    (r"tpu v4", "v4"),
    (r"tpu v5 ?lite|tpu v5e", "v5e"),
    (r"tpu v5", "v5p"),
    (r"tpu v6 ?lite|tpu v6e", "v6e"),
    (r"tpu ?7x", "tpu7x"),
    (r"a100", "a100"),
    (r"h100", "h100"),
    (r"h200", "h200"),
    (r"b200", "b200"),
)


@dataclasses.dataclass(frozen=True)
class Pod:
    """Chips that are joined: slices of a torus of TPUs, or hosts of GPUs."""

    chip: Chip
    sides: tuple[
        int, ...
    ]  # chips along the sides of a slice; of GPUs the hosts and a host's devices
    slices: int = 1  # joined by the data centre's network alone

    @property
    def name(self) -> str:
        """As `find_pod` reads it."""
        if not self.chip.dims:
            return f"{self.chip.name}:{self.num_devices}"
        sides = "x".join(str(side) for side in self.sides)
        return f"{self.chip.name}:{sides}" + (f":{self.slices}" if self.slices > 1 else "")

    @property
    def slice_devices(self) -> int:
        """Devices of a slice; of GPUs all."""
        return math.prod(self.sides) * self.chip.per_chip

    @property
    def num_devices(self) -> int:
        """As JAX shows them."""
        return self.slice_devices * self.slices

    def is_ring(self, dim: int) -> bool:
        """Whether the links along this side lead back to its begin."""
        if self.chip.dims == 3 and any(side % self.chip.ring for side in self.sides):
            return False  # not made of whole cubes
        return self.sides[dim] % self.chip.ring == 0


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None where its figures are not known."""
    kind = device_kind.lower()
    return next((CHIPS[name] for words, name in _KINDS if re.search(words, kind)), None)


def find_pod(name: str) -> Pod:
    """The pod that `name` spells: v5e:16x16, v5p:4x4x8, v5e:16x16:2 for two slices of it, h100:64 for GPUs.

    Raises UserError where there is none, naming the nearest ones.
    """
    kind, _, rest = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        near = difflib.get_close_matches(kind, CHIPS, 3) or list(CHIPS)
        raise UserError(f"unknown pod {name!r}: no chip {kind!r}, there are {', '.join(near)}")
    spelt = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\d+))?", rest)
    sides = tuple(int(side) for side in spelt[1].split("x")) if spelt else ()
    slices = int(spelt[2] or 1) if spelt else 0
    if not chip.dims and len(sides) == 1 and slices == 1:
        (host,), (count,) = chip.largest, sides
        if count and (count < host or count % host == 0):
            return Pod(chip, (max(count // host, 1), min(count, host)))
    found = Pod(chip, sides, slices)
    if slices < 1 or (sides not in _slices(chip) if chip.dims else True):
        size = math.prod(sides)
        closest = sorted(pods(chip), key=lambda pod: abs(math.log(pod.num_devices / max(size, 1))))
        offered = ", ".join(pod.name for pod in closest[:4])
        raise UserError(f"unknown pod {name!r}: there are such as {offered}")
    return found


def pods(chip: Chip) -> tuple[Pod, ...]:
    """What one can have of a chip, one slice each, smallest first."""
    if not chip.dims:
        (host,) = chip.largest
        inside = [Pod(chip, (1, 2**n)) for n in range(host.bit_length())]
        return (*inside, *(Pod(chip, (2**n, host)) for n in range(1, 8)))
    found = (Pod(chip, sides) for sides in _slices(chip))
    return tuple(sorted(found, key=lambda pod: (pod.num_devices, max(pod.sides))))


def _slices(chip: Chip) -> set[tuple[int, ...]]:
    return set(_flat_slices(chip) if chip.dims == 2 else _cube_slices(chip))


def _flat_slices(chip: Chip) -> Iterator[tuple[int, ...]]:
    """1x1, 2x2, 2x4, 4x4, ..., 16x16: squares and what is half of one."""
    yield (1, 1)
    side = 2
    while side <= chip.largest[0]:
        yield (side, side)
        yield from [(side, 2 * side)] if 2 * side <= chip.largest[1] else []
        side *= 2


def _cube_slices(chip: Chip) -> Iterator[tuple[int, ...]]:
    """Parts of a cube of 4x4x4, and all that is made of such cubes."""
    yield from ((1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    ranges = (range(4, side + 1, 4) for side in chip.largest)
    yield from (sides for sides in itertools.product(*ranges) if list(sides) == sorted(sides))
