"""Loops are counted as they run, by what the compiler says and without it."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sharding.hlo import Module, parse, read
from sharding.loops import walk


def program(f: Callable[[Any], Any], said: bool, shape: tuple[int, int] = (4, 8)) -> Module:
    """The compiled program, without what the compiler says of its loops unless `said`."""
    compiled = jax.jit(f).lower(jnp.ones(shape)).compile()
    if said:
        return read(compiled)
    text = compiled.as_text()
    assert text is not None
    text = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert "known_trip_count" not in text
    return parse(text)


def rounds(module: Module) -> list[tuple[int | None, int]]:
    """Of every loop its rounds, and how often it is begun."""
    return [
        (visit.trips, visit.times) for visit in walk(module) if visit.instruction.opcode == "while"
    ]


def nested(x: jax.Array) -> jax.Array:
    weights = jnp.ones((7, 8, 8))

    def inner(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(inner, x, weights)[0], None

    return jax.lax.scan(outer, x, None, length=3)[0]


@pytest.mark.parametrize("said", [True, False])
def test_loops_within_loops(said: bool) -> None:
    assert rounds(program(nested, said)) == [(3, 1), (7, 3)]


def test_a_gradient_runs_them_backwards() -> None:
    module = program(jax.grad(lambda x: jnp.sum(nested(x))), False)
    assert sorted(rounds(module)) == [(3, 1), (3, 1), (7, 3), (7, 3)]


@pytest.mark.parametrize("said", [True, False])
def test_a_loop_that_depends_on_data_is_not_known(said: bool) -> None:
    def f(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: 2 * x, x)

    assert rounds(program(f, said)) == [(None, 1)]


def test_of_a_loop_that_may_end_early_the_most_rounds_count() -> None:
    """As decoding does: so many tokens, unless every answer has ended."""

    def f(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
            return (state[0] < 6) & ~jnp.all(state[1] > 100)

        return jax.lax.while_loop(goes_on, lambda s: (s[0] + 1, 2 * s[1]), (jnp.int32(0), x))

    # of a smaller array the CPU's compiler makes a call, whose arguments are not followed
    assert rounds(program(f, False, (256, 1024))) == [(6, 1)]


# a counter that moves by two, through fusions and copies, and a bound that comes with the state
STRIDED = """HloModule m, num_partitions=1

%two (p: u32[]) -> u32[] {
  %p = u32[] parameter(0)
  %c = u32[] constant(2)
  ROOT %sum = u32[] add(%p, %c)
}

%condition (s: (u32[], u32[], f32[4])) -> pred[] {
  %s = (u32[], u32[], f32[4]) parameter(0)
  %i = u32[] get-tuple-element(%s), index=0
  %n = u32[] get-tuple-element(%s), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (s: (u32[], u32[], f32[4])) -> (u32[], u32[], f32[4]) {
  %s = (u32[], u32[], f32[4]) parameter(0)
  %i = u32[] get-tuple-element(%s), index=0
  %copied = u32[] copy(%i)
  %next = u32[] fusion(%copied), kind=kLoop, calls=%two
  %n = u32[] get-tuple-element(%s), index=1
  %x = f32[4] get-tuple-element(%s), index=2
  %twice = f32[4] add(%x, %x)
  ROOT %t = (u32[], u32[], f32[4]) tuple(%next, %n, %twice)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %zero = u32[] constant(START)
  %end = u32[] constant(END)
  %t = (u32[], u32[], f32[4]) tuple(%zero, %end, %x)
  %loop = (u32[], u32[], f32[4]) while(%t), condition=%condition, body=%body
  ROOT %out = f32[4] get-tuple-element(%loop), index=2
}
"""


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0, 8, 4), (0, 7, 4), (3, 8, 3), (8, 8, 0), (9, 8, 0)]
)
def test_counters_are_followed_from_where_they_start(start: int, end: int, expected: int) -> None:
    module = parse(STRIDED.replace("START", str(start)).replace("END", str(end)))
    assert rounds(module) == [(expected, 1)]
    doubled = [visit.times for visit in walk(module) if visit.instruction.name == "twice"]
    assert doubled == [expected]


def test_a_counter_that_stands_still_is_not_known() -> None:
    text = STRIDED.replace("constant(2)", "constant(0)").replace("START", "0").replace("END", "8")
    assert rounds(parse(text)) == [(None, 1)]
