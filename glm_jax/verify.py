"""A checkpoint against the numbers of the original code.

`golden.npz` beside the checkpoint holds, under keys `case/field`, inputs and what the original computed of them in
float32; `grads_full.npz` the gradients of case `full`. Every case present is run. Errors are relative: to the largest
reference value of the array, for losses and norms to the value itself, for the log-probabilities of greedy steps to
the largest logit of the steps (a confident model's are close to 0, their rounding is that of the logits).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from glm_jax.batch import Prompts, Sequences
from glm_jax.checkpoint import load_model, open_source
from glm_jax.config import Config
from glm_jax.generate import SamplingConfig
from glm_jax.hf.tables import tensor_names
from glm_jax.hf.tensors import Source, to_tensors
from glm_jax.loss import cross_entropy, token_logprobs
from glm_jax.model import CausalLM, apply_model, init_model
from glm_jax.sampler import Sampler
from glm_jax.weights import host_weights
from sharding.errors import UserError
from sharding.layout import Layout

Golden = Mapping[str, np.ndarray]  # the fields of one case

EXACT = 1e-5  # float32: logits, log-probabilities, loss, gradients
NORMS = 1e-4  # gradient norms
# Arithmetic in the stored dtype: how much farther than the original's it may lie from float32, root mean square. Logit
# by logit they differ at random, by kernel and by layout.
COARSER = 1.5


@dataclasses.dataclass(frozen=True)
class Check:
    """One quantity of one case."""

    case: str
    quantity: str
    max_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.max_error <= self.tolerance


def fitting(config: Config, layout: Layout) -> Layout:
    """`layout`, with tensor shards that the model's heads do not divide into turned into replicas."""
    shards = max(
        n
        for n in range(1, layout.tensor + 1)
        if layout.tensor % n == 0 and config.num_heads % n == 0
    )
    return dataclasses.replace(layout, tensor=shards, data=layout.data * (layout.tensor // shards))


def read_golden(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    """case -> field -> array. Raises UserError where there is no readable golden.npz."""
    path = directory / "golden.npz"
    cases: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path) as file:
            for key in file.files:
                case, _, field = key.partition("/")
                cases.setdefault(case, {})[field] = file[key]
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}; verify needs the original code's numbers beside the checkpoint"
        ) from None
    return cases


def verify(directory: Path, layout: Layout) -> Iterator[Check]:
    """Run every case of `directory`/golden.npz under `layout`, on the mesh that is set."""
    golden, source = read_golden(directory), open_source(directory)
    model = load_model(directory, layout, "float32")
    if "native" in golden:  # the same forward pass as `full`
        golden["native"]["exact"] = golden["full"]["logits"]
    for case, fields in golden.items():
        for check in _verify_case(directory, source, model, case, fields, layout):
            yield dataclasses.replace(check, case=case)


def _verify_case(
    directory: Path, source: Source, model: CausalLM, case: str, golden: Golden, layout: Layout
) -> Iterator[Check]:
    native = _in_dtype(model, _stored_dtype(source), layout)
    if "new_tokens" in golden:
        yield from _generation(model, golden, layout)
    elif "classifier_weight" in golden:
        yield from _classification(model, golden, layout)
    elif "logits_tail" in golden:
        ids, exact = golden["input_ids"], golden["logits_tail"]
        yield _check("logits", _tail(model, ids, exact, layout), exact, EXACT)
        if "native_logits_tail" in golden:
            tail = golden["native_logits_tail"]
            yield _rounding("native logits", _tail(native, ids, tail, layout), tail, exact)
    elif case == "native":
        real, logits = _real(golden), _logits(native, golden, layout)
        yield _rounding("logits", logits[real], golden["logits"][real], golden["exact"][real])
    else:
        yield from _sequences(directory, source, model, case, golden, layout)


def _check(quantity: str, ours: np.ndarray, reference: np.ndarray, tolerance: float) -> Check:
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    return Check("", quantity, float(error), tolerance)


