"""What the programs of a job are given, as shapes with their places on the current mesh: nothing is allocated."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.batch import Pairs, Prompts, Sequences
from glm_jax.config import Config
from glm_jax.model import CausalLM, cast_weights, init_model
from glm_jax.scalar import ScalarModel, init_scalar
from glm_jax.train import TrainState, init_state
from sharding.layout import Layout

Tree = TypeVar("Tree")
Shape = jax.ShapeDtypeStruct
Roles = Mapping[str, Any]  # what lies in memory -> its shapes
Init = Callable[[Config, Layout, jax.Array], CausalLM | ScalarModel]


def placed(tree: Tree, mesh: Mesh | None = None) -> Tree:
    """Shapes as jax.eval_shape gives them, on `mesh` (default: the current one); what is split says so itself."""
    mesh = mesh or jax.sharding.get_mesh()

    def place(x: Any) -> Shape:
        spec = PartitionSpec() if x.sharding is None else x.sharding.spec
        return Shape(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    found: Tree = jax.tree.map(place, tree)
    return found


def split(shape: tuple[int, ...], dtype: Any, layout: Layout, mesh: Mesh | None = None) -> Shape:
    """An array whose rows are split over the batch shards, as `Layout.put` does."""
    spec = layout.spec("batch", *[None] * (len(shape) - 1))
    return Shape(shape, dtype, sharding=NamedSharding(mesh or jax.sharding.get_mesh(), spec))


def whole(shape: tuple[int, ...], dtype: Any, mesh: Mesh | None = None) -> Shape:
    """An array that every device has."""
    return Shape(
        shape, dtype, sharding=NamedSharding(mesh or jax.sharding.get_mesh(), PartitionSpec())
    )


def sequences(rows: int, length: int, layout: Layout) -> Sequences:
    """Sequences of `length` tokens."""
    of = (jnp.int32, jnp.bool_, jnp.bool_)
    return Sequences(*(split((rows, length), dtype, layout) for dtype in of))


def pairs(rows: int, length: int, layout: Layout) -> Pairs:
    """Pairs of such sequences."""
    return Pairs(sequences(rows, length, layout), sequences(rows, length, layout))


def prompts(rows: int, length: int, layout: Layout, mesh: Mesh) -> Prompts:
    """Prompts where they are answered."""
    shape = (rows, length)
    return Prompts(
        split(shape, jnp.int32, layout, mesh),
        split(shape, jnp.bool_, layout, mesh),
        split((rows,), jnp.int32, layout, mesh),
    )


def key(mesh: Mesh) -> Shape:
    """The key of a random stream."""
    return whole((), jax.eval_shape(jax.random.key, 0).dtype, mesh)


def model(init: Init, config: Config, layout: Layout, mesh: Mesh | None = None) -> Any:
    """A model with a vocabulary or a scalar head."""
    mesh = mesh or jax.sharding.get_mesh()
    with jax.set_mesh(mesh):
        return placed(jax.eval_shape(lambda: init(config, layout, jax.random.key(0))), mesh)


def learner(
    name: str, init: Init, config: Config, layout: Layout, optimizer: optax.GradientTransformation
) -> Roles:
    """The roles of a model that learns: itself and what its optimizer keeps."""

    def begin() -> TrainState:
        return init_state(init(config, layout, jax.random.key(0)), optimizer)

    found = placed(jax.eval_shape(begin))
    return {name: found.model, f"{name} optimizer": (found.step, found.opt_state)}


def state(roles: Roles, name: str) -> TrainState:
    """The state that an update of the model `name` is given."""
    step, opt_state = roles[f"{name} optimizer"]
    return TrainState(step, roles[name], opt_state)


def num_bytes(tree: Any) -> int:
    """Bytes of shapes on every device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def policy(config: Config, layout: Layout, mesh: Mesh | None = None) -> CausalLM:
    """A language model."""
    found: CausalLM = model(init_model, config, layout, mesh)
    return found


def lent_policy(config: Config, layout: Layout, mesh: Mesh) -> CausalLM:
    """One as `glm_jax.sampler` brings it to where it samples: its weights in the compute dtype."""

    def init(config: Config, layout: Layout, key: jax.Array) -> CausalLM:
        return cast_weights(init_model(config, layout, key))

    found: CausalLM = model(init, config, layout, mesh)
    return found


def scorer(config: Config, layout: Layout) -> ScalarModel:
    """A reward model or critic."""
    found: ScalarModel = model(init_scalar, config, layout)
    return found
