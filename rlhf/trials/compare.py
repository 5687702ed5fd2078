"""Two runs of a job compared part by part, in the order in which one part leads to the next."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from glm_jax.generate import Generation
from glm_jax.weights import WEIGHT_AXES
from rlhf.trials.adamw import AdamW
from rlhf.trials.recording import Arrays, Role, Seen

Part = Literal["data", "answers", "figures", "loss", "gradient", "optimizer", "weights"]
PARTS: tuple[Part, ...] = (
    "data",
    "answers",
    "figures",
    "loss",
    "gradient",
    "optimizer",
    "weights",
)
Measure = Callable[[np.ndarray, np.ndarray, float], float]


class Errors(NamedTuple):
    """Errors of one part of an update or of an iteration's answers, by name."""

    where: str
    part: Part
    by_name: Mapping[str, float]


def largest(ours: np.ndarray, reference: np.ndarray, least: float = 0.0) -> float:
    """Largest difference, relative to the reference's largest entry (or to `least`, where that is larger)."""
    scale = max(float(np.abs(reference).max(initial=0.0)), least, 1e-30)
    return float(np.abs(ours - reference).max(initial=0.0)) / scale


def typical(ours: np.ndarray, reference: np.ndarray, least: float = 0.0) -> float:
    """Root of the mean squared difference, relative to that of the reference (or to `least`)."""
    scale = max(_root_mean_square(reference), least, 1e-30)
    return _root_mean_square(ours - reference) / scale


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


def errors_of(
    ours: Sequence[Seen], reference: Sequence[Seen], roles: Mapping[str, Role], measure: Measure
) -> Iterator[Errors]:
    """Errors of all parts in their order; `roles` are those of `ours`."""
    optimizers = {name: AdamW(role.optim, role.num_updates) for name, role in roles.items()}
    weights = {name: role.start for name, role in roles.items()}
    scales = {
        role: max(abs(x) for b in reference if b.role == role for x in b.losses.values())
        for role in roles
    }
    for a, b in zip(ours, reference, strict=True):
        yield Errors(
            a.where, "data", {name: _unequal(a.data[name], x) for name, x in b.data.items()}
        )
        if a.answers is not None and b.answers is not None:
            yield Errors(a.where, "answers", _of_answers(a.answers, b.answers, measure))
            yield Errors(a.where, "figures", _of_arrays(a.figures, b.figures, measure))
            continue
        # of all losses of the role: a later one may be small by chance
        error = max(abs(a.losses[name] - x) for name, x in b.losses.items()) / scales[a.role]
        yield Errors(a.where, "loss", {a.role or "loss": error})
        yield Errors(a.where, "gradient", _of_arrays(a.gradients, b.gradients, measure))
        expected = optimizers[a.role].update(weights[a.role], a.gradients)
        by_name = {name: largest(a.weights[name], x) for name, x in expected.items()}
        yield Errors(a.where, "optimizer", by_name)
        yield Errors(a.where, "weights", _of_arrays(a.weights, b.weights, measure))
        weights[a.role] = a.weights


def _unequal(ours: np.ndarray, reference: np.ndarray) -> float:
    """Share of rows that differ at all."""
    if ours.shape != reference.shape:
        return 1.0
    rows = (ours != reference).reshape(len(reference), -1).any(axis=1)
    return float(rows.mean())


def _of_answers(ours: Generation, reference: Generation, measure: Measure) -> dict[str, float]:
    """Share of answers that differ, and the error of the log-probabilities of all others."""
    pairs = [
        *zip(ours.sequences, reference.sequences, strict=True),
        (ours.ended[:, None], reference.ended[:, None]),
    ]
    if ours.logp.shape != reference.logp.shape:
        return {"answers": 1.0}
    same = ~np.any([np.any(a != b, axis=1) for a, b in pairs], axis=0)
    error = measure(ours.logp[same], reference.logp[same], 0.0)
    return {"answers": 1.0 - float(same.mean()), "logp": error}


def _of_arrays(ours: Arrays, reference: Arrays, measure: Measure) -> dict[str, float]:
    """Errors by name; entries below a millionth of the largest of all are rounding."""
    least = 1e-6 * max(float(np.abs(x).max(initial=0.0)) for x in reference.values())
    return {name: measure(ours[name], x, least) for name, x in reference.items()}


def deepest(names: Sequence[str], ours: Arrays, reference: Arrays) -> str:
    """The last of some parameters on the way forward whose gradient differs, hence the first on the way back.

    What is wrong there makes the gradients before it wrong as well. Of parameters that all layers have the last layer
    counts in which the error is at least a tenth of its largest.
    """
    order = list(WEIGHT_AXES)

    def depth(name: str) -> tuple[float, int]:
        last = name.rsplit(".", 1)[-1]
        if last == "embedding":
            return -1.0, 0
        if ".blocks." not in name:
            return float("inf"), order.index(last) + len(order) * (last in ("w_head", "w_scalar"))
        wrong = np.abs(ours[name] - reference[name]).reshape(len(reference[name]), -1).max(axis=1)
        found = np.flatnonzero(~(wrong < 0.1 * np.nanmax(wrong)))
        return float(found[-1]), order.index(last)

    return max(names, key=depth)
