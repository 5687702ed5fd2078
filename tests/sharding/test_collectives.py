"""Who talks to whom, and how much is sent, in any spelling; and by hand for every axis of a small program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding.chips import find_pod
from sharding.collectives import Collective, collectives, replica_groups
from sharding.hlo import Instruction, parse, read
from sharding.layout import Layout, get_layout
from sharding.schedule import estimate

SIZES = {"pipe": 2, "data": 1, "fsdp": 2, "tensor": 2}


def reduction(groups: str) -> Instruction:
    text = (
        f"HloModule m, num_partitions=8\n\nENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4] parameter(0)\n"
        f"  ROOT %r = f32[4] all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add\n}}\n"
    )
    return parse(text).entry.root


@pytest.mark.parametrize(
    ("spellings", "groups", "axes"),
    [
        (
            ("{{0,1},{2,3},{4,5},{6,7}}", "[4,2]<=[8]", "mesh['a'=4,'b'=2] {'b'}"),
            ((0, 1), (2, 3), (4, 5), (6, 7)),
            ("tensor",),
        ),
        (
            (
                "{{0,4},{1,5},{2,6},{3,7}}",
                "[4,2]<=[2,4]T(1,0)",
                "mesh['a'=2,'b'=2,'c'=2] {'a'}",
            ),
            ((0, 4), (1, 5), (2, 6), (3, 7)),
            ("pipe",),
        ),
        (
            ("{{0,2,4,6},{1,3,5,7}}", "[2,4]<=[4,2]T(1,0)", "mesh['a'=2,'b'=2,'c'=2] {'a','b'}"),
            ((0, 2, 4, 6), (1, 3, 5, 7)),
            ("pipe", "fsdp"),
        ),
        (
            ("{{0,1,2,3,4,5,6,7}}", "[1,8]<=[8]", "{}", "mesh['a'=8] {'a'}"),
            (tuple(range(8)),),
            ("pipe", "fsdp", "tensor"),
        ),
    ],
)
def test_groups_in_every_spelling(
    spellings: tuple[str, ...], groups: tuple[tuple[int, ...], ...], axes: tuple[str, ...]
) -> None:
    for spelling in spellings:
        assert replica_groups(reduction(spelling), 8) == groups, spelling
    assert Collective("all-reduce", "r", groups, 16, 1).axes(SIZES) == axes


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 600),
        ("reduce-scatter", 600),
        ("all-to-all", 600),
        ("all-reduce", 1200),
    ],
)
def test_what_a_ring_sends(kind: str, sent: int) -> None:
    assert Collective(kind, "x", ((0, 1, 2, 3), (4, 5, 6, 7)), 800, 1).sent_bytes == sent


# one gather, in the background of two fusions and of what is between; and a reduce that every device keeps a part of
ASYNC = """HloModule m, is_scheduled=true, num_partitions=4

