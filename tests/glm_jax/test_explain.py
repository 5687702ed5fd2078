"""What explain says a device holds is what the compiler reserves for the arguments."""

import dataclasses

import jax
import numpy as np
import pytest

from glm_jax.batch import Sequences
from glm_jax.config import PRESETS, Config, GLMConfig, GLMV1Config
from glm_jax.explain import explain, placed
from glm_jax.model import init_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.train import init_state
from rlhf.sft import sft_update
from sharding.errors import UserError
from sharding.layout import Layout, get_layout


@pytest.mark.parametrize("name", ["1x2x2x2", "1x1x1x8", "2x2x2x1:gpipe", "4x1x1x2:circular:4:2"])
@pytest.mark.parametrize("v1", [False, True])
def test_totals_are_the_compilers(
    small: GLMConfig, small_v1: GLMV1Config, name: str, v1: bool
) -> None:
    config: Config = dataclasses.replace(small_v1 if v1 else small, num_layers=5, vocab_size=67)
    layout = get_layout(name, 8)
    rows, length = 16, 8
    found = explain(config, layout, rows, length)
    optimizer = make_optimizer(OptimConfig(), 1)
    with jax.set_mesh(layout.mesh()):

        def start() -> object:
            return init_state(init_model(config, layout, jax.random.key(0)), optimizer)

        ids = np.zeros((rows, length), np.int32)
        batch = layout.put(Sequences(ids, ids > 0, ids > 0))
        update = sft_update(optimizer, layout).lower(jax.eval_shape(start), batch)  # type: ignore[attr-defined]
        argument_bytes = update.compile().memory_analysis().argument_size_in_bytes
    step, per_token = 4, 4 + 1 + 1
    of_batch = rows * length * per_token // layout.ways("batch")
    assert found.weights + found.optimizer + step + of_batch == argument_bytes
    assert found.gradients == found.weights


def test_a_pod_that_is_not_here() -> None:
    layout = get_layout("4x2x16x2:circular:8", None)
    found = explain(PRESETS["glm-4-32b-0414"], layout, 256, 4096)
    arrays = {array.name: array for array in found.parameters}
    gate = arrays[".trunk.blocks.w_gate"]
    assert gate.shape == (4, 16, 6144, 23040)  # 61 layers in 64 slots
    assert gate.axes == ("stage", "layer", "embed_weight", "ffn")
    assert gate.rules == {"stage": ("pipe",), "embed_weight": ("fsdp",), "ffn": ("tensor",)}
    assert gate.bytes_per_device == 4 * 4 * 16 * 6144 * 23040 // (4 * 16 * 2)
    assert gate.replicas == 2
    assert arrays[".trunk.final_norm"].replicas == layout.num_devices == 256
    keys = arrays[".trunk.blocks.w_k"]
    assert keys.axes[3] == "kv_heads"
    logits = next(array for array in found.activations if array.name.startswith("logits"))
    assert logits.shape == (256, 4096, 151552)
    assert found.optimizer == pytest.approx(2 * found.weights, rel=1e-6)


def test_kv_groups_that_do_not_divide_are_whole_everywhere() -> None:
    found = explain(PRESETS["chatglm3-6b"], Layout(tensor=4), 1, 16)
    keys = next(array for array in found.parameters if array.name.endswith("w_k"))
    assert keys.axes[3] is None and keys.replicas == 4


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="batch = 3 does not divide"):
        explain(PRESETS["chatglm3-6b"], Layout(data=2), 3, 16)
    with pytest.raises(ValueError, match="x: ffn = 9 does not divide into 2"):
        placed("x", (9,), np.float32, ("ffn",), Layout(tensor=2))
