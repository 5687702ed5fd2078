"""A schedule's seconds, each by hand: what runs beside what, and who waits for whom."""

import dataclasses

import pytest

from sharding import schedule
from sharding.chips import Pod, find_pod
from sharding.cost import cost
from sharding.errors import UserError
from sharding.hlo import parse
from sharding.schedule import Estimate, estimate

POD = find_pod("v5e:2x2")
# [4096, 4096] x [4096, 4096] in bf16
PRODUCT = 2 * 4096**3 / (POD.chip.flops * schedule.PRODUCT_SHARE)
MEMORY = POD.chip.memory_bandwidth * schedule.MEMORY_SHARE
ARRAY = 4096 * 4096 * 2

TYPE = "bf16[4096,4096]{1,0:T(8,128)(2,1)}"
ON_CHIP = "bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)}"


def program(*lines: str, more: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule jit_f, is_scheduled=true, num_partitions=4
{more}
ENTRY %main (x: bf16[4096,4096], w: bf16[4096,4096]) -> bf16[4096,4096] {{
  %x = {TYPE} parameter(0)
  %w = {TYPE} parameter(1)
{body}
}}
"""


def dot(name: str, of: str = "%x", kind: str = TYPE) -> str:
    return f"%{name} = {kind} dot({of}, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"


GATHER = "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"
GATHERED = "bf16[16384,4096]{1,0:T(8,128)(2,1)}"


def walked(text: str, pod: Pod = POD) -> Estimate:
    found = estimate(parse(text), pod)
    parts = found.products_s + found.kernels_s + found.memory_s + found.exposed_s
    assert parts == pytest.approx(found.step_s)
    return found


def test_a_product_takes_its_flops_or_its_bytes_whichever_is_longer() -> None:
    found = walked(program(dot("y")))
    assert 3 * ARRAY / MEMORY < PRODUCT
    assert found.step_s == found.products_s == pytest.approx(PRODUCT)
    copied = walked(program(f"%y = {TYPE} negate(%x)"))
    assert copied.step_s == copied.memory_s == pytest.approx(2 * ARRAY / MEMORY)
    on_chip = walked(program(f"%y = {ON_CHIP} negate(%x)"))
    assert on_chip.step_s == pytest.approx(ARRAY / MEMORY)


def test_a_collective_in_the_background_is_exposed_as_far_as_it_is_waited_for() -> None:
    start = f"%s = ({TYPE}, {GATHERED}) all-gather-start(%x), {GATHER}"
    done = f"%d = {GATHERED} all-gather-done(%s)"
    alone = walked(program(f"%d = {GATHERED} all-gather(%x), {GATHER}"))
    (sent,) = alone.collectives
    hidden = walked(program(start, *(dot(f"y{n}") for n in range(20)), done))
    assert sent.seconds < 20 * PRODUCT
    assert hidden.exposed_s == 0
    half = walked(program(start, dot("y"), done))
    assert half.exposed_s == pytest.approx(sent.seconds - PRODUCT)
    assert half.collectives[0].seconds == pytest.approx(sent.seconds)


def test_a_collective_that_fusions_carry_is_the_same() -> None:
    def step(name: str, target: str) -> str:
        return f"""
%{name} (p: bf16[4096,4096]) -> bf16[16384,4096] {{
  %p = {TYPE} parameter(0)
  %{name}.g = {GATHERED} all-gather(%p), {GATHER}
  ROOT %{name}.c = {GATHERED} {target}
}}"""

    more = (
        step("first", 'custom-call(%first.g), custom_call_target="AsyncCollectiveStart"')
        + step("next", "bitcast(%next.g)")
        + step("last", 'custom-call(%last.g), custom_call_target="AsyncCollectiveDone"')
    )
    text = program(
        f"%a = {ON_CHIP} fusion(%x), kind=kCustom, calls=%first",
        dot("y"),
        f"%b = {ON_CHIP} fusion(%x), kind=kCustom, calls=%next",
        f"%c = {ON_CHIP} fusion(%x), kind=kCustom, calls=%last",
        more=more,
    )
    found = walked(text)
    (sent,) = found.collectives
    # the fusions themselves read and write arrays meanwhile
    assert 0 < found.exposed_s < sent.seconds - PRODUCT


def test_collectives_on_the_same_links_wait_for_each_other() -> None:
    def start(name: str, channel: int) -> str:
        kind = GATHER.replace("channel_id=1", f"channel_id={channel}")
        return f"%{name} = ({TYPE}, {GATHERED}) all-gather-start(%x), {kind}"

    done = [f"%d{n} = {GATHERED} all-gather-done(%s{n})" for n in (1, 2)]
    both = walked(program(start("s1", 1), start("s2", 2), *done))
    first, second = both.collectives
    assert both.step_s == pytest.approx(first.seconds + second.seconds)


def test_collectives_are_timed_where_their_devices_stand() -> None:
    text = parse(program(f"%d = {GATHERED} all-gather(%x), {GATHER}"))
    pod = find_pod("v5e:16x16")
    in_order = estimate(text, pod).collectives[0]
    corners = estimate(text, pod, places=[0, 1, 16, 17]).collectives[0]  # a square has two lanes
    assert in_order.seconds == pytest.approx(2 * corners.seconds, rel=1e-2)
    assert in_order.collective == corners.collective


def test_a_copy_in_the_background_shares_the_memory_with_what_runs() -> None:
    copy = f"%c = ({ON_CHIP}, {TYPE}, u32[]{{:S(2)}}) copy-start(%x)"
    done = f"%d = {ON_CHIP} copy-done(%c)"
    beside = walked(program(copy, dot("y"), done))
    assert beside.step_s == pytest.approx(PRODUCT)
    busy = walked(program(copy, f"%y = {TYPE} negate(%x)", done))
    assert busy.step_s == pytest.approx(3 * ARRAY / MEMORY)


def test_the_host_takes_one_copy_at_a_time_each_way() -> None:
    hosted = TYPE.replace("(2,1)}", "(2,1)S(5)}")
    out = [f"%o{n} = ({hosted}, {TYPE}, u32[]{{:S(2)}}) copy-start(%x)" for n in (1, 2)]
    back = f"%b = ({TYPE}, {hosted}, u32[]{{:S(2)}}) copy-start(%x)"
    done = [f"%d{name} = {hosted} copy-done(%{name})" for name in ("o1", "o2", "b")]
    found = walked(program(*out, back, *done))
    assert found.step_s == pytest.approx(2 * ARRAY / POD.chip.host_bandwidth)


LOOP = f"""
%condition (s: (s32[], bf16[4096,4096], bf16[4096,4096])) -> pred[] {{
  %s = (s32[], {TYPE}, {TYPE}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%body (s: (s32[], bf16[4096,4096], bf16[4096,4096])) -> (s32[], bf16[4096,4096], bf16[4096,4096]) {{
  %s = (s32[], {TYPE}, {TYPE}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[]{{:S(1)}} constant(1)
  %next = s32[]{{:S(1)}} add(%one, %one)
  %a = {TYPE} get-tuple-element(%s), index=1
  %w = {TYPE} get-tuple-element(%s), index=2
  {dot("y", "%a")}
  %g = {GATHERED} all-gather(%y), {GATHER}
  ROOT %t = (s32[], {TYPE}, {TYPE}) tuple(%next, %y, %w)
}}
"""


def test_a_loop_takes_its_rounds() -> None:
    lines = (
        "%zero = s32[] constant(0)",
        f"%t = (s32[], {TYPE}, {TYPE}) tuple(%zero, %x, %w)",
        f"%loop = (s32[], {TYPE}, {TYPE}) while(%t), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"10"}}',
    )
    found = walked(program(*lines, more=LOOP))
    once = walked(program(dot("y"), f"%g = {GATHERED} all-gather(%y), {GATHER}"))
    assert found.step_s == pytest.approx(10 * once.step_s)
    assert found.exposed_s == pytest.approx(10 * once.exposed_s)
    assert found.collectives[0].seconds == pytest.approx(10 * once.collectives[0].seconds)
    assert found.collectives[0].collective.times == 1  # which `cost` counts
    assert cost(parse(program(*lines, more=LOOP))).collectives[0].times == 10


def test_the_longest_branch_counts() -> None:
    branch = f"""
%short (x: bf16[4096,4096]) -> bf16[4096,4096] {{
  %x = {TYPE} parameter(0)
  ROOT %y = {ON_CHIP} negate(%x)
}}

%long (x: bf16[4096,4096]) -> bf16[4096,4096] {{
  %x = {TYPE} parameter(0)
  ROOT %y = {TYPE} negate(%x)
}}
"""
    lines = (
        "%p = pred[] constant(true)",
        f"%y = {TYPE} conditional(%p, %x, %x), true_computation=%long, false_computation=%short",
    )
    assert walked(program(*lines, more=branch)).step_s == pytest.approx(2 * ARRAY / MEMORY)


def test_a_program_for_more_devices_than_the_pod_has_is_refused() -> None:
    with pytest.raises(UserError, match="runs on 4 devices but v5e:1x1 has 1"):
        estimate(parse(program(dot("y"))), find_pod("v5e:1x1"))


def test_more_of_a_chip_is_less_time() -> None:
    fast = dataclasses.replace(POD, chip=dataclasses.replace(POD.chip, flops=2 * POD.chip.flops))
    assert walked(program(dot("y")), fast).step_s == pytest.approx(PRODUCT / 2)