%begin (a: bf16[8,4]) -> bf16[32,4] {
  %a = bf16[8,4] parameter(0)
  ROOT %all-gather.1 = bf16[32,4] all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%end (a: bf16[8,4]) -> bf16[32,4] {
  %a = bf16[8,4] parameter(0)
  ROOT %all-gather.2 = bf16[32,4] all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter.3 (b: f32[64]) -> f32[16] {
  %b = f32[64] parameter(0)
  %all-reduce.4 = f32[64] all-reduce(%b), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  %c = s32[] constant(0)
  ROOT %cut = f32[16] dynamic-slice(%all-reduce.4, %c), dynamic_slice_sizes={16}
}

ENTRY %main (x: bf16[8,4], y: f32[64]) -> f32[16] {
  %x = bf16[8,4] parameter(0)
  %y = f32[64] parameter(1)
  %fusion.1 = bf16[32,4] fusion(%x), kind=kCustom, calls=%begin
  %fusion.2 = bf16[32,4] fusion(%x), kind=kCustom, calls=%end
  %start = (f32[64], f32[64]) collective-permute-start(%y), channel_id=9, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %done = f32[64] collective-permute-done(%start)
  %alone = f32[64] all-reduce(%y), channel_id=10, replica_groups={{0},{1},{2},{3}}, to_apply=%add
  ROOT %fusion.3 = f32[16] fusion(%done), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_pieces_of_one_collective_count_once() -> None:
    found = [(x.kind, x.name, x.num_bytes, x.sent_bytes) for x in collectives(parse(ASYNC))]
    assert found == [
        ("all-gather", "all-gather.1", 256, 192),
        ("collective-permute", "start", 256, 256),
        ("reduce-scatter", "all-reduce.4", 256, 192),
    ]


LAYERS, ROWS, WIDTH = 3, 16, 32


def sent(layout: Layout, *, split_in: bool = False) -> dict[tuple[str, tuple[str, ...]], int]:
    """Kind and mesh axes -> bytes that a device sends for the gradient of three layers that are linear."""
    mesh = layout.mesh()

    def put(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, layout.spec(*axes))
        )

    def layer(x: jax.Array, ws: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        wide = jnp.einsum("BD,DF->BF", x, ws[0], out_sharding=layout.spec("batch", "ffn"))
        out = layout.spec("batch", "embed")
        return jnp.einsum("BF,FD->BD", jnp.tanh(wide), ws[1], out_sharding=out), None

    def loss(ws: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(layer, x, ws)[0])

    weights = (
        put((LAYERS, WIDTH, WIDTH), "layer", "embed_weight", "ffn"),
        put((LAYERS, WIDTH, WIDTH), "layer", "ffn", "embed_weight"),
    )
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(weights, put((ROWS, WIDTH), "batch", "embed"))
        module = read(program.compile())
    found: dict[tuple[str, tuple[str, ...]], int] = {}
    for x in collectives(module):
        key = x.kind, x.axes(layout.sizes)
        found[key] = found.get(key, 0) + x.times * x.sent_bytes
    return found


WEIGHTS = 4 * LAYERS * 2 * WIDTH * WIDTH
ACTIVATION = 4 * ROWS * WIDTH


def test_data_parallelism_reduces_every_gradient() -> None:
    assert sent(get_layout("dp", 8)) == {("all-reduce", ("data",)): 2 * WEIGHTS * 7 // 8}


def test_fsdp_gathers_every_weight_forward_and_backward_and_reduces_its_gradient() -> None:
    found = sent(get_layout("fsdp", 8))
    gathered = found.pop(("all-gather", ("fsdp",)))
    # the last layer's input needs no gradient further down, but the loop does not know
    assert gathered == 2 * WEIGHTS * 7 // 8
    # this compiler reduces everywhere and cuts, or scatters
    assert found in (
        {("all-reduce", ("fsdp",)): 2 * WEIGHTS * 7 // 8},
        {("reduce-scatter", ("fsdp",)): WEIGHTS * 7 // 8},
    )


def test_tensor_parallelism_reduces_an_activation_forward_and_one_backward() -> None:
    each = 2 * ACTIVATION * 7 // 8
    assert sent(get_layout("tp", 8)) == {("all-reduce", ("tensor",)): LAYERS * 2 * each}


def test_both_send_along_their_own_axes() -> None:
    found = sent(Layout(data=2, tensor=4))
    assert found == {
        ("all-reduce", ("tensor",)): LAYERS * 2 * (2 * (ACTIVATION // 2) * 3 // 4),
        ("all-reduce", ("data",)): 2 * (WEIGHTS // 4) // 2,
    }


def test_a_pipeline_passes_on_what_it_is_given() -> None:
    mesh = Layout(pipe=4).mesh()
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def pass_on(x: jax.Array) -> jax.Array:
        step = jax.shard_map(
            lambda x: jax.lax.ppermute(x, "pipe", ring),
            in_specs=PartitionSpec("pipe"),
            out_specs=PartitionSpec("pipe"),
        )
        return jax.lax.fori_loop(0, 5, lambda _, x: step(x), x)

    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, PartitionSpec("pipe"))
        given = jax.ShapeDtypeStruct((8, 6), np.float32, sharding=spec)
        module = read(jax.jit(pass_on).lower(given).compile())
    (found,) = collectives(module)
    assert (found.kind, found.times, found.sent_bytes) == ("collective-permute", 5, 2 * 6 * 4)
    assert found.axes(Layout(pipe=4).sizes) == ("pipe",)


ACROSS = """HloModule jit_f, is_scheduled=true, num_partitions=4

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %recv = (bf16[8,128]{1,0}, u32[], token[]) recv(%token), channel_id=1, frontend_attributes={RENDEZVOUS}
  %send = (bf16[8,128]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, frontend_attributes={RENDEZVOUS}
  %sent = token[] send-done(%send), channel_id=2
  %got = (bf16[8,128]{1,0}, token[]) recv-done(%recv), channel_id=1
  ROOT %y = bf16[8,128]{1,0} get-tuple-element(%got), index=0
}
""".replace(
    "RENDEZVOUS",
    '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"',
)


def test_between_slices_a_message_is_a_collective() -> None:
    (found,) = collectives(parse(ACROSS))
    assert (found.kind, found.num_bytes, found.sent_bytes) == ("all-reduce", 2048, 2048)
    assert found.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found.axes({"pipe": 1, "data": 2, "fsdp": 4, "tensor": 1}) == ("data",)
    pod = find_pod("v5e:2x2:2")
    (sent,) = estimate(parse(ACROSS), pod).collectives
    assert sent.exposed_seconds == sent.seconds >= 2048 / pod.chip.network_bandwidth
