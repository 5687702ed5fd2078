"""`glm-jax checkpoint`: what a run has saved, told, checked, pruned and cut anew."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.checkpoint import Card, load_model, load_scalar, save_model
from glm_jax.config import GLMConfig
from glm_jax.hf.config import Tokens, default_form
from glm_jax.model import CausalLM, init_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.scalar import init_scalar
from glm_jax.train import init_state
from glm_jax.weights import to_kept
from rlhf.cli import main
from sharding.disk.lock import locked
from sharding.layout import Layout
from sharding.retention import Retention
from sharding.snapshots import Snapshots


@pytest.fixture(scope="module")
def model(small: GLMConfig) -> CausalLM:
    with jax.set_mesh(Layout().mesh()):
        return jax.jit(partial(init_model, small, Layout()))(jax.random.key(0))


@pytest.fixture
def run(model: CausalLM, small: GLMConfig, tmp_path: Path) -> Path:
    card = Card(small, default_form(small), Tokens(1, 0))
    with jax.set_mesh(Layout().mesh()):
        save_model(model, Layout(), card, tmp_path / "checkpoints" / "sft", lambda _: None)
        with Snapshots(tmp_path / "state" / "ppo", Retention(3)) as snapshots:
            for step in (5, 10, 15):
                snapshots.save(step, {"actor": jnp.arange(4.0)}, {})
    return tmp_path


def test_ls_names_all_in_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(run)]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [x for x in lines if x][1:5] == [
        ["sft", "done"],
        ["ppo", "5"],
        ["ppo", "10"],
        ["ppo", "15"],
    ]


@pytest.mark.parametrize(
    ("save", "array", "shape"),
    [("checkpoints/sft", "trunk.embedding", "64 x 32"), ("state/ppo/10", "actor", "4")],
)
def test_show_tells_the_arrays(
    run: Path, save: str, array: str, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "show", str(run / save)]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.strip().startswith(array))
    assert f" {shape} " in line
    assert " float32 " in line


def test_verify_finds_a_flipped_bit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "sft: whole",
        "ppo 5: whole",
        "ppo 10: whole",
        "ppo 15: whole",
    ]
    file = run / "checkpoints" / "sft" / "weights" / "trunk.embedding" / "0.0"
    content = bytearray(file.read_bytes())
    content[100] ^= 64
    file.write_bytes(content)
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"sft: {file} has changed"


def test_prune_leaves_the_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(run, ""):
        assert main(["checkpoint", "prune", str(run)]) == 1
    assert "is in use by process" in capsys.readouterr().err
    kept = {"ppo": {"last": 0, "every": 5, "best": 0}}
    (run / "state" / "journal.json").write_text(json.dumps({"kept": kept}))
    assert main(["checkpoint", "prune", str(run)]) == 0
    assert capsys.readouterr().out == ""  # all are kept for good
    (run / "state" / "journal.json").unlink()
    assert main(["checkpoint", "prune", str(run), "--keep-last", "2"]) == 0
    assert [x.name for x in sorted((run / "state" / "ppo").iterdir())] == ["10", "15"]
    assert capsys.readouterr().out == f"deleted ppo 5: {run / 'state' / 'ppo' / '5'}\n"
    assert (run / "checkpoints" / "sft").exists()
    assert main(["checkpoint", "prune", str(run), "--keep-last", "0"]) == 1


def test_reshard_cuts_files_anew_and_changes_no_bit(
    run: Path, model: CausalLM, tmp_path: Path
) -> None:
    source, out = run / "checkpoints" / "sft", tmp_path / "out"
    options = ["--layout", "fsdp", "--devices", "8"]
    assert main(["checkpoint", "reshard", str(source), str(out), *options]) == 0
    files = [x.name for x in (out / "weights" / "trunk.embedding").iterdir() if x.name[0] != "."]
    assert len(files) == 8
    with jax.set_mesh(Layout().mesh()):
        jax.tree.map(np.testing.assert_array_equal, load_model(out, Layout(), "float32"), model)
    assert main(["checkpoint", "reshard", str(source), str(out), *options]) == 1


def test_the_model_of_a_snapshot_becomes_a_checkpoint(
    run: Path,
    model: CausalLM,
    small: GLMConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = Layout()
    optimizer = make_optimizer(OptimConfig(), 1)
    with jax.set_mesh(layout.mesh()):
        critic = jax.jit(partial(init_scalar, small, layout))(jax.random.key(1))
        learners = {"actor": init_state(model, optimizer), "critic": init_state(critic, optimizer)}
        with Snapshots(run / "state" / "ppo") as snapshots:
            snapshots.save(20, to_kept(learners, layout), {})
        snapshot = run / "state" / "ppo" / "20"
        command = ["checkpoint", "extract", str(snapshot)]
        assert main([*command, str(tmp_path / "actor")]) == 0
        assert main([*command, str(tmp_path / "critic"), "--role", "critic"]) == 0
        found = (
            load_model(tmp_path / "actor", layout, "float32"),
            load_scalar(tmp_path / "critic", layout, "float32"),
        )
        jax.tree.map(np.testing.assert_array_equal, found, (model, critic))
    assert main([*command, str(tmp_path / "actor")]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["checkpoint", "extract", str(run / "state/ppo/15"), str(tmp_path / "none")]) == 1
    assert "holds no actor.model" in capsys.readouterr().err
    for save, told in (
        ("state/sft/4", "holds no critic: leave --role out"),
        ("checkpoints/sft", "is no snapshot: give a folder that `ls` lists with a step"),
    ):
        command = [
            "checkpoint",
            "extract",
            str(run / save),
            str(tmp_path / "x"),
            "--role",
            "critic",
        ]
        assert main(command) == 1
        assert told in capsys.readouterr().err
    command = ["checkpoint", "extract", str(snapshot)]
    (file,) = (snapshot / "state" / "actor.model.trunk.final_norm").glob("[0-9]*")
    file.write_bytes(bytes(file.stat().st_size))
    assert main([*command, str(tmp_path / "again")]) == 1
    assert f"{file} has changed" in capsys.readouterr().err


def test_a_folder_without_saves_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("ls", "verify", "prune"):
        assert main(["checkpoint", command, str(tmp_path)]) == 1
        assert "give the folder of a run" in capsys.readouterr().err
    assert main(["checkpoint", "extract", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "is no snapshot" in capsys.readouterr().err
