"""Log-probabilities made a part of the vocabulary after the other are those of whole logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import likelihood
from glm_jax.config import PRESETS, GLMConfig
from glm_jax.likelihood import hidden_logprobs, num_parts, sequence_logprobs
from glm_jax.model import CausalLM, init_model
from glm_jax.model_v2 import TrunkV2
from sharding.layout import Layout, get_layout
from tests.tolerances import rounding

B, T, D = 8, 6, 16


def _model(vocab_size: int, tied: bool, layout: Layout) -> CausalLM:
    """A head; of the trunk only what it needs. Its vocabulary is padded as the layout asks."""
    rng = np.random.default_rng(0)
    table = np.zeros((layout.padded(vocab_size, "vocab"), D), np.float32)
    table[:vocab_size] = rng.standard_normal((vocab_size, D))

    def put(x: np.ndarray, *axes: str) -> jax.Array:
        return jax.sharding.reshard(jnp.asarray(x), layout.spec(*axes))

    trunk = TrunkV2(
        embedding=put(table, "vocab", "embed_weight"),
        blocks=None,
        final_norm=jnp.ones(D),
        config=dataclasses.replace(PRESETS["chatglm3-6b"], vocab_size=vocab_size),
    )
    return CausalLM(trunk, None if tied else put(table.T, "embed_weight", "vocab"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "vocab_size", "parts"),
    [
        ("single", 66, 3),
        ("fsdp_tp", 63, 4),
        ("pp_dp_tp", 61, 4),
        ("single", 61, 4),  # which divides no prime
        ("fsdp_tp", 122, 4),
    ],
)
def test_logprobs_in_parts_and_their_gradient_are_those_of_whole_logits(
    name: str, vocab_size: int, parts: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = get_layout(name, 1 if name == "single" else 8)
    rng = np.random.default_rng(0)
    arrays = (
        rng.standard_normal((B, T, D)).astype(np.float32),
        rng.integers(0, vocab_size, (B, T)).astype(np.int32),
        rng.standard_normal((B, T)).astype(np.float32),
    )

    def results(model: CausalLM) -> list[jax.Array]:
        def loss(model: CausalLM, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            logp = hidden_logprobs(model, hidden, ids, layout)
            return jnp.sum(logp * weight), logp

        hidden, ids, weight = layout.put(arrays)
        grads, logp = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(model, hidden)
        return [logp, *jax.tree.leaves(grads)]

    with jax.set_mesh(layout.mesh()):
        model = _model(vocab_size, tied, layout)
        expected = results(model)
        columns = layout.padded(vocab_size, "vocab") // layout.ways("vocab")
        logits = B * T // layout.ways("batch") * columns
        monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", logits // parts)
        assert num_parts(model, B * T, layout) == parts
        found = results(model)
    for x, y in zip(found, expected, strict=True):
        # sums over the width and the vocabulary; a weight's gradient also over the tokens
        terms = D + vocab_size + B * T
        atol = rounding(terms, max(1.0, float(np.abs(y).max())))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def test_no_logits_of_the_whole_vocabulary(small: GLMConfig) -> None:
    layout = get_layout("fsdp", 8)
    config = dataclasses.replace(small, vocab_size=1 << 19)
    with jax.set_mesh(layout.mesh()):
        model = jax.eval_shape(lambda: init_model(config, layout, jax.random.key(0)))
        spec = jax.NamedSharding(layout.mesh(), layout.spec("batch", None))
        ids, valid = (
            jax.ShapeDtypeStruct((64, 64), t, sharding=spec) for t in (jnp.int32, jnp.bool_)
        )

        def loss(model: CausalLM, ids: jax.Array, valid: jax.Array) -> jax.Array:
            return jnp.sum(sequence_logprobs(model, ids, valid, layout))

        text = jax.jit(jax.grad(loss)).lower(model, ids, valid).as_text()
    # 512 tokens of a device: 2^28 logits in four parts
    assert "4096x131072xf32" in text
    assert "4096x524288x" not in text
