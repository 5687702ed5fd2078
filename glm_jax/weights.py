"""Weights by name: the logical axes of each, how they are drawn, and how they are cut anew for another layout.

Layers stand in slots [stage, slot, ...] (`sharding.pipeline.layer_slots`). Slots that hold no layer, and rows of a
vocabulary beyond its end, hold 0; no gradient reaches them, and nothing that is written to disk has them.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from glm_jax.config import Config
from sharding.layout import Layout
from sharding.pipeline import IDLE, layer_slots
from sharding.processes import fetch

Axes = tuple[str | None, ...]
Model = TypeVar("Model", bound=nnx.Module)
Tree = TypeVar("Tree")

# Parameter -> the logical axes of its dimensions, in every generation; those of layers without stage and slot.
WEIGHT_AXES: Mapping[str, Axes] = {
    "embedding": ("vocab", "embed_weight"),
    "w_head": ("embed_weight", "vocab"),
    "w_scalar": ("norm",),
    "final_norm": ("norm",),
    "final_norm_bias": ("norm",),
    # of a layer
    "attn_norm": ("norm",),
    "attn_norm_bias": ("norm",),
    "w_q": ("embed_weight", "heads", "head_dim"),
    "w_k": ("embed_weight", "kv_heads", "head_dim"),
    "w_v": ("embed_weight", "kv_heads", "head_dim"),
    "b_q": ("heads", "head_dim"),
    "b_k": ("kv_heads", "head_dim"),
    "b_v": ("kv_heads", "head_dim"),
    "w_o": ("heads", "head_dim", "embed_weight"),
    "b_o": ("norm",),
    "attn_out_norm": ("norm",),
    "mlp_norm": ("norm",),
    "mlp_norm_bias": ("norm",),
    "w_gate": ("embed_weight", "ffn"),
    "w_up": ("embed_weight", "ffn"),
    "w_in": ("embed_weight", "ffn"),
    "b_in": ("ffn",),
    "w_down": ("ffn", "embed_weight"),
    "w_out": ("ffn", "embed_weight"),
    "b_out": ("norm",),
    "mlp_out_norm": ("norm",),
}


def kv_axis(config: Config, layout: Layout) -> str | None:
    """The logical axis of the kv groups: None where they do not divide over the tensor shards.

    They are whole on every shard then, and `glm_jax.layers.attention` hands out copies.
    """
    return "kv_heads" if config.num_kv_groups % layout.ways("kv_heads") == 0 else None


def axes_of(path: str, config: Config, layout: Layout) -> Axes:
    """Logical axes of the weight at `path`, such as `.trunk.blocks.w_q`. Raises KeyError on an unknown name."""
    own = tuple(
        kv_axis(config, layout) if axis == "kv_heads" else axis
        for axis in WEIGHT_AXES[path.rsplit(".", 1)[-1]]
    )
    return ("stage", "layer", *own) if ".blocks." in path else own


def named_weights(model: Any) -> dict[str, Any]:
    """Path -> array (or shape) of every parameter of a model."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
    }


class Draw:
    """Draws float32 weights, born in their slots with their sharding.

    The values depend on the key and the order of the calls alone, not on the layout.
    """

    def __init__(self, config: Config, layout: Layout, key: jax.Array) -> None:
        self.config = config
        self.layout = layout
        self.slots = layer_slots(config.num_layers, layout)
        self.keys = iter(jax.random.split(key, 8))

    def normal(self, name: str, std: float, shape: tuple[int, ...]) -> jax.Array:
        """N(0, std^2) in every layer."""
        stage, layer, *own = axes_of(f".blocks.{name}", self.config, self.layout)
        # an order of its own makes the stages of a pipeline that goes around once
        born = "stage" if _in_order(self.slots) else None
        shape = (self.config.num_layers, *shape)
        spec = self.layout.spec(born, *own)
        drawn = std * jax.random.normal(next(self.keys), shape, out_sharding=spec)
        return _into_slots(drawn, self.slots, self.layout.spec(stage, layer, *own))

    def constant(self, name: str, value: float, shape: tuple[int, ...]) -> jax.Array:
        """The same value in every layer."""
        spec = self.layout.spec(*axes_of(f".blocks.{name}", self.config, self.layout))
        full = jnp.full((*self.slots.shape, *shape), value, jnp.float32, out_sharding=spec)
        if _in_order(self.slots):
            return full
        real = (self.slots != IDLE).reshape(*self.slots.shape, *[1] * len(shape))
        return jnp.where(real, full, 0.0)

    def table(self, name: str, std: float, shape: tuple[int, ...]) -> jax.Array:
        """N(0, std^2) in a matrix that belongs to no layer."""
        return draw_table(name, std, shape, next(self.keys), self.config, self.layout)


