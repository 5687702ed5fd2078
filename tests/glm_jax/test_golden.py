"""ChatGLM3 against the numbers of the original code."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import hf
from glm_jax.batch import Prompts, Sequences
from glm_jax.config import from_hf, to_hf
from glm_jax.generate import SamplingConfig, generate
from glm_jax.loss import cross_entropy, token_logprobs
from glm_jax.model import CausalLM, apply_model
from sharding.errors import UserError
from sharding.layout import Layout

LAYOUT = Layout()
CASES = ("full", "left", "left_nopos", "right_nomask", "right_mask")
Golden = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "golden" / "chatglm3-6b"


@pytest.fixture(scope="module")
def golden(folder: Path) -> Golden:
    with np.load(folder / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[CausalLM]:
    with jax.set_mesh(LAYOUT.mesh()):
        yield hf.load_model(folder, LAYOUT)


def _inputs(golden: Golden, case: str) -> tuple[np.ndarray, np.ndarray]:
    ids = golden[f"{case}/input_ids"]
    return ids, golden.get(f"{case}/valid", np.ones_like(ids)).astype(bool)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_logprobs_within_1e_5_of_the_largest(
    model: CausalLM, golden: Golden, case: str
) -> None:
    ids, valid = _inputs(golden, case)
    logits = np.asarray(jax.jit(apply_model, static_argnums=3)(model, ids, valid, LAYOUT))
    expected = golden[f"{case}/logits"]
    assert np.abs((logits - expected)[valid]).max() <= 1e-5 * np.abs(expected[valid]).max()

    both = valid[:, 1:] & valid[:, :-1]
    logp = np.asarray(token_logprobs(jnp.asarray(logits), jnp.asarray(ids)))[:, 1:][both]
    reference = golden[f"{case}/token_logprobs"][both]
    assert np.abs(logp - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("case", ["full", "left", "right_nomask"])
def test_loss_and_gradients(model: CausalLM, golden: Golden, folder: Path, case: str) -> None:
    ids, valid = _inputs(golden, case)
    target = golden[f"{case}/labels"] != -100
    target[:, 0] = False
    batch = LAYOUT.put(Sequences(ids, valid, target))

    def loss(model: CausalLM) -> jax.Array:
        logits = apply_model(model, batch.ids, batch.valid, LAYOUT)
        return cross_entropy(token_logprobs(logits, batch.ids), batch.target)

    value, grads = jax.jit(jax.value_and_grad(loss))(model)
    assert float(value) == pytest.approx(float(golden[f"{case}/loss"]), rel=1e-5)
    tensors = hf.to_tensors(model.trunk.config, hf.host_weights(grads))
    names = [str(name) for name in golden[f"{case}/grad_names"]]
    assert set(names) == set(tensors) - {hf.INV_FREQ}
    for name, norm in zip(names, golden[f"{case}/grad_norm"], strict=True):
        assert np.linalg.norm(tensors[name]) == pytest.approx(norm, rel=1e-4), name
    if case == "full":
        with np.load(folder / "grads_full.npz") as full:
            for name in names:
                error = np.abs(tensors[name] - full[name]).max()
                assert error <= 1e-5 * np.abs(full[name]).max(), name


@pytest.mark.parametrize("case", ["gen", "gen_single", "gen_eos"])
def test_greedy_generation_token_for_token(model: CausalLM, golden: Golden, case: str) -> None:
    ids = golden[f"{case}/input_ids"]
    valid = golden.get(f"{case}/attention_mask", np.ones_like(ids)).astype(bool)
    expected = golden[f"{case}/new_tokens"]
    stop = int(golden[f"{case}/eos_token_id"])
    prompts = Prompts(ids, valid, np.arange(len(ids), dtype=np.int32))
    greedy = SamplingConfig(max_new_tokens=expected.shape[1], temperature=0.0)
    run = jax.jit(lambda m, p: generate(m, p, jax.random.key(0), greedy, (stop,), LAYOUT))
    answers = run(model, prompts)

    new = slice(ids.shape[1], None)
    np.testing.assert_array_equal(np.asarray(answers.sequences.ids)[:, new], expected)
    counted = np.asarray(answers.sequences.target)[:, new]
    stopped = np.cumsum(expected == stop, axis=1) - (expected == stop) > 0
    np.testing.assert_array_equal(counted, ~stopped)
    error = np.abs(np.asarray(answers.logp)[:, new] - golden[f"{case}/step_logprobs"])[counted]
    assert error.max() <= 1e-5 * np.abs(golden[f"{case}/step_logprobs"][counted]).max()


def test_tensors_come_back_bit_for_bit(model: CausalLM, folder: Path) -> None:
    original = hf.read_tensors(folder)
    ours = hf.to_tensors(model.trunk.config, hf.host_weights(model))
    assert set(ours) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(ours[name].astype(tensor.dtype), tensor, err_msg=name)


def test_config_comes_back(folder: Path) -> None:
    original = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    original.pop("_name_or_path")
    ours = to_hf(from_hf(original, "config.json"), original["torch_dtype"])
    assert list(ours.items()) == list(original.items())


def test_a_file_that_does_not_fit_is_named(model: CausalLM, folder: Path) -> None:
    config, tensors = model.trunk.config, hf.read_tensors(folder)
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    lacking = {k: v for k, v in tensors.items() if k != name}
    with pytest.raises(UserError, match=f"x: tensor {name} is missing"):
        hf.from_tensors(config, lacking, "x")
    with pytest.raises(UserError, match=r"x: 1 unknown tensors, the first is lora\.a"):
        hf.from_tensors(config, {**tensors, "lora.a": np.zeros(1)}, "x")
    with pytest.raises(UserError, match=f"{name} has shape"):
        hf.from_tensors(config, {**tensors, name: tensors[name].T}, "x")
