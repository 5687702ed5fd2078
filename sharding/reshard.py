"""Change the mesh under an array, so that no device ever holds much more than what it had or what it gets.

The compiler alone gathers an array whole on every device where two meshes cut it differently. Here both are read as one
mesh with the factors of both as its axes, on which a change takes steps that are one collective each: cut what is not
cut yet, hand axes from one dimension to another (all-to-all), bring pieces into their order (collective-permute), and
gather what stays whole (all-gather).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

# for every dimension the axes that it is split over, the slowest first
Cut = tuple[tuple[str, ...], ...]


def remesh(x: jax.Array, target: NamedSharding) -> jax.Array:
    """The array on another mesh of the same devices in the same order; call under jax.jit.

    Where the sizes of the two meshes do not nest, the compiler finds the way, which may take the memory of the whole.
    """
    now: NamedSharding = jax.typeof(x).sharding
    sizes, targets = (dict(sharding.mesh.shape) for sharding in (now, target))
    factors = common_factors(tuple(sizes.values()), tuple(targets.values()))
    if factors is None:
        return x
    names = tuple(f"factor_{number}" for number in range(len(factors)))
    mesh = AbstractMesh(factors, names, axis_types=(AxisType.Explicit,) * len(names))
    begin = _refined(_cut(now.spec, x.ndim), sizes, mesh)
    end = _refined(_cut(target.spec, x.ndim), targets, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        for cut in steps(begin, end, x.shape, mesh.shape):
            x = jax.sharding.reshard(x, PartitionSpec(*(axes or None for axes in cut)))
    return x


def common_factors(source: Sequence[int], target: Sequence[int]) -> tuple[int, ...] | None:
    """Sizes of the coarsest mesh of which both are groups of neighbouring axes; None where there is none.

    As (128, 2) and (16, 16) are groups of (16, 8, 2).
    """
    ends = sorted({*_ends(source), *_ends(target)})
    if any(larger % smaller for smaller, larger in itertools.pairwise(ends)):
        return None
    return tuple(larger // smaller for smaller, larger in itertools.pairwise(ends))[::-1]


def _ends(sizes: Sequence[int]) -> list[int]:
    """How many devices the last k axes span, for every k."""
    return list(itertools.accumulate(reversed(sizes), initial=1, func=int.__mul__))


def _cut(spec: PartitionSpec, ndim: int) -> Cut:
    axes = ((x,) if isinstance(x, str) else tuple(x or ()) for x in spec)
    return (*axes, *[()] * (ndim - len(spec)))


def _refined(cut: Cut, sizes: Mapping[str, int], mesh: AbstractMesh) -> Cut:
    """The same in the axes of the finer mesh."""
    ends = dict(zip(mesh.axis_names, reversed(_ends(mesh.axis_sizes)[:-1]), strict=True))
    spans = dict(
        zip(sizes, itertools.pairwise(reversed(_ends(tuple(sizes.values())))), strict=True)
    )

    def finer(axis: str) -> tuple[str, ...]:
        whole, part = spans[axis]
        return tuple(name for name, end in ends.items() if part <= end < whole)

    return tuple(tuple(x for axis in axes for x in finer(axis)) for axes in cut)


def steps(begin: Cut, end: Cut, shape: Sequence[int], sizes: Mapping[str, int]) -> list[Cut]:
    """Cuts from `begin` to `end`, both included, of which each takes one collective, or none, from the one before.

    But where a dimension is too short for the axes on their way: what is left then is the compiler's, in the last step.
    """
    return [cut for cut, _ in itertools.groupby(_steps(begin, end, shape, sizes))]


def _steps(begin: Cut, end: Cut, shape: Sequence[int], sizes: Mapping[str, int]) -> Iterator[Cut]:
    cut = list(begin)
    at = {axis: dim for dim, axes in enumerate(begin) for axis in axes}
    home = {axis: dim for dim, axes in enumerate(end) for axis in axes}

    def holds(axis: str) -> bool:
        dim = home[axis]
        return shape[dim] % math.prod(sizes[x] for x in (*cut[dim], axis)) == 0

    yield begin
    for axis, dim in home.items():  # of what every device has, it keeps its part
        if axis not in at and holds(axis):
            cut[dim] = (*cut[dim], axis)
    yield tuple(cut)
    for axis, dim in at.items():
        if home.get(axis, dim) == dim:
            continue
        rest = tuple(x for x in cut[dim] if x != axis)
        cut[dim] = (*rest, axis)  # only the fastest axis of a dimension can be handed on
        yield tuple(cut)
        if not holds(axis):  # beside axes that nothing is cut over at the end
            cut[home[axis]] = tuple(x for x in cut[home[axis]] if x in home)
            yield tuple(cut)
        if holds(axis):
            cut[dim], cut[home[axis]] = rest, (*cut[home[axis]], axis)
            yield tuple(cut)
    for dim, axes in enumerate(end):
        there = tuple(axis for axis in axes if axis in cut[dim])
        cut[dim] = (*there, *(axis for axis in cut[dim] if axis not in there))
    yield tuple(cut)
    yield end
