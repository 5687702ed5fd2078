"""How much a job works on, from shapes alone: passes over rows, weights, slots of a pipeline, keys and values."""

import dataclasses

from glm_jax.config import Config, GLMV1Config
from rlhf.programs import Workload
from sharding.layout import Layout
from sharding.pipeline import bubble_fraction, layer_slots

COMPUTE = 2  # bytes of a number in the layers
MASTER = 4  # of weights, gradients and the optimizer's two moments


@dataclasses.dataclass(frozen=True)
class Pass:
    """A model over some rows."""

    rows: int
    length: int
    head: bool  # logits for every token
    backward: bool
    times: int = 1


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


def slots(config: Config, layout: Layout) -> float:
    """Layers that a stage works through for each of its own share, empty slots and idle ticks counted."""
    stages = layout.ways("stage")
    padded = layer_slots(config.num_layers, layout).size / config.num_layers
    return padded / (1 - bubble_fraction(layout)) if stages > 1 else 1.0


def cache_bytes(config: Config, layout: Layout, workload: Workload) -> float:
    """Bytes of keys and values; heads that tensor shards share are on each."""
    rows = workload.batch / layout.ways("batch")
    groups = max(config.num_kv_groups / layout.ways("heads"), 1)
    return 2 * rows * workload.length * groups * config.head_dim * COMPUTE * config.num_layers