def _rounding(quantity: str, ours: np.ndarray, original: np.ndarray, exact: np.ndarray) -> Check:
    """Our distance from `exact`, which may be `COARSER` times the original's."""

    def distance(values: np.ndarray) -> float:
        return float(np.sqrt(np.mean((values - exact) ** 2) / np.mean(exact**2)))

    return Check("", quantity, distance(ours), max(EXACT, COARSER * distance(original)))


def _stored_dtype(source: Source) -> str:
    name, _, _ = next(tensor_names(source.config, source.form, source.head))
    return source.tensors[name].dtype.name


def _in_dtype(model: CausalLM, dtype: str, layout: Layout) -> CausalLM:
    """The same arrays, computed with in `dtype`."""
    config = dataclasses.replace(model.trunk.config, compute_dtype=dtype)
    shapes = jax.eval_shape(partial(init_model, config, layout), jax.random.key(0))
    other: CausalLM = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(model))
    return other


def _real(golden: Golden) -> np.ndarray:
    """bool [B, T]: real tokens."""
    if "valid" in golden:
        return golden["valid"].astype(bool)
    mask = golden.get("attention_mask")
    if mask is None:
        return np.ones(golden["input_ids"].shape, bool)
    if mask.ndim == 4:  # ChatGLM-6B: True is masked; the last query sees all that is real
        return ~mask[:, 0, -1]
    return mask.astype(bool)


