"""What a model asks of products is what a program of one device does, but for what no token may see."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from glm_jax.config import GLMConfig, GLMV1Config
from glm_jax.flops import forward_flops, training_flops
from glm_jax.model import apply_model, init_model
from sharding.cost import cost
from sharding.hlo import read
from sharding.layout import Layout


@pytest.mark.parametrize("v1", [False, True])
def test_a_forward_pass(small: GLMConfig, small_v1: GLMV1Config, v1: bool) -> None:
    config, rows, length = small_v1 if v1 else small, 3, 10
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        model = jax.eval_shape(partial(init_model, config, layout), jax.random.key(0))
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        apply = jax.jit(partial(apply_model, layout=layout))
        valid = jax.ShapeDtypeStruct((rows, length), jnp.bool_)
        done = cost(read(apply.lower(model, ids, valid).compile())).flops
    hidden_pairs = rows * length * (length - 1) // 2  # the program computes them all the same
    unseen = config.num_layers * 4 * hidden_pairs * config.num_heads * config.head_dim
    asked = forward_flops(config, rows, length, length)
    assert done == asked + unseen
    assert training_flops(config, rows, length, length) == 3 * asked


def test_logits_that_nobody_asks_for_do_not_count(small: GLMConfig) -> None:
    per_token = 2 * small.hidden_size * small.vocab_size
    found = [forward_flops(small, 2, 8, logits) for logits in (0, 3)]
    assert found[1] - found[0] == 2 * 3 * per_token
