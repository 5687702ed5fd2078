"""What compiled updates may do: read from the programs, not timed."""

import dataclasses
import functools
import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.batch import Sequences
from glm_jax.config import PRESETS, Config, GLMConfig
from glm_jax.model import init_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import init_state
from rlhf.sft import sft_update
from rlhf.trials.models import tiny
from sharding.collectives import collectives
from sharding.flops import flops
from sharding.hlo import read
from sharding.layout import Layout, Remat, get_layout
from sharding.loops import walk

CONFIG = tiny(PRESETS["chatglm3-6b"])
SPLIT_BY_FSDP = 7  # weights of a layer: q, k, v, o, gate, up, down
ROWS, LENGTH = 16, 12


@functools.cache
def _compiled(layout: Layout, config: Config = CONFIG) -> Any:
    """The SFT update, compiled for shapes alone."""
    optimizer = make_optimizer(OptimConfig(), 1)
    with jax.set_mesh(layout.mesh()):

        def start(key: jax.Array) -> Any:
            return init_state(init_model(config, layout, key), optimizer)

        ids = np.zeros((ROWS, LENGTH), np.int32)
        batch = layout.put(Sequences(ids, ids > 0, ids > 0))
        state = jax.eval_shape(start, jax.random.key(0))
        update: Any = sft_update(optimizer, layout)
        return update.lower(state, batch).compile()


