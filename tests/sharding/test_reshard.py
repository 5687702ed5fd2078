"""Arrays change their mesh: step by step, and no device holds them whole on the way."""

import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.collectives import collectives
from sharding.hlo import read
from sharding.reshard import Cut, common_factors, remesh, steps

AXES = ("a", "b", "c")


def mesh(*sizes: int, names: str = "xyzw") -> Mesh:
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, tuple(names[: len(sizes)]), axis_types=(AxisType.Explicit,) * len(sizes))


def cuts(num_dims: int) -> Iterator[Cut]:
    """All ways to split dimensions over any of the axes, in any order."""
    for homes in itertools.product([None, *range(num_dims)], repeat=len(AXES)):
        for order in itertools.permutations(range(len(AXES))):
            yield tuple(tuple(AXES[n] for n in order if homes[n] == dim) for dim in range(num_dims))


def test_two_meshes_are_groups_of_one() -> None:
    assert common_factors((128, 2), (16, 16)) == (16, 8, 2)
    assert common_factors((4, 1, 64, 1), (1, 16, 1, 16)) == (4, 4, 16)
    assert common_factors((8,), (8, 1)) == (8,)
    assert common_factors((1,), (1, 1)) == ()
    assert common_factors((2, 3), (3, 2)) is None  # neighbours of one are no group of the other


def kind(before: Cut, after: Cut) -> str:
    """Which collective makes one of the other; fails where it takes more than one."""
    dims = range(len(before))
    gone, new = (
        [set(x[d]) - set(y[d]) for d in dims] for x, y in ((before, after), (after, before))
    )
    lost, found = set().union(*gone), set().union(*new)
    if not lost and not found:
        return "collective-permute"
    for dim in dims:  # what stays is in its order, and only the fastest axes come and go
        stays = [axis for axis in before[dim] if axis not in gone[dim]]
        assert list(before[dim][: len(stays)]) == stays == list(after[dim][: len(stays)])
    if lost == found:
        assert len(lost) == 1
        return "all-to-all"
    assert not (lost and found)
    return "all-gather" if lost else "slice"


def test_every_step_is_one_collective_and_none_holds_more_than_the_ends() -> None:
    sizes, shape = dict.fromkeys(AXES, 2), (8, 8)

    def ways(cut: Cut) -> int:
        return math.prod(sizes[axis] for axes in cut for axis in axes)

    seen = set()
    every = list(dict.fromkeys(cuts(2)))
    for begin, end in itertools.product(every, every):
        way = steps(begin, end, shape, sizes)
        assert (way[0], way[-1]) == (begin, end)
        seen |= {kind(*pair) for pair in itertools.pairwise(way)}
        assert min(map(ways, way)) == min(ways(begin), ways(end))
    assert seen == {"slice", "collective-permute", "all-to-all", "all-gather"}


def test_a_dimension_that_is_too_short_takes_no_more_axes() -> None:
    sizes = {"a": 4, "b": 2, "c": 2}
    way = steps((("a",), ("b", "c")), ((), ("a",)), (8, 4), sizes)
    assert all(4 % math.prod(sizes[axis] for axis in cut[1]) == 0 for cut in way)


@pytest.mark.parametrize(
    ("source", "spec", "target", "wanted"),
    [
        ((4, 2), ("x", "y"), (2, 4), (None, "y")),
        ((8, 1), ("x", None), (2, 4), (None, "y")),
        ((4, 2), ("x", "y"), (1, 8), (None, "y")),
        ((2, 4), (None, "y"), (4, 2), ("x", "y")),
        ((8, 1), ("x", None), (2, 2, 2), ("z", ("x", "y"))),
        ((2, 2, 2), (("z", "x"), "y"), (8, 1), (None, "x")),
        ((4, 2), ("x", None), (2, 4), (None, None)),
    ],
)
def test_an_array_is_the_same_on_its_new_mesh(
    source: Sequence[int],
    spec: Sequence[object],
    target: Sequence[int],
    wanted: Sequence[object],
) -> None:
    old, new = mesh(*source), mesh(*target)
    begin = NamedSharding(old, PartitionSpec(*spec))
    there = NamedSharding(new, PartitionSpec(*wanted))
    x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    with jax.set_mesh(old):
        here = jax.device_put(jnp.asarray(x), begin)
        move = jax.jit(lambda x: remesh(x, there), out_shardings=there)
        compiled = move.lower(here).compile()
        moved = compiled(here)
    assert moved.sharding.is_equivalent_to(there, 2)
    np.testing.assert_array_equal(np.asarray(moved), x)
    largest = max(begin.shard_shape(x.shape), there.shard_shape(x.shape), key=math.prod)
    for found in collectives(read(compiled)):
        assert found.num_bytes <= math.prod(largest) * 4


def test_meshes_that_do_not_nest_are_left_to_the_compiler() -> None:
    old, new = mesh(2, 3), mesh(3, 2)
    begin, there = (NamedSharding(on, PartitionSpec("x", "y")) for on in (old, new))
    x = np.arange(36.0, dtype=np.float32).reshape(6, 6)
    with jax.set_mesh(old):
        move = jax.jit(lambda x: remesh(x, there), out_shardings=there)
        moved = move(jax.device_put(jnp.asarray(x), begin))
    np.testing.assert_array_equal(np.asarray(moved), x)
