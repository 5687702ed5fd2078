"""What the generations of the family share: how layers are stacked, run over a mesh, and cached.

A model is a Flax module that only holds arrays, hence the pytree of its parameters. The layers are stacked
[stage, layer, ...]: a scan runs the layers of a stage, `sharding.pipeline` the stages. A generation is a `Trunk` that
says where tokens stand (`places`), how that rotates them (`rotations`) and what one layer does (`layer`).
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from glm_jax.attention import Attend, Sight, attention, over_sequences, own_groups
from glm_jax.config import Config
from glm_jax.layers import Rotation, gathered, spread
from sharding.layout import Layout
from sharding.pipeline import run_stages
from sharding.remat import kept, rematerialised

# Which sequence a token belongs to: 0 is padding; a bool array marks real tokens of one sequence a row.
Segments = Int[Array, "B T"] | Bool[Array, "B T"]
Rotations = tuple[Rotation, ...]  # one an axis of position


class Places(NamedTuple):
    """Where tokens stand; A axes of position (2 in ChatGLM-6B, else 1)."""

    sight: Sight
    positions: Int[Array, "B T A"]


class Cache(NamedTuple):
    """Keys and values of every layer, each as the product that reads it has it.

    Where tensor shards outnumber kv groups, K counts the copies that they read (`own_groups`). Keys were rotated by
    their positions, so that the order of the columns means nothing.
    """

    keys: Float[Array, "layer B K H S"]
    values: Float[Array, "layer B K S H"]
    real: Bool[Array, "B S"]  # columns that hold a token of the row's sequence
    position: Int[Array, "B A"]  # of the token that came last


def running_sum(values: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Sum of `values` (>= 0) from the beginning of a token's segment up to the token."""
    previous = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    total = jnp.cumsum(values, axis=1)
    before = jnp.where(segments != previous, total - values, 0)  # what earlier segments summed to
    return total - jax.lax.cummax(before, axis=1)


