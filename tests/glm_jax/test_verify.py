"""Every generation against the numbers of its original code, on one device and split over eight."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from glm_jax.checkpoint import open_source
from glm_jax.config import GLMConfig
from glm_jax.verify import Check, fitting, verify
from sharding.errors import UserError
from sharding.layout import Layout, get_layout

LOGITS = {"logits", "token log-probabilities", "loss"}
GRADIENTS = LOGITS | {"gradient norms"}
TOKENS = {"tokens that differ", "step log-probabilities"}
COMMON = {
    "native": {"logits"},
    "full": GRADIENTS,
    "left": GRADIENTS,
    "gen": TOKENS,
    "gen_single": TOKENS,
    "gen_eos": TOKENS,
}
V1 = COMMON | {
    "mask_token": LOGITS,
    "right": GRADIENTS,
    "long": {"logits", "native logits"},
}
REMOTE = COMMON | {"left_nopos": LOGITS, "right_nomask": GRADIENTS, "right_mask": LOGITS}
TRANSFORMERS = COMMON | {"left_nopos": LOGITS, "right_mask": GRADIENTS}
CLASSIFIER = {"seqcls": {"classifier logits"}}

# folder -> case -> what of it is compared; nothing may silently be left out
EXPECTED: Mapping[str, Mapping[str, set[str]]] = {
    "chatglm-6b": V1,
    "chatglm-6b-3l": V1 | {"full": GRADIENTS | {"gradients"}},
    "chatglm2-6b": REMOTE | {"full": GRADIENTS | {"gradients"}},
    "chatglm3-6b": REMOTE | CLASSIFIER | {"full": GRADIENTS | {"gradients"}},
    "chatglm3-6b-32k": REMOTE,
    "glm-4-9b-chat": REMOTE | CLASSIFIER | {"full": GRADIENTS | {"gradients"}},
    "glm-4-9b-chat-hf": TRANSFORMERS,
    "GLM-4-9B-0414": TRANSFORMERS | {"full": GRADIENTS | {"gradients"}},
}


def _run(directory: Path, layout: Layout) -> list[Check]:
    with jax.set_mesh(layout.mesh()):
        return list(verify(directory, layout))


def _assert_all_pass(directory: Path, layout: Layout) -> None:
    checks = _run(directory, layout)
    assert [check for check in checks if not check.passed] == []
    seen: dict[str, set[str]] = {}
    for check in checks:
        seen.setdefault(check.case, set()).add(check.quantity.partition(" (")[0])
    assert seen == EXPECTED[directory.name]


@pytest.mark.parametrize("folder", EXPECTED)
def test_the_numbers_of_the_original(shared: Path, folder: str) -> None:
    _assert_all_pass(shared / "golden" / folder, Layout())


def _split(folder: Path, name: str) -> Layout:
    return fitting(open_source(folder).config, get_layout(name, 8))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        pytest.param(
            folder,
            name,
            marks=()
            if (folder, name) in {("chatglm-6b-3l", "fsdp_tp"), ("GLM-4-9B-0414", "tp")}
            else pytest.mark.slow,
        )
        for folder in EXPECTED
        for name in ("tp", "fsdp_tp")
    ],
)
def test_the_same_numbers_on_eight_devices(shared: Path, folder: str, name: str) -> None:
    directory = shared / "golden" / folder
    layout = _split(directory, name)
    assert layout.num_devices == 8 and layout.tensor > 1
    _assert_all_pass(directory, layout)


def test_tensor_shards_that_do_not_divide_the_heads_become_replicas(small: GLMConfig) -> None:
    assert fitting(small, Layout(tensor=8)) == Layout(tensor=8)
    four = dataclasses.replace(small, num_heads=4)
    assert fitting(four, Layout(tensor=8)) == Layout(tensor=4, data=2)


@pytest.fixture
def copied(shared: Path, tmp_path: Path) -> Path:
    """A writable copy of the smallest folder."""
    for path in (shared / "golden" / "chatglm3-6b").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def _keep(directory: Path, *cases: str) -> dict[str, np.ndarray]:
    with np.load(directory / "golden.npz") as file:
        return {key: file[key] for key in file.files if key.partition("/")[0] in cases}


def test_a_wrong_number_is_seen(copied: Path) -> None:
    golden = _keep(copied, "full", "gen_eos")
    golden["full/logits"][0, 3, 5] += 1e-3 * np.abs(golden["full/logits"]).max()
    golden["full/grad_norm"][4] *= 1.001
    golden["gen_eos/new_tokens"][1, 2] += 1
    np.savez(copied / "golden.npz", **golden)  # type: ignore[arg-type]
    failed = {
        (c.case, c.quantity.partition(" (")[0]) for c in _run(copied, Layout()) if not c.passed
    }
    assert failed == {
        ("full", "logits"),
        ("full", "gradient norms"),
        ("gen_eos", "tokens that differ"),
    }


def test_a_wrong_rotary_base_is_seen(copied: Path) -> None:
    np.savez(copied / "golden.npz", **_keep(copied, "left"))  # type: ignore[arg-type]
    fields = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(fields | {"rope_ratio": 2}))
    assert not any(check.passed for check in _run(copied, Layout()))


def test_nan_is_no_agreement() -> None:
    assert not Check("full", "logits", float("nan"), 1e-5).passed


def test_missing_numbers_are_named(copied: Path) -> None:
    (copied / "golden.npz").unlink()
    with pytest.raises(UserError, match=r"cannot read .*golden\.npz.*needs the original code's"):
        _run(copied, Layout())
