"""Time and memory of a job under a layout, from shapes alone: good enough to say which layouts are worth compiling.

A pass over the layers is a roofline of its products with the collectives that its layout asks for: gathers of weights
run beside products, as do in part the sums of gradients, and what tensor shards and stages send does not. All figures
are one device's. Constants below that are no sizes were set on 60 updates of GLM-4 that the TPU compiler compiled for
v5e and v5p (`docs/layouts/`).
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np

from glm_jax.config import Config, GLMConfig, GLMV1Config
from rlhf.programs import Workload
from sharding.chips import Pod
from sharding.collectives import Collective, Groups
from sharding.layout import Layout
from sharding.network import transfer
from sharding.pipeline import bubble_fraction, layer_slots, num_ticks
from sharding.schedule import KERNEL_SHARE, MEMORY_SHARE, PRODUCT_SHARE

COMPUTE = 2  # bytes of a number in the layers
MASTER = 4  # of weights, gradients and the optimizer's two moments
TRAINED = 3 * MASTER  # bytes a weight that learns keeps
ROWS_OF_D = 12  # arrays [B, T, D] that a layer moves through memory in a pass, about
ROWS_OF_F = 6  # and [B, T, F]
STAYS = 2**25  # bytes of an array that the memory on the chip holds until it is used
# of the memory's time so much shows beside products: where arrays stay on the chip, and where they do not
SHOWN_ON_CHIP, SHOWN = 0.75, 1.5
# of the time of gradients' sums so much is waited for: where all devices share weights, and where some have copies
WAITED, WAITED_FOR_COPIES = 0.5, 1.5
# sums of activations over tensor shards, of a layer forward and backward, and forward alone
SUMS, SUMS_FORWARD = 3.5, 2
BLOCK = 512  # queries and keys that an attention kernel takes at a time
# times that the weights of a pipeline's tick move through memory: of the circular schedule, which picks a chunk of
# layers and adds its gradients to those of the stage; and of GPipe, which picks none
PICKED, ADDED = 12, 3.5
PIECE_OF_LOGITS = 2**27  # bytes of logits that are there at a time
TABLES = 1.5  # copies of the gathered matrix of logits, a part of its gradient counted
STREAMS = 3  # copies of all rows of a pipeline: what enters, what leaves, and a gradient
WEIGHTS_OF_STAGE = 2.5  # a pipeline's weights in bfloat16, and gradients that add up


@dataclasses.dataclass(frozen=True)
class Rough:
    """What a step takes."""

    seconds: Mapping[str, float]  # by kind of work
    rollout_s: float  # of which drawing answers
    memory: Mapping[str, int]  # bytes by role

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.memory.values())


@dataclasses.dataclass(frozen=True)
class _Pass:
    """A model over some rows."""

    rows: int
    length: int
    head: bool  # logits for every token
    backward: bool
    times: int = 1


def rough(
    job: str,
    config: Config,
    layout: Layout,
    workload: Workload,
    pod: Pod,
    generation: Layout | None = None,
    minibatches: int = 2,
) -> Rough:
    """Of a step of `job`, which of PPO is an iteration."""
    seconds: dict[str, float] = defaultdict(float)
    passes = list(_passes(job, workload, minibatches))
    for one in passes:
        for name, value in _pass_seconds(one, config, layout, pod).items():
            seconds[name] += value * one.times
    training = max((one for one in passes if one.backward), key=lambda one: one.rows * one.length)
    rollout, working = 0.0, _working(training, config, layout)
    if job == "ppo":
        sampling = (generation or layout).for_generation()
        drawn = _drawing(config, sampling, workload, pod)
        rollout = sum(drawn.values())
        for name, value in drawn.items():
            seconds[name] += value
        working = max(working, _held(config, sampling, workload), key=lambda x: sum(x.values()))
    memory = {name: int(size) for name, size in (_roles(job, config, layout) | working).items()}
    return Rough(dict(seconds), rollout, memory)


def _passes(job: str, workload: Workload, minibatches: int) -> Iterator[_Pass]:
    rows, length = workload.batch, workload.length
    if job == "sft":
        yield _Pass(rows, length, True, True)
    elif job == "reward":
        yield _Pass(2 * rows, length, False, True)
    elif job == "dpo":
        yield _Pass(2 * rows + workload.sft_rows(rows), length, True, True)
    else:
        piece = rows // minibatches
        yield _Pass(rows, length, True, False, 2)  # policy and reference
        yield _Pass(rows, length, False, False, 2)  # reward model and critic
        yield _Pass(piece + workload.sft_rows(piece), length, True, True, minibatches)
        yield _Pass(piece, length, False, True, minibatches)  # critic


def layer_weights(config: Config) -> int:
    """Entries of the matrices of one layer."""
    D, heads = config.hidden_size, config.num_heads * config.head_dim
    kv = 2 * config.num_kv_groups * config.head_dim
    mlp = (2 if isinstance(config, GLMV1Config) else 3) * D * config.ffn_size
    return D * (2 * heads + kv) + mlp


def num_weights(config: Config, head: bool = True) -> int:
    """Of a model, norms and biases left out."""
    tables = 1 if isinstance(config, GLMV1Config) or not head else 2
    return (
        config.num_layers * layer_weights(config) + tables * config.vocab_size * config.hidden_size
    )


def _slots(config: Config, layout: Layout) -> float:
    """Layers that a stage works through for each of its own share, empty slots and idle ticks counted."""
    stages = layout.ways("stage")
    padded = layer_slots(config.num_layers, layout).size / config.num_layers
    return padded / (1 - bubble_fraction(layout)) if stages > 1 else 1.0


def _pass_seconds(one: _Pass, config: Config, layout: Layout, pod: Pod) -> dict[str, float]:
    chip, T, D = pod.chip, one.length, config.hidden_size
    tokens = one.rows * T / layout.ways("batch")
    stages, tensor = layout.ways("stage"), layout.ways("heads")
    layers = config.num_layers / stages * _slots(config, layout)
    remade = one.backward and layout.remat == "full"
    runs = 1 + (2 if one.backward else 0) + (1 if remade else 0)  # forward passes' worth
    visits = 1 + (1 if one.backward else 0) + (1 if remade else 0)

    weights = layer_weights(config)
    products = layers * runs * 2 * tokens * weights / tensor
    if remade:  # the last product is not asked for again
        products -= layers * 2 * tokens * D * config.ffn_size / tensor
    if one.head:  # whose logits are made in parts, and again for the gradient
        head = 2 * tokens * D * config.vocab_size / layout.ways("vocab")
        products += head * (4 if one.backward else 1)
    pairs = T * (T + min(T, BLOCK)) / 2  # a causal kernel works in blocks
    seen = 2 * 2 * tokens / T * pairs * config.num_heads * config.head_dim / tensor
    again = layout.remat != "none"  # no policy keeps what attention gives
    kernels = layers * seen * (1 + (2.5 + again if one.backward else 0))
    narrow = ROWS_OF_D * (1 + 1 / layout.ways("sequence")) / 2  # half of them are split over tokens
    moved = layers * visits * tokens * COMPUTE * (narrow * D + ROWS_OF_F * config.ffn_size / tensor)
    moved += layers * visits * weights / tensor * COMPUTE * 2
    if one.backward:
        moved += 8 * MASTER * num_weights(config) / (layout.ways("embed_weight") * tensor * stages)
    at_once = tokens / layout.microbatches * D * COMPUTE
    shown = SHOWN if at_once > STAYS else SHOWN_ON_CHIP
    picked = _picked(config, layout) * COMPUTE if one.backward else 0.0
    products_s = products / (chip.flops * PRODUCT_SHARE)
    found = {
        "products": products_s,
        "attention": kernels / (chip.flops * KERNEL_SHARE),
        "memory": (shown * moved + picked) / (chip.memory_bandwidth * MEMORY_SHARE),
    }
    return found | _talk(one, config, layout, pod, products_s, visits)


def _picked(config: Config, layout: Layout) -> float:
    """Weights that a stage moves through memory in all ticks, to work with a chunk and to add its gradients up."""
    stages = layout.ways("stage")
    chunk = layer_slots(config.num_layers, layout).size // (stages * layout.repeats)
    if stages == 1 or (layout.repeats > 1 and chunk == 1):
        return 0.0
    weights = chunk * layer_weights(config) / layout.ways("heads")
    return num_ticks(layout) * weights * (PICKED if layout.repeats > 1 else ADDED)


def _talk(
    one: _Pass, config: Config, layout: Layout, pod: Pod, products_s: float, visits: int
) -> dict[str, float]:
    """Seconds that a device waits for others, by what for."""
    stages, tensor = layout.ways("stage"), layout.ways("heads")
    found = {"weights": 0.0, "gradients": 0.0, "activations": 0.0}
    own = config.num_layers / stages * layer_weights(config) / tensor  # weights of a stage
    tables = num_weights(config) - config.num_layers * layer_weights(config)
    own += tables / layout.ways("vocab")
    storage, replicas = layout.axes("embed_weight"), _copies(layout)
    if storage:
        gathers = visits if stages == 1 else 1  # of a pipeline once a step, before its ticks
        gathered = _seconds("all-gather", gathers * own * COMPUTE, storage, layout, pod)
        # within the layers it runs beside products, as long as these last
        found["weights"] = max(gathered - products_s, 0.02 * gathered) if stages == 1 else gathered
    whole = {*storage, *replicas} == {axis for axis, size in layout.sizes.items() if size > 1}
    if one.backward and whole:  # the compiler scatters nothing then
        found["gradients"] = _seconds(
            "all-reduce", own * COMPUTE, (*replicas, *storage), layout, pod
        ) * (WAITED_FOR_COPIES if replicas else WAITED)
    elif one.backward:
        if storage:
            found["gradients"] += _seconds("reduce-scatter", own * COMPUTE, storage, layout, pod)
        if replicas:
            shard = own / layout.ways("embed_weight")
            found["gradients"] += _seconds("all-reduce", shard * MASTER, replicas, layout, pod)
        found["gradients"] *= WAITED_FOR_COPIES
    layers = config.num_layers / stages * _slots(config, layout)
    rows = one.rows * one.length / layout.ways("batch") * config.hidden_size * COMPUTE
    if tensor > 1:
        # a gather and a scattered sum are one sum for all; of those for gradients products hide a part
        sums = (SUMS if one.backward else SUMS_FORWARD) * layers * rows
        found["activations"] += _seconds("all-reduce", sums, layout.axes("heads"), layout, pod)
    if stages > 1:
        passed = rows * layout.repeats * (2 if one.backward else 1) / (1 - bubble_fraction(layout))
        found["activations"] += passed / pod.chip.link_bandwidth
    return found


def _copies(layout: Layout) -> tuple[str, ...]:
    """Mesh axes of the batch along which weights are the same."""
    return tuple(a for a in layout.axes("batch") if a not in layout.axes("embed_weight"))


def _seconds(kind: str, num_bytes: float, axes: tuple[str, ...], layout: Layout, pod: Pod) -> float:
    groups = _groups(tuple(layout.sizes.items()), axes)
    return transfer(Collective(kind, kind, groups, int(num_bytes), 1), pod).seconds


@lru_cache(maxsize=1000)
def _groups(sizes: tuple[tuple[str, int], ...], axes: tuple[str, ...]) -> Groups:
    """The devices that differ along `axes` alone."""
    names = [name for name, _ in sizes]
    ids = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    last = np.moveaxis(ids, [names.index(axis) for axis in axes], range(-len(axes), 0))
    count = math.prod(dict(sizes)[axis] for axis in axes)
    return tuple(tuple(row) for row in last.reshape(-1, count).tolist())


def _drawing(config: Config, layout: Layout, workload: Workload, pod: Pod) -> dict[str, float]:
    """Prompts in one pass, then a token at a time: every one reads all weights and keys and values."""
    chip = pod.chip
    prompts = _Pass(workload.batch, workload.prompt_length, False, False)
    found = _pass_seconds(prompts, config, layout, pod)
    rows, tensor = workload.batch / layout.ways("batch"), layout.ways("heads")
    weights = num_weights(config) / tensor
    kept = _cache(config, layout, workload)
    read = (weights * COMPUTE + kept) / (chip.memory_bandwidth * MEMORY_SHARE)
    products = 2 * rows * weights / (chip.flops * PRODUCT_SHARE)
    tokens = workload.response_length
    found["products"] += tokens * products
    found["memory"] += tokens * max(read - products, 0.0)
    if axes := layout.axes("embed_weight"):
        gathered = _seconds("all-gather", weights * COMPUTE, axes, layout, pod)
        found["weights"] += tokens * max(gathered - read, 0.0)
    if tensor > 1:
        sums = 2 * config.num_layers * rows * config.hidden_size * COMPUTE
        latency = (
            2 * config.num_layers * _seconds("all-reduce", 0, layout.axes("heads"), layout, pod)
        )
        found["activations"] += tokens * (
            _seconds("all-reduce", sums, layout.axes("heads"), layout, pod) + latency
        )
    return found


def _cache(config: Config, layout: Layout, workload: Workload) -> float:
    """Bytes of keys and values; heads that tensor shards share are on each."""
    rows = workload.batch / layout.ways("batch")
    groups = max(config.num_kv_groups / layout.ways("heads"), 1)
    return 2 * rows * workload.length * groups * config.head_dim * COMPUTE * config.num_layers


def _roles(job: str, config: Config, layout: Layout) -> dict[str, float]:
    """Bytes of what is there all along."""
    pieces = layout.ways("embed_weight") * layout.ways("heads") * layout.ways("stage")
    whole, scalar = num_weights(config) / pieces, num_weights(config, False) / pieces
    if job == "reward":
        return {"model and optimizer": scalar * TRAINED, "start": scalar * MASTER}
    found = {"model and optimizer": whole * TRAINED}
    if job != "ppo":
        return found | {"start": whole * MASTER}
    return found | {
        "critic and optimizer": scalar * TRAINED,
        "reference": whole * MASTER,
        "reward model": scalar * MASTER,
    }


def _held(config: Config, layout: Layout, workload: Workload) -> dict[str, float]:
    """What sampling has beside the models."""
    rows, tensor = workload.batch / layout.ways("batch"), layout.ways("heads")
    table = config.vocab_size * config.hidden_size / tensor  # looked up in float32
    weights = num_weights(config) / tensor * COMPUTE + table * (MASTER - COMPUTE)
    layer = rows * workload.prompt_length * COMPUTE * _arrays(config, layout)
    logits = rows * config.vocab_size * MASTER / layout.ways("vocab")
    return {
        "policy that samples": weights / layout.ways("embed_weight"),
        "keys and values": _cache(config, layout, workload),
        "activations": layer + logits,
    }


def _working(one: _Pass, config: Config, layout: Layout) -> dict[str, float]:
    """What an update has beside the models: gradients, what layers keep, and what a layer or the head works with."""
    pieces = layout.ways("embed_weight") * layout.ways("heads") * layout.ways("stage")
    gradients = num_weights(config) / pieces * MASTER
    stages, T, D = layout.ways("stage"), one.length, config.hidden_size
    rows = one.rows / layout.ways("batch") / layout.accumulate
    layers = config.num_layers / stages * _slots(config, layout)
    kept = layers * rows * T * COMPUTE * _kept(config, layout)
    layer = rows / layout.microbatches * T * COMPUTE * _arrays(config, layout)
    weights = layer_weights(config) / layout.ways("heads") * COMPUTE
    if stages > 1:
        # what enters and leaves them, whole stages of weights, and gradients that add up
        kept += STREAMS * rows * T * D * COMPUTE
        weights *= layer_slots(config.num_layers, layout).size / stages
        if layout.remat == "none" and layout.repeats > 1:  # every tick keeps what it picks
            kept += num_ticks(layout) * weights / layout.repeats
        weights *= WEIGHTS_OF_STAGE
    else:
        weights *= 2 if layout.axes("embed_weight") else 1  # or its gradient alone
    logits = 0.0
    if one.head:
        split = layout.ways("vocab")
        logits = min(rows * T * config.vocab_size * MASTER / split, PIECE_OF_LOGITS)
        logits += TABLES * D * config.vocab_size * COMPUTE / split
    found = {"gradients": gradients, "activations": kept, "gathered weights": 0.0, "logits": logits}
    if stages > 1 or layer + weights > logits:  # a pipeline's weights are there all along
        found |= {"activations": kept + layer, "gathered weights": weights, "logits": 0.0}
    return found


def _kept(config: Config, layout: Layout) -> float:
    """Entries that a layer keeps of a token for its gradient."""
    D, tensor = config.hidden_size, layout.ways("heads")
    queries = config.num_heads * config.head_dim
    products = (queries + 2 * config.num_kv_groups * config.head_dim) / tensor
    wide = config.ffn_size / tensor
    if layout.remat == "full":
        # its input, the sum over heads, and of the MLP what a norm is behind
        sandwich = isinstance(config, GLMConfig) and config.sandwich_norms
        return (1 + (tensor > 1) + sandwich) * D / tensor
    if layout.remat == "none":
        return 2 * D + products + queries / tensor + 3 * wide
    return (2.5 if tensor == 1 else 1.5) * D + products + 2 * wide


def _arrays(config: Config, layout: Layout) -> float:
    """Entries of a token in the arrays that a layer works with at a time."""
    heads = config.num_heads * config.head_dim
    return 6 * config.hidden_size + 4 * (heads + config.ffn_size) / layout.ways("heads")