def _put(layout: Layout, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
    """On the mesh, filled up with copies of row 0 to a number of rows that divides."""
    pieces = math.lcm(
        layout.ways("batch") * layout.microbatches, layout.for_generation().ways("batch")
    )
    fill = -len(arrays[0]) % pieces
    rows = np.concatenate([np.arange(len(arrays[0])), np.zeros(fill, int)])
    put: tuple[jax.Array, ...] = layout.put(tuple(x[rows] for x in arrays))
    return put


class _Outputs(NamedTuple):
    """Of all rows that were put on the mesh."""

    logits: Float[Array, "B T V"]
    logp: Float[Array, "B T"]  # of the tokens
    loss: Float[Array, ""]  # mean cross entropy


# Cases of one shape share a program, one with gradients and one without: arrays are arguments, not closed over.
@partial(jax.jit, static_argnames="layout")
def _outputs(model: CausalLM, batch: Sequences, layout: Layout) -> _Outputs:
    logits = apply_model(model, batch.ids, batch.valid, layout)
    logp = token_logprobs(logits, batch.ids)
    return _Outputs(logits, logp, cross_entropy(logp, batch.target))


@partial(jax.jit, static_argnames="layout")
def _gradients(model: CausalLM, batch: Sequences, layout: Layout) -> tuple[CausalLM, _Outputs]:
    def loss(model: CausalLM) -> tuple[jax.Array, _Outputs]:
        outputs = _outputs(model, batch, layout)
        return outputs.loss, outputs

    found: tuple[CausalLM, _Outputs] = jax.grad(loss, has_aux=True)(model)
    return found


def _batch(golden: Golden, layout: Layout) -> Sequences:
    """Its rows on the mesh; of those that fill it up no token counts."""
    real = _real(golden)
    target = golden["labels"] != -100 if "labels" in golden else real.copy()
    target[:, 0] = False
    ids, valid, counted = _put(layout, golden["input_ids"].astype(np.int32), real, target)
    return Sequences(ids, valid, counted & (jnp.arange(len(ids)) < len(real))[:, None])


def _logits(model: CausalLM, golden: Golden, layout: Layout) -> np.ndarray:
    """[B, T, V]."""
    outputs = _outputs(model, _batch(golden, layout), layout)
    return np.asarray(outputs.logits)[: len(golden["input_ids"])]


def _sequences(
    directory: Path, source: Source, model: CausalLM, case: str, golden: Golden, layout: Layout
) -> Iterator[Check]:
    """Whole sequences: logits, log-probabilities, loss, and its gradients where the case has them."""
    batch, gradients = _batch(golden, layout), None
    if "grad_norm" in golden:
        gradients, outputs = _gradients(model, batch, layout)
    else:
        outputs = _outputs(model, batch, layout)
    real = _real(golden)
    logits, logp = (np.asarray(x)[: len(real)] for x in (outputs.logits, outputs.logp))
    yield _check("logits", logits[real], golden["logits"][real], EXACT)
    if "token_logprobs" in golden:
        both = real[:, 1:] & real[:, :-1]
        reference = golden["token_logprobs"][both]
        yield _check("token log-probabilities", logp[:, 1:][both], reference, EXACT)
    if "loss" in golden:
        yield _check("loss", np.asarray(outputs.loss), golden["loss"], EXACT)
    if gradients is not None:
        ours = to_tensors(source, host_weights(gradients, layout))
        yield from _norms(directory, ours, case, golden)


def _tail(model: CausalLM, ids: np.ndarray, like: np.ndarray, layout: Layout) -> np.ndarray:
    """Logits of the last positions, as many as `like` has."""
    (on_mesh,) = _put(layout, ids.astype(np.int32))
    valid = jnp.ones_like(on_mesh, bool)
    logits = np.asarray(jax.jit(apply_model, static_argnums=3)(model, on_mesh, valid, layout))
    return logits[: len(ids), -like.shape[1] :]


def _norms(
    directory: Path, ours: Mapping[str, np.ndarray], case: str, golden: Golden
) -> Iterator[Check]:
    """Gradients by the names of the original's tensors: the norms, and of case `full` every entry."""
    names = [str(name) for name in golden["grad_names"]]
    norms = {
        name: abs(float(np.linalg.norm(ours[name].astype(np.float64)) / norm) - 1)
        for name, norm in zip(names, golden["grad_norm"], strict=True)
    }
    worst = max(norms, key=norms.__getitem__)
    yield Check("", f"gradient norms ({worst})", norms[worst], NORMS)
    full = directory / "grads_full.npz"
    if case == "full" and full.exists():
        with np.load(full) as file:
            errors = {
                name: float(np.abs(ours[name] - file[name]).max() / np.abs(file[name]).max())
                for name in file.files
            }
        worst = max(errors, key=errors.__getitem__)
        yield Check("", f"gradients ({worst})", errors[worst], EXACT)


def _generation(model: CausalLM, golden: Golden, layout: Layout) -> Iterator[Check]:
    """Greedy decoding with a cache: tokens (the number that differ) and their log-probabilities."""
    new, stop = golden["new_tokens"], int(golden["eos_token_id"])
    prompts = golden["input_ids"].astype(np.int32)
    number = np.arange(len(prompts), dtype=np.int32)
    ids, real, row = _put(layout, prompts, _real(golden), number)
    greedy = SamplingConfig(max_new_tokens=new.shape[1], temperature=0.0)
    sample = Sampler(model.trunk.config, greedy, (stop,), layout)
    answers = sample(model, Prompts(ids, real, row), jax.random.key(0))
    tail = (slice(len(prompts)), slice(prompts.shape[1], None))
    counted = np.asarray(answers.sequences.target)[tail]
    ours = np.where(counted, np.asarray(answers.sequences.ids)[tail], golden["pad_token_id"])
    yield Check("", "tokens that differ", float((ours != new).sum()), 0.0)
    error = np.abs(np.asarray(answers.logp)[tail] - golden["step_logprobs"])[counted].max()
    scale = np.abs(golden.get("step_logits", golden["step_logprobs"])[counted]).max()
    yield Check("", "step log-probabilities", float(error / scale), EXACT)


def _classification(model: CausalLM, golden: Golden, layout: Layout) -> Iterator[Check]:
    """The sequence classifier: a linear head on the last column of left-padded input."""
    real = _real(golden)
    ids, valid = _put(layout, golden["input_ids"].astype(np.int32), real)
    hidden = jax.jit(lambda model: model.trunk(ids, valid, layout))(model)
    last = np.asarray(hidden)[: len(real), -1]
    logits = last @ golden["classifier_weight"].T + golden["classifier_bias"]
    yield _check("classifier logits", logits, golden["logits"], EXACT)
