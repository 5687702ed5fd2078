"""How long collectives take on the links of a pod."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sharding.chips import Pod
from sharding.collectives import Collective, Groups

HOP_SECONDS = 1e-6  # from a device to its neighbour, whatever is sent

Link = tuple[int, int]  # dimension of the torus (-1: the network) and direction


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One run of a collective."""

    seconds: float
    links: frozenset[Link]  # that it keeps busy


def transfer(collective: Collective, pod: Pod) -> Transfer:
    """How long it takes where nothing else is on its links.

    Devices are numbered along the pod's sides, the last side fastest.
    """
    groups, kind, size = collective.groups, collective.kind, collective.num_bytes
    if kind == "collective-permute":
        return _permuted(groups, size, pod)
    shape = _shape(groups[0], pod)
    if not pod.chip.dims:
        return _switched(shape, collective, pod)
    seconds, links = 0.0, set[Link]()
    twice = 2 if kind == "all-reduce" else 1
    if shape.slices > 1:  # every device of a slice takes its part across
        part = size * (shape.slices - 1) / shape.slices / max(shape.within, 1)
        seconds += twice * part / pod.chip.network_bandwidth + 10 * HOP_SECONDS
        links.add((-1, 0))
    if shape.within > 1:
        links |= {(side.dim, way) for side in shape.sides for way in (0, 1)}
        if kind == "all-to-all":
            seconds += max(side.crossed(size) for side in shape.sides) / pod.chip.link_bandwidth
        else:
            lanes = sum(side.lanes for side in shape.sides)
            moved = size * (shape.within - 1) / shape.within
            seconds += twice * moved / (lanes * pod.chip.link_bandwidth)
        seconds += twice * HOP_SECONDS * sum(side.hops for side in shape.sides)
    return Transfer(seconds, frozenset(links))


@dataclasses.dataclass(frozen=True)
class _Side:
    """What a group of devices has of one dimension of the torus."""

    dim: int
    devices: int
    step: int  # from one of them to the next
    is_ring: bool

    @property
    def lanes(self) -> float:
        """Links that bring data to a device at a time; groups that lie between each other share theirs."""
        return (2 if self.is_ring else 1) / self.step

    @property
    def hops(self) -> float:
        """Between the devices that are farthest apart."""
        return self.devices * self.step * (0.5 if self.is_ring else 1)

    def crossed(self, size: int) -> float:
        """Bytes on the busiest link of an all-to-all, of which every device has `size`."""
        return size * self.devices * self.step / (8 if self.is_ring else 4)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Where the devices of a group lie."""

    slices: int  # of GPUs: hosts
    within: int  # devices of a slice or host
    sides: tuple[_Side, ...]


@lru_cache(maxsize=1000)
def _shape(group: Sequence[int], pod: Pod) -> _Shape:
    places = _places(np.array(group), pod)
    slices = len(np.unique(places[:, 0]))
    within = len(group) // slices
    sides = []
    for dim in range(1, places.shape[1]):
        seen = np.unique(places[:, dim])
        if len(seen) > 1:
            step = int(np.diff(seen).min())
            is_ring = pod.is_ring(dim - 1) and len(seen) * step == pod.sides[dim - 1]
            sides.append(_Side(dim - 1, len(seen), step, is_ring))
    if not sides and within > 1:  # the devices of one chip
        sides = [_Side(0, within, 1, False)]
    return _Shape(slices, within, tuple(sides))


def _places(devices: np.ndarray, pod: Pod) -> np.ndarray:
    """[device, slice and coordinates of the torus]; of GPUs [device, host]."""
    if not pod.chip.dims:
        return devices[:, None] // pod.sides[-1]
    slices, within = np.divmod(devices, pod.slice_devices)
    coordinates = np.unravel_index(within // pod.chip.per_chip, pod.sides)
    return np.stack([slices, *coordinates], axis=1)


def _switched(shape: _Shape, collective: Collective, pod: Pod) -> Transfer:
    """GPUs: of a host through its switch, between hosts through the network card of each."""
    twice = 2 if collective.kind == "all-reduce" else 1
    part = collective.num_bytes * (1 - 1 / collective.group_size)
    seconds, links = part / pod.chip.link_bandwidth, {(0, 0)}
    if shape.slices > 1:
        across = collective.num_bytes * (1 - 1 / shape.slices) / shape.within
        seconds = max(seconds, across / pod.chip.network_bandwidth)
        links.add((-1, 0))
    return Transfer(twice * seconds + 10 * HOP_SECONDS, frozenset(links))


@lru_cache(maxsize=1000)
def _loads(pairs: Groups, pod: Pod) -> tuple[int, int, frozenset[Link]]:
    """Messages on the busiest link, hops of the longest way, and links, where every pair goes the shortest way."""
    loads: Counter[tuple[Link, tuple[int, ...]]] = Counter()
    longest = 0
    ends = np.array(pairs, int).reshape(-1, 2)  # compilers of GPUs leave permutes of no pair
    sources, targets = _places(ends[:, 0], pod), _places(ends[:, 1], pod)
    for device, source, target in zip(
        ends[:, 0].tolist(), sources.tolist(), targets.tolist(), strict=True
    ):
        if source[0] != target[0] or not pod.chip.dims:
            # a GPU has a way to the switch and a network card of its own
            own = tuple(source) if pod.chip.dims else (device,)
            loads[(-1 if source[0] != target[0] else 0, 0), own] += 1
            continue
        at, hops = source[1:], 0
        for dim, side in enumerate(pod.sides):
            way = target[1 + dim] - at[dim]
            if pod.is_ring(dim) and abs(way) > side / 2:
                way -= side if way > 0 else -side
            for _ in range(abs(way)):
                loads[(dim, int(way > 0)), tuple(at)] += 1
                at[dim] = (at[dim] + (1 if way > 0 else -1)) % side
            hops += abs(way)
        longest = max(longest, hops)
    return max(loads.values(), default=0), longest, frozenset(link for link, _ in loads)


def _permuted(pairs: Groups, size: int, pod: Pod) -> Transfer:
    busiest, hops, links = _loads(pairs, pod)
    across = (-1, 0) in links
    bandwidth = pod.chip.network_bandwidth if across else pod.chip.link_bandwidth
    return Transfer(busiest * size / bandwidth + HOP_SECONDS * (hops + 1), links)
