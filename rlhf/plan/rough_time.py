"""Seconds of a pass, and of drawing answers, from shapes alone.

A pass over the layers is a roofline of its products with the collectives that its layout asks for: gathers of weights
run beside products, as do in part the sums of gradients, and what tensor shards and stages send does not. All figures
are one device's. Constants below that are no sizes were set on 60 updates of GLM-4 that the TPU compiler compiled for
v5e and v5p (`docs/layouts/`).
"""

import math
from functools import lru_cache

import numpy as np

from glm_jax.config import Config
from rlhf.plan.sizes import COMPUTE, MASTER, Pass, cache_bytes, layer_weights, num_weights, slots
from rlhf.programs import Workload
from sharding.chips import Pod
from sharding.collectives import Collective, Groups
from sharding.layout import Layout
from sharding.network import transfer
from sharding.pipeline import bubble_fraction, layer_slots, num_ticks
from sharding.schedule import KERNEL_SHARE, MEMORY_SHARE, PRODUCT_SHARE

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


def pass_seconds(one: Pass, config: Config, layout: Layout, pod: Pod) -> dict[str, float]:
    """Seconds by kind of work."""
    chip, T, D = pod.chip, one.length, config.hidden_size
    tokens = one.rows * T / layout.ways("batch")
    stages, tensor = layout.ways("stage"), layout.ways("heads")
    layers = config.num_layers / stages * slots(config, layout)
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
    one: Pass, config: Config, layout: Layout, pod: Pod, products_s: float, visits: int
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
    layers = config.num_layers / stages * slots(config, layout)
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


def drawing_seconds(
    config: Config, layout: Layout, workload: Workload, pod: Pod
) -> dict[str, float]:
    """Prompts in one pass, then a token at a time: every one reads all weights and keys and values."""
    chip = pod.chip
    prompts = Pass(workload.batch, workload.prompt_length, False, False)
    found = pass_seconds(prompts, config, layout, pod)
    rows, tensor = workload.batch / layout.ways("batch"), layout.ways("heads")
    weights = num_weights(config) / tensor
    kept = cache_bytes(config, layout, workload)
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
