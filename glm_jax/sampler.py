"""Sampling in a layout of its own: the policy, or a copy that is as precise as sampling is, moves there and back.

Generation leaves a pipeline idle and reads every weight once a token, so the layout that trains fastest is seldom the
one that samples fastest (arXiv 2404.00934, section 3).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax.batch import Prompts
from glm_jax.config import Config
from glm_jax.continuous import Engine, RolloutConfig
from glm_jax.generate import Generation, SamplingConfig, generate
from glm_jax.model import CausalLM, cast_weights, init_model
from glm_jax.weights import kept_layout, restack
from sharding.errors import UserError
from sharding.layout import MESH_AXES, Layout
from sharding.pipeline import IDLE, layer_slots
from sharding.processes import fetch
from sharding.reshard import remesh


class Move(NamedTuple):
    """What a change of layout cost."""

    num_bytes: int  # that devices received from others, all devices together
    seconds: float


NO_MOVE = Move(0, 0.0)


class Sampler:
    """Draws answers: policies, prompts and answers are laid out for training, what happens inside is not.

    `generation` may be any layout of as many devices; None: the training layout without its pipeline. Its `pipe` axis
    carries batch. `rollout` says whether the answers of a batch are drawn side by side until the last has ended, or
    by an `Engine`; they are the same. Raises UserError where it does not fit the model or the devices.

    Attributes:
        to_generation: the program that brings a policy there, its weights in the compute dtype; None where both layouts
            split it alike.
        to_training: the program that brings it back; None where nothing was moved, or something was rounded. Each runs
            on the mesh that the policy comes from.
        generate: the program that draws answers side by side: (policy, prompts, seeds, key), on `mesh`.
        mesh: the devices as the generation layout has them.
    """

    def __init__(
        self,
        config: Config,
        sampling: SamplingConfig,
        stop_ids: tuple[int, ...],
        layout: Layout,
        generation: Layout | None = None,
        rollout: RolloutConfig = RolloutConfig(),
    ) -> None:
        self.training = layout
        self.generation = (generation or layout).for_generation()
        if self.generation.num_devices != layout.num_devices:
            raise UserError(
                f"the generation layout has {self.generation.num_devices} devices, training {layout.num_devices}: "
                f"both use the same ones"
            )
        config.check(self.generation)
        self._training_mesh = jax.sharding.get_mesh()
        self.mesh = _remeshed(self._training_mesh, self.generation)
        self.to_generation = _mover(config, layout, self.generation, self.mesh)
        self.to_training: Program | None = None
        if config.compute_dtype == "float32":
            self.to_training = _mover(config, self.generation, layout, self._training_mesh)
        self.engine: Engine | None = None  # None: answers are drawn side by side
        if rollout.slots is not None:
            self.engine = Engine(sampling, stop_ids, self.generation, rollout)
        draw = partial(generate, sampling=sampling, stop_ids=stop_ids, layout=self.generation)
        self.generate = jax.jit(draw)

    def __call__(
        self, policy: CausalLM, prompts: Prompts, key: jax.Array, samples: int = 1
    ) -> Generation:
        """Answers of a policy that stays where it is; a copy of it moves."""
        return self.draw(self.enter(policy), prompts, key, samples)

    def enter(self, policy: CausalLM) -> CausalLM:
        """A copy of the policy in the generation layout, its weights in the compute dtype.

        Where both layouts split it alike, the policy itself.
        """
        return self.to_generation(policy) if self.to_generation else policy

    @contextmanager
    def lend(self, policy: CausalLM) -> Iterator["Loan"]:
        """The policy in the generation layout, and no float32 copy of it beside it.

        A policy that computes in float32 moves: the training one is freed and made again. Of any other a copy in its
        compute dtype, half as large, moves there and is freed; the policy stays. Afterwards `Loan.policy` is the policy
        in the training layout, bit for bit.
        """
        loan = Loan(policy)
        if self.to_generation is not None:
            loan.policy, loan.there = _timed(
                self.to_generation, self.training, self.generation, policy
            )
        if self.to_training is None:
            yield loan
            if loan.policy is not policy:
                _free(loan.policy)
            loan.policy = policy
            return
        _free(policy)
        yield loan
        lent = loan.policy
        with jax.set_mesh(self.mesh):  # pieces are cut where they come from
            loan.policy, loan.back = _timed(self.to_training, self.generation, self.training, lent)
        _free(lent)

    def draw(
        self, policy: CausalLM, prompts: Prompts, key: jax.Array, samples: int = 1
    ) -> Generation:
        """Answers of a policy that is in the generation layout already, `samples` a prompt one after another.

        Sample k of row b is drawn with seed b * samples + k.
        """
        seeds = np.arange(len(prompts.ids) * samples, dtype=np.int32).reshape(-1, samples)
        key = jax.device_put(key, NamedSharding(self.mesh, PartitionSpec()))
        if self.engine is not None:
            host = fetch(prompts)
            with jax.set_mesh(self.mesh):
                drawn = self.engine.draw(policy, host, seeds, key)
            return self.training.put(drawn)

        def rows(x: jax.Array, layout: Layout, mesh: Mesh) -> jax.Array:
            spec = layout.spec("batch", *[None] * (x.ndim - 1))
            return jax.device_put(x, NamedSharding(mesh, spec))

        prompts = jax.tree.map(lambda x: rows(x, self.generation, self.mesh), prompts)
        with jax.set_mesh(self.mesh):
            answers = self.generate(policy, prompts, self.generation.put(seeds), key)
        return jax.tree.map(lambda x: rows(x, self.training, self._training_mesh), answers)


class Loan:
    """A policy, or what is lent in its place, on its way to the generation layout and back."""

    def __init__(self, policy: CausalLM) -> None:
        self.policy = policy
        self.there = self.back = NO_MOVE

    @property
    def cost(self) -> Move:
        """Of both ways."""
        return Move(
            self.there.num_bytes + self.back.num_bytes, self.there.seconds + self.back.seconds
        )


Program = Callable[[CausalLM], CausalLM]


def _remeshed(mesh: Mesh, layout: Layout) -> Mesh:
    """The same devices in the same order with the sizes of `layout`."""
    shape = tuple(layout.sizes.values())
    if mesh.devices.shape == shape:
        return mesh
    explicit = (AxisType.Explicit,) * len(MESH_AXES)
    return Mesh(mesh.devices.reshape(shape), MESH_AXES, axis_types=explicit)


def _shapes(config: Config, layout: Layout, mesh: Mesh) -> CausalLM:
    with jax.set_mesh(mesh):
        # the key too is made in there: of devices that are only described nothing can be allocated
        return jax.eval_shape(lambda: init_model(config, layout, jax.random.key(0)))


def _mover(config: Config, source: Layout, target: Layout, mesh: Mesh) -> Program | None:
    """The jitted program that moves a model in its compute dtype; None where both layouts split it alike."""
    like = _shapes(config, target, mesh)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), like)
    if source.sizes == target.sizes:
        if jax.tree.leaves(like) == jax.tree.leaves(_shapes(config, source, mesh)):
            return None
        return jax.jit(lambda model: restack(cast_weights(model), source, target))
    # layers and vocabulary are cut on the old mesh, what is left is to bring pieces to other devices
    between = kept_layout(source, config)

    def move(model: CausalLM) -> CausalLM:
        cut = restack(cast_weights(model), source, target, place=between)
        return jax.tree.map(remesh, cut, shardings)

    return jax.jit(move, out_shardings=shardings)


def _timed(
    program: Program, source: Layout, target: Layout, model: CausalLM
) -> tuple[CausalLM, Move]:
    begin = time.perf_counter()
    moved = jax.block_until_ready(program(model))
    seconds = time.perf_counter() - begin
    return moved, Move(moved_bytes(model, moved, source, target), seconds)


def _free(model: CausalLM) -> None:
    for leaf in jax.tree.leaves(model):
        leaf.delete()


def moved_bytes(old: CausalLM, new: CausalLM, source: Layout, target: Layout) -> int:
    """Bytes of `new` that its devices did not hold in `old`, from the shardings of both."""
    layers = old.trunk.config.num_layers
    slots = [layer_slots(layers, layout) for layout in (source, target)]
    total = 0
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True
    ):
        stacked = ".blocks." in jax.tree_util.keystr(path)
        had = before.sharding.devices_indices_map(before.shape)
        for device, index in after.sharding.devices_indices_map(after.shape).items():
            count, common = 1, 1
            if stacked:
                needed = set(slots[1][index[:2]].flat) - {IDLE}
                count, common = len(needed), len(needed & set(slots[0][had[device][:2]].flat))
            dims = list(zip(had[device], before.shape, index, after.shape, strict=True))
            for old_part, old_size, part, size in dims[2 if stacked else 0 :]:
                (first, last, _), (start, stop, _) = old_part.indices(old_size), part.indices(size)
                count *= stop - start
                common *= max(0, min(last, stop) - max(first, start))
            total += (count - common) * after.dtype.itemsize
    return total
