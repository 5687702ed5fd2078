"""Bytes of a device by role, from shapes alone: models, and what beside them learning or drawing answers takes.

Constants that are no sizes were set like those of `rlhf.plan.rough_time`.
"""

from glm_jax.config import Config, GLMConfig, GLMV1Config
from rlhf.plan.sizes import COMPUTE, MASTER, Pass, cache_bytes, layer_weights, num_weights, slots
from rlhf.programs import Workload
from sharding.layout import Layout
from sharding.pipeline import layer_slots, num_ticks

TRAINED = 3 * MASTER  # bytes a weight that learns keeps
PIECE_OF_LOGITS = 2**27  # bytes of logits that are there at a time
TABLES = 1.5  # copies of the gathered matrix of logits, a part of its gradient counted
STREAMS = 3  # copies of all rows of a pipeline: what enters, what leaves, and a gradient
WEIGHTS_OF_STAGE = 2.5  # a pipeline's weights in bfloat16, and gradients that add up


def resident_bytes(job: str, config: Config, layout: Layout) -> dict[str, float]:
    """Bytes of what is there all along."""
    whole, scalar = (num_weights(config, head) / _pieces(layout) for head in (True, False))
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


def sampling_bytes(config: Config, layout: Layout, workload: Workload) -> dict[str, float]:
    """What sampling has beside the models."""
    rows, tensor = workload.batch / layout.ways("batch"), layout.ways("heads")
    weights = num_weights(config) * COMPUTE / tensor
    if not isinstance(
        config, GLMV1Config
    ):  # whose table is its head: others look rows up in float32
        weights += config.vocab_size * config.hidden_size * (MASTER - COMPUTE) / tensor
    layer = rows * workload.prompt_length * COMPUTE * _arrays(config, layout)
    logits = rows * config.vocab_size * MASTER / layout.ways("vocab")
    return {
        "policy that samples": weights / layout.ways("embed_weight"),
        "keys and values": cache_bytes(config, layout, workload),
        "activations": layer + logits,
    }


def training_bytes(one: Pass, config: Config, layout: Layout) -> dict[str, float]:
    """What an update has beside the models: gradients, what layers keep, and what a layer or the head works with."""
    gradients = num_weights(config) / _pieces(layout) * MASTER
    stages, T, D = layout.ways("stage"), one.length, config.hidden_size
    rows = one.rows / layout.ways("batch") / layout.accumulate
    layers = config.num_layers / stages * slots(config, layout)
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


def _pieces(layout: Layout) -> int:
    """Devices that share a model."""
    return layout.ways("embed_weight") * layout.ways("heads") * layout.ways("stage")


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
