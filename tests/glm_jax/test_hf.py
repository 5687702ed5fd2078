"""What is exported comes back bit for bit, on any layout, and a broken folder is named."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from glm_jax import hf
from glm_jax.config import GLMConfig
from glm_jax.model import init_model
from sharding.errors import UserError
from sharding.layout import Layout, get_layout


@pytest.fixture(scope="module")
def exported(small: GLMConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "hf"
    layout = Layout()
    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(init_model, small, layout))(jax.random.key(0))
        hf.save_model(model, directory, lambda folder: (folder / "tokenizer.model").touch())
    return directory


@pytest.mark.parametrize("name", ["single", "fsdp_tp", "pp_dp_tp"])
def test_an_export_loads_back_bit_for_bit(exported: Path, name: str, tmp_path: Path) -> None:
    layout = get_layout(name, 1 if name == "single" else 8)
    with jax.set_mesh(layout.mesh()):
        model = hf.load_model(exported, layout)
        hf.save_model(model, tmp_path / "again", lambda folder: None)
    ours, theirs = hf.read_tensors(tmp_path / "again"), hf.read_tensors(exported)
    assert set(ours) == set(theirs)
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)
    assert (tmp_path / "again" / "config.json").read_bytes() == (
        exported / "config.json"
    ).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again"]  # nothing half-written is left


def test_a_folder_that_is_no_checkpoint_is_named(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*config.json"):
        hf.load_model(tmp_path, Layout())
    fields = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type = 'llama'"):
        hf.load_model(tmp_path, Layout())
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"no \*.safetensors file"):
        hf.load_model(tmp_path, Layout())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read"):
        hf.load_model(tmp_path, Layout())
