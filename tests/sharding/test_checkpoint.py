"""A checkpoint comes back bit for bit, also onto another layout."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import checkpoint
from sharding.errors import UserError
from sharding.layout import Layout


def test_restore_onto_another_layout(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    with jax.set_mesh(Layout(data=2).mesh()):
        checkpoint.save(tmp_path / "step", {"w": jnp.asarray(values), "none": None})
    target = Layout(fsdp=4, tensor=2)
    with jax.set_mesh(target.mesh()):
        spec = target.spec("embed_weight", "ffn")
        like = {"w": jnp.zeros((16, 8), out_sharding=spec), "none": None}
        restored = checkpoint.restore(tmp_path / "step", like)
    np.testing.assert_array_equal(np.asarray(restored["w"]), values)
    assert jax.typeof(restored["w"]).sharding.spec == spec


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with jax.set_mesh(Layout().mesh()), pytest.raises(UserError, match="nowhere is no checkpoint"):
        checkpoint.restore(tmp_path / "nowhere", {"w": jnp.zeros(2)})