def draw_table(
    name: str, std: float, shape: tuple[int, ...], key: jax.Array, config: Config, layout: Layout
) -> jax.Array:
    """N(0, std^2) in a matrix of this name, 0 where the layout pads it."""
    axes = axes_of(name, config, layout)
    divides = [
        axis if axis and size % layout.ways(axis) == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    drawn = std * jax.random.normal(key, shape, out_sharding=layout.spec(*divides))
    padded = tuple(
        layout.padded(size, axis) if axis else size for axis, size in zip(axes, shape, strict=True)
    )
    return jax.sharding.reshard(_resized(drawn, padded), layout.spec(*axes))


def kept_layout(layout: Layout, config: Config) -> Layout:
    """The layout in which models are kept on disk: [1, layer, ...] and a vocabulary without padding.

    A pipeline's stages become shards of the layers; what does not divide is whole.
    """
    layers = layout.axes("stage") if config.num_layers % layout.ways("stage") == 0 else ()
    vocab = layout.axes("vocab")
    while config.vocab_size % np.prod([layout.sizes[axis] for axis in vocab], dtype=int):
        vocab = vocab[:-1]
    moved = {"stage": (), "layer": layers, "vocab": vocab}
    return layout.with_rules(moved)


def restack(model: Model, source: Layout, target: Layout, place: Layout | None = None) -> Model:
    """The same weights, cut for another layout; call under jax.jit. Nothing is rounded.

    `model` has a trunk, whose config says how many layers are real and where the vocabulary ends. The result has the
    shapes of `target` and lies on the mesh as `place` says (default: as `target` does).
    """
    place = place or target
    config: Config = model.trunk.config  # type: ignore[attr-defined]
    old, new = (layer_slots(config.num_layers, layout) for layout in (source, target))

    def move(path: tuple[jax.tree_util.KeyEntry, ...], w: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        axes = axes_of(name, config, place)
        if ".blocks." in name:
            return _moved(w, old, new, place.spec(*axes))
        shape = tuple(
            target.padded(config.vocab_size, "vocab") if axis == "vocab" else size
            for axis, size in zip(axes, w.shape, strict=True)
        )
        return jax.sharding.reshard(_resized(w, shape), place.spec(*axes))

    moved: Model = jax.tree_util.tree_map_with_path(move, model)
    return moved


def to_kept(tree: Tree, layout: Layout) -> Tree:
    """A tree whose models - weights, and an optimizer's moments, which are cut like them - lie as `kept_layout` says.

    Call under jax.jit.
    """
    return _of_models(tree, lambda x, kept: restack(x, layout, kept), layout)


def from_kept(tree: Tree, layout: Layout) -> Tree:
    """The other way round."""
    return _of_models(tree, lambda x, kept: restack(x, kept, layout), layout)


def _of_models(
    tree: Tree, move: Callable[[nnx.Module, Layout], nnx.Module], layout: Layout
) -> Tree:
    def is_model(x: Any) -> bool:
        return isinstance(x, nnx.Module)

    def moved(x: Any) -> Any:
        return move(x, kept_layout(layout, x.trunk.config)) if is_model(x) else x

    found: Tree = jax.tree.map(moved, tree, is_leaf=is_model)
    return found


def host_weights(model: nnx.Module, layout: Layout) -> dict[str, np.ndarray]:
    """float32 weights by path on the host, layers [layer, ...] in their order and nothing padded."""
    config: Config = model.trunk.config  # type: ignore[attr-defined]
    slots = layer_slots(config.num_layers, layout)
    order = np.argsort(slots[slots != IDLE])
    weights = {}
    for name, leaf in named_weights(fetch(model)).items():
        host = np.asarray(leaf, np.float32)
        if ".blocks." in name:
            weights[name] = host[slots != IDLE][order]
            continue
        axes = axes_of(name, config, layout)
        weights[name] = host[
            tuple(slice(config.vocab_size if a == "vocab" else None) for a in axes)
        ]
    return weights


def _in_order(slots: np.ndarray) -> bool:
    """Whether the slots hold all layers one after the other, and nothing else."""
    return slots.reshape(-1).tolist() == list(range(slots.size))


def _into_slots(w: jax.Array, slots: np.ndarray, spec: PartitionSpec) -> jax.Array:
    """[layer, ...] -> [stage, slot, ...]."""
    if not _in_order(slots):
        w = _rows(w, slots.reshape(-1))
    return jnp.reshape(w, (*slots.shape, *w.shape[1:]), out_sharding=spec)


def _rows(w: jax.Array, rows: np.ndarray) -> jax.Array:
    """Rows of an array whose first dimension is not split; 0 for IDLE."""
    padded = jnp.pad(w, [(0, 1)] + [(0, 0)] * (w.ndim - 1))
    index = np.where(rows == IDLE, len(w), rows)
    return padded.at[index].get(out_sharding=jax.typeof(w).sharding.spec)


def _moved(w: jax.Array, old: np.ndarray, new: np.ndarray, spec: PartitionSpec) -> jax.Array:
    """[stage, slot, ...] with the layers of `old` -> those of `new`."""
    if np.array_equal(old, new):
        return jax.sharding.reshard(w, spec)
    stage, slot, *own = jax.typeof(w).sharding.spec
    flat_shape = (old.size, *w.shape[2:])
    if _in_order(old) and _in_order(new):
        # only cut in other places: the shards of stages and those of layers are the same
        w = jnp.reshape(w, flat_shape, out_sharding=PartitionSpec(stage or slot, *own))
        shards = PartitionSpec(*_where_split(new, stage or slot), *own)
        w = jnp.reshape(w, (*new.shape, *w.shape[1:]), out_sharding=shards)
        return jax.sharding.reshard(w, spec)
    w = jax.sharding.reshard(w, PartitionSpec(None, None, *own))
    w = jnp.reshape(w, flat_shape, out_sharding=PartitionSpec(None, *own))
    order = old.reshape(-1)
    place = {int(layer): row for row, layer in enumerate(order) if layer != IDLE}
    rows = np.array([place.get(int(layer), IDLE) for layer in new.reshape(-1)])
    w = jnp.reshape(
        _rows(w, rows), (*new.shape, *w.shape[1:]), out_sharding=PartitionSpec(None, None, *own)
    )
    return jax.sharding.reshard(w, spec)


def _where_split(slots: np.ndarray, axis: Any) -> tuple[Any, Any]:
    """Along which of [stage, slot] an array lies split whose layers are."""
    return (axis, None) if len(slots) > 1 else (None, axis)


def _resized(w: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Cut off, or padded with 0, at the end of dimensions of another size; these are no longer split."""
    if w.shape == shape:
        return w
    parts = jax.typeof(w).sharding.spec
    spec = [
        part if old == new else None for part, old, new in zip(parts, w.shape, shape, strict=True)
    ]
    w = jax.sharding.reshard(w, PartitionSpec(*spec))
    w = w[tuple(slice(size) for size in shape)]
    padding = [(0, new - old) for old, new in zip(w.shape, shape, strict=True)]
    return jnp.pad(w, padding)