@nnx.dataclass
class Trunk(nnx.Module):
    """Everything below a head: embedding, layers, final norm."""

    embedding: jax.Array = nnx.data()  # V D
    blocks: Any = nnx.data()  # the generation's Block, stacked [stage, layer, ...]
    final_norm: jax.Array = nnx.data()  # D
    config: Config = nnx.static()

    position_step: ClassVar[tuple[int, ...]] = (
        1,
    )  # what one more token adds to each axis of its position

    def places(self, ids: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Places:
        """Where the tokens of these sequences stand."""
        raise NotImplementedError

    def rotations(self, positions: Int[Array, "B T A"]) -> Rotations:
        """How queries and keys at these positions are rotated, in every layer."""
        raise NotImplementedError

    def layer(
        self, block: Any, x: jax.Array, rotations: Rotations, attend: Attend, layout: Layout
    ) -> jax.Array:
        """One layer [B, T, D] -> [B, T, D]; `attend` is the attention over whatever keys there are."""
        raise NotImplementedError

    def finish(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The final norm."""
        raise NotImplementedError

    def __call__(
        self, ids: Int[Array, "B T"], segments: Segments, layout: Layout
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm, of whole sequences.

        `segments` is 0 (or False) at padding, which may stand on either side; several sequences packed into a row
        have numbers of their own and do not see each other. What comes out at padding means nothing.
        """

        def stage(
            blocks: Any, real: jax.Array | None, state: tuple[jax.Array, Places], layout: Layout
        ) -> tuple[jax.Array, Places]:
            x, places = state
            attend = over_sequences(places.sight, layout)
            rotations = self.rotations(places.positions)

            def layer(x: jax.Array, now: tuple[Any, jax.Array | None]) -> tuple[jax.Array, None]:
                block, is_real = now
                y = self.layer(block, x, rotations, attend, layout)
                return y if is_real is None else jnp.where(is_real, y, x), None

            work = rematerialised(layer, layout.remat)
            # a pipeline's chunk that is made again begins at every layer anew, and no layer twice
            return jax.lax.scan(lambda x, now: work(kept(x), now), x, (blocks, real))[0], places

        places = self.places(ids, segments.astype(jnp.int32))
        state = (spread(self.embed(ids, layout), layout), places)
        x, _ = run_stages(stage, self.compute_blocks(), state, self.config.num_layers, layout)
        return self.finish(gathered(x, layout))

    def prefill(
        self, ids: Int[Array, "B T"], real: Bool[Array, "B T"], room: int, layout: Layout
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of left-padded prompts, and a cache of them with `room` more columns.

        The layout must be as `Layout.for_generation` gives it: no pipeline stages, tokens not split.
        """
        places = self.places(ids, real.astype(jnp.int32))
        within, rotations = over_sequences(places.sight, layout), self.rotations(places.positions)

        def layer(x: jax.Array, block: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            written = []

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                k, v = own_groups(k, v, layout)
                written.append(_with_room(_key_columns(k), room, axis=3))
                written.append(_with_room(_value_rows(v), room, axis=2))
                return within(q, k, v)

            x = self.layer(block, x, rotations, attend, layout)
            return x, (written[0], written[1])

        x, (keys, values) = jax.lax.scan(layer, self.embed(ids, layout), self._single_stage())
        cache = Cache(
            keys=keys,
            values=values,
            real=jnp.pad(real, ((0, 0), (0, room))),
            position=places.positions[:, -1],
        )
        return self.finish(x), cache

    def decode(
        self, ids: Int[Array, " B"], cache: Cache, column: Int[Array, ""], layout: Layout
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Hidden states of one further token a row, and the cache with them in `column`."""
        position = cache.position + jnp.array(self.position_step)
        rotations = self.rotations(position[:, None])
        real = cache.real | (jnp.arange(cache.real.shape[1]) == column)
        mask = real[:, None, :]

        # the caches are carried, not scanned over: so a step writes one column of them and copies nothing
        def layer(
            carry: tuple[jax.Array, jax.Array, jax.Array], block_and_number: tuple[Any, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
            x, keys, values = carry
            block, number = block_and_number
            written = []

            def append(cache: jax.Array, new: jax.Array, place: tuple[Any, ...]) -> jax.Array:
                written.append(jax.lax.dynamic_update_slice(cache, new[None], place))
                return jax.lax.dynamic_index_in_dim(written[-1], number, keepdims=False)

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                k, v = own_groups(k, v, layout)
                k = append(keys, _key_columns(k), (number, 0, 0, 0, column))
                v = append(values, _value_rows(v), (number, 0, 0, column, 0))
                k, v = jnp.transpose(k, (0, 3, 1, 2)), jnp.transpose(v, (0, 2, 1, 3))
                return attention(q, k, v, mask, layout)

            x = self.layer(block, x, rotations, attend, layout)
            return (x, written[0], written[1]), None

        start = (self.embed(ids[:, None], layout), cache.keys, cache.values)
        numbers = jnp.arange(len(cache.keys))
        (x, keys, values), _ = jax.lax.scan(layer, start, (self._single_stage(), numbers))
        return self.finish(x)[:, 0], Cache(keys, values, real, position)

    def embed(self, ids: Int[Array, "B T"], layout: Layout) -> Float[Array, "B T D"]:
        """Rows of the embedding table, in the compute dtype; NaN for ids that the vocabulary does not have."""
        if (
            len(self.embedding) > self.config.vocab_size
        ):  # rows of padding, for shards of equal size
            ids = jnp.where(ids < self.config.vocab_size, ids, len(self.embedding))
        rows = self.embedding.at[ids].get(
            mode="fill",
            fill_value=jnp.nan,
            wrap_negative_indices=False,
            out_sharding=layout.spec("batch", "time", "embed"),
        )
        return rows.astype(self.config.compute_dtype)

    def compute_blocks(self) -> Any:
        """The layers' weights in the compute dtype: the one place where they leave float32.

        Norm scales stay as they are, the norms multiply in float32.
        """

        def cast(path: tuple[jax.tree_util.KeyEntry, ...], w: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path)
            return w if "norm" in name else w.astype(self.config.compute_dtype)

        return jax.tree_util.tree_map_with_path(cast, self.blocks)

    def _single_stage(self) -> Any:
        return jax.tree.map(lambda w: w[0], self.compute_blocks())


def _key_columns(k: Float[Array, "B T K H"]) -> Float[Array, "B K H T"]:
    return jnp.transpose(k, (0, 2, 3, 1))


def _value_rows(v: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
    return jnp.transpose(v, (0, 2, 1, 3))


def _with_room(x: jax.Array, room: int, axis: int) -> jax.Array:
    return jnp.pad(x, [(0, room if dim == axis else 0) for dim in range(x.ndim)])