@pytest.mark.parametrize("name", ["dp", "tp", "dp_tp", "pp_dp_tp", "2x2x1x2:circular:2"])
def test_no_weight_is_gathered_that_is_whole_or_split_by_what_it_computes(name: str) -> None:
    layout = get_layout(name, 8)
    found = list(collectives(read(_compiled(layout))))
    assert "all-reduce" in {x.kind for x in found}
    # only tokens are, between attention and MLP
    rows = 4 * ROWS * LENGTH * CONFIG.hidden_size // layout.ways("batch")
    divides = LENGTH % layout.ways("sequence") == 0 and layout.ways("sequence") > 1
    gathers = [x for x in found if x.kind == "all-gather"]
    tokens = {rows // layout.microbatches, rows} if divides else set()
    assert {x.num_bytes for x in gathers} == tokens
    assert all(x.axes(layout.sizes) == ("tensor",) for x in gathers)


def test_fsdp_gathers_a_layer_once_forward_and_once_backward() -> None:
    gathers = Counter(
        visit.within
        for visit in walk(read(_compiled(get_layout("fsdp", 8))))
        if visit.instruction.opcode == "all-gather" and visit.times == CONFIG.num_layers
    )
    assert list(gathers.values()) == [SPLIT_BY_FSDP, SPLIT_BY_FSDP]


@pytest.mark.parametrize(
    ("layout", "share", "sandwich_norms"),
    [
        (Layout(), 1.0, False),
        (Layout(fsdp=8), 1 / 8, False),
        (Layout(remat="full"), 1.0, False),
        (Layout(remat="full"), 1.0, True),  # the last product is not asked for again there either
        # six slots for five layers, three ticks for two microbatches: identities and bubbles are computed too
        (Layout(pipe=2, microbatches=2), 6 / 5 * 3 / 2 / 2, False),
        (Layout(pipe=2, data=2, microbatches=4), 6 / 5 * 5 / 4 / 4, False),
        (Layout(remat="matmuls"), 1.0, False),
        (Layout(pipe=2, microbatches=2, remat="matmuls"), 6 / 5 * 3 / 2 / 2, False),
        (Layout(pipe=2, microbatches=2, repeats=2, remat="matmuls"), 8 / 5 * 5 / 4 / 2, False),
        (Layout(pipe=2, microbatches=2, repeats=2, remat="full"), 8 / 5 * 5 / 4 / 2, False),
    ],
)
def test_every_product_of_an_update_is_known_by_hand(
    layout: Layout, share: float, sandwich_norms: bool
) -> None:
    assert isinstance(CONFIG, GLMConfig)
    c, tokens = dataclasses.replace(CONFIG, sandwich_norms=sandwich_norms), ROWS * LENGTH
    heads, groups = c.num_heads * c.head_dim, c.num_kv_groups * c.head_dim
    down = c.hidden_size * c.ffn_size
    products = 2 * tokens * (2 * c.hidden_size * (heads + groups) + 3 * down)
    attention = 2 * tokens * LENGTH * heads  # of queries with keys, and as much with values
    head = 2 * tokens * c.hidden_size * layout.padded(c.vocab_size, "vocab")
    layer = 3 * (products + 2 * attention) + attention  # whose probabilities are computed again
    if layout.remat == "matmuls":
        layer += attention
    if layout.remat == "full":  # and all else but what the last product gives
        layer += products - 2 * tokens * down + attention
    expected = c.num_layers * layer * share + 3 * head / layout.ways("batch") / layout.ways("vocab")
    module = read(_compiled(layout, c))
    found = sum(flops(x.computation, x.instruction) * x.times for x in walk(module))
    assert found == expected


def test_no_sum_over_devices_is_made_again_for_the_gradient() -> None:
    """Attention and MLP add activations up over heads and width, forward and backward, whatever a layer keeps."""

    def sums(remat: Remat) -> int:
        activation = 4 * ROWS * LENGTH * CONFIG.hidden_size
        found = collectives(read(_compiled(Layout(tensor=2, remat=remat))))
        return sum(x.times for x in found if x.kind == "all-reduce" and x.num_bytes == activation)

    assert sums("none") == sums("full") > 0


@pytest.mark.parametrize("name", ["single", "fsdp_tp", "pp_dp_tp"])
def test_the_state_is_updated_in_place(name: str) -> None:
    """Every byte of the state that goes in is a byte of the state that comes out: no second copy."""
    layout = get_layout(name, None if name == "single" else 8)
    memory = _compiled(layout).memory_analysis()
    batch = ROWS * LENGTH * 6 // layout.ways("batch")
    state = memory.argument_size_in_bytes - batch
    assert memory.alias_size_in_bytes == state
    assert memory.output_size_in_bytes - state < 512  # metrics


def test_a_program_does_not_grow_with_depth() -> None:
    def size(num_layers: int, layout: Layout) -> int:
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        return len(_compiled(layout, config).as_text().splitlines())

    for layout in (Layout(fsdp=2, tensor=2), Layout(pipe=2, fsdp=2, microbatches=2)):
        assert size(48, layout) < 1.02 * size(6, layout)


def test_activations_that_are_kept_shrink_with_every_policy() -> None:
    assert isinstance(CONFIG, GLMConfig)
    deep = dataclasses.replace(CONFIG, num_layers=12)
    none, matmuls, full = (
        _compiled(Layout(remat=remat), deep).memory_analysis().temp_size_in_bytes
        for remat in ("none", "matmuls", "full")
    )
    assert full < 0.8 * matmuls < 0.8 * 0.8 * none


def test_more_microbatches_hold_less_at_once() -> None:
    """A tick's activations shrink with the microbatch, what a stage keeps for its gradient does not grow."""
    few, many = (
        _compiled(Layout(pipe=2, microbatches=m, remat="full")).memory_analysis() for m in (1, 8)
    )
    assert many.temp_size_in_bytes < few.temp_size_in_bytes


def test_no_stage_repeats_the_work_of_embedding_and_head() -> None:
    """The vocabulary is split over the stages too: a device holds an eighth of the logits."""
    layout = Layout(pipe=2, tensor=4, microbatches=2)
    config = dataclasses.replace(CONFIG, vocab_size=4096)
    text = _compiled(layout, config).as_text()
    assert f"[{ROWS * LENGTH},512]" in text or f"[{ROWS},{LENGTH},512]" in text
    assert not re.search(r"\[(\d+,)*4096\]", text)  # nowhere whole, neither weights nor a mask


def test_init_is_a_program_of_its_own_layout() -> None:
    """No device ever holds a whole weight that the layout splits."""
    layout = get_layout("fsdp_tp", 8)
    with jax.set_mesh(layout.mesh()):
        draw = jax.jit(partial(init_model, CONFIG, layout))
        memory: Any = draw.lower(jax.random.key(0)).compile().memory_analysis()
        whole = sum(4 * w.size for w in jax.tree.leaves(jax.eval_shape(draw, jax.random.key(0))))
    assert memory.output_size_in_bytes < whole / 3
