"""Where every array of a model lies under a layout, and how many bytes of it a device holds.

From shapes alone: nothing is allocated, and the layout may have more devices than there are here.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from glm_jax.config import Config
from glm_jax.layers import residual_axes
from glm_jax.model import CausalLM, init_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.weights import Axes, axes_of, kv_axis, named_weights
from sharding.layout import MESH_AXES, Layout


@dataclasses.dataclass(frozen=True)
class Placed:
    """One array under a layout."""

    name: str
    shape: tuple[int, ...]  # as it is stored, padding included
    dtype: str
    axes: Axes  # the logical axis of every dimension
    rules: Mapping[
        str, tuple[str, ...]
    ]  # those of the table that split it: logical axis -> mesh axes
    spec: PartitionSpec
    bytes_per_device: int
    replicas: int  # devices that hold the same piece


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A model under a layout; totals are bytes on every device."""

    parameters: list[Placed]
    activations: list[Placed]
    weights: int
    gradients: int
    optimizer: int


def placed(name: str, shape: tuple[int, ...], dtype: Any, axes: Axes, layout: Layout) -> Placed:
    """An array whose dimensions have these logical axes. Raises ValueError where one does not divide."""
    pieces = [layout.ways(axis) if axis else 1 for axis in axes]
    for axis, size, ways in zip(axes, shape, pieces, strict=True):
        if size % ways:
            raise ValueError(f"{name}: {axis} = {size} does not divide into {ways}")
    return Placed(
        name=name,
        shape=shape,
        dtype=np.dtype(dtype).name,
        axes=axes,
        rules={axis: layout.axes(axis) for axis in axes if axis and layout.axes(axis)},
        spec=layout.spec(*axes),
        bytes_per_device=math.prod(shape) * np.dtype(dtype).itemsize // math.prod(pieces),
        replicas=layout.num_devices // math.prod(pieces),
    )


def explain(
    config: Config, layout: Layout, batch: int, length: int, optim: OptimConfig = OptimConfig()
) -> Explanation:
    """Parameters and main activations of a training step on `batch` rows of `length` tokens.

    Raises UserError where the layout does not divide model or batch.
    """
    config.check(layout)
    layout.check_batch(batch, "batch")
    sizes = tuple(layout.sizes.values())
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        model: CausalLM = jax.eval_shape(lambda: init_model(config, layout, jax.random.key(0)))
        state = jax.eval_shape(make_optimizer(optim, 1).init, model)
    parameters = [
        placed(name, x.shape, x.dtype, axes_of(name, config, layout), layout)
        for name, x in named_weights(model).items()
    ]
    weights = sum(p.bytes_per_device for p in parameters)
    return Explanation(
        parameters=parameters,
        activations=list(activations(config, layout, batch, length)),
        weights=weights,
        gradients=weights,  # float32, split as the weights are
        optimizer=sum(map(_bytes_per_device, jax.tree.leaves(state))),
    )


def _bytes_per_device(x: jax.ShapeDtypeStruct) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
    return math.prod(shape) * x.dtype.itemsize


def activations(config: Config, layout: Layout, batch: int, length: int) -> Iterator[Placed]:
    """The main arrays of a forward pass, of the rows that are computed at once."""
    rows = batch // (layout.accumulate * layout.microbatches)
    N, K, H = config.num_heads, config.num_kv_groups, config.head_dim
    kv = kv_axis(config, layout)
    copies = math.lcm(K, layout.ways("kv_heads"))  # of k and v, where shards outnumber groups
    compute, stream = config.compute_dtype, ("batch", "time")
    for name, sizes, dtype, axes in (
        ("residual BTD", (length, config.hidden_size), compute, residual_axes(length, layout)),
        ("q BTNH", (length, N, H), compute, (*stream, "heads", "head_dim")),
        ("k, v BTKH", (length, K, H), compute, (*stream, kv, "head_dim")),
        (
            "scores BKGTS",
            (copies, N // copies, length, length),
            "float32",
            ("batch", "kv_heads", None, "time", None),
        ),
        ("ffn BTF", (length, config.ffn_size), compute, (*stream, "ffn")),
    ):
        yield placed(name, (rows, *sizes), np.dtype(dtype), axes, layout)
    vocab = layout.padded(config.vocab_size, "vocab")
    whole = batch // layout.accumulate  # the head sees all microbatches together
    yield placed("logits BTV", (whole, length, vocab), np.float32, (*stream, "vocab"), layout)
