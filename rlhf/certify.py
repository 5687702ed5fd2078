"""Any layout gives the same training: every job under a layout against the same job on one device.

In float32, from the same weights and data. What differs is the order of sums, hence rounding; a wrong sharding, a
dropped microbatch or a loss weighted per shard differs by far more, and the parameter it differs in most is named.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from glm_jax.config import Config
from glm_jax.weights import host_weights
from rlhf.trials.jobs import JOBS
from sharding.collectives import count_collectives
from sharding.compile import compiled_programs
from sharding.errors import UserError
from sharding.hlo import read
from sharding.layout import Layout, spell_layout
from sharding.pipeline import bubble_fraction

STEPS = 3
ROWS = 16  # of a batch, or the next number that divides
# Largest relative errors that pass. A gradient is a sum that cancels: in single entries its rounding is ten times that
# of a loss or a weight.
LOSS, GRADIENT, WEIGHT = 1e-6, 5e-5, 1e-5

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a job did on one layout."""

    losses: list[Mapping[str, float]]  # of every step
    gradients: list[Arrays]  # of every step, by parameter
    weights: Arrays  # after the last step
    recompiles: int  # programs compiled after the first step
    collectives: Counter[str]  # instructions in the programs of an update
    temp_bytes: (
        int  # of the largest of them, on a device: activations and what else is not an argument
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A job under a layout against one device; errors are relative to the largest entry, of losses to the loss."""

    layout: str
    job: str
    loss_error: float
    grad_error: float
    grad_worst: str  # the parameter that `grad_error` is seen in
    weight_error: float
    recompiles: int
    collectives: Mapping[str, int]
    temp_bytes: int
    bubble: float
    failure: str = ""  # why it did not run

    @property
    def passed(self) -> bool:
        """Whether all errors are within the tolerances and nothing compiled twice; NaN is not."""
        return (
            not self.failure
            and self.loss_error <= LOSS
            and self.grad_error <= GRADIENT
            and self.weight_error <= WEIGHT
            and not self.recompiles
        )


def rows_for(layout: Layout) -> int:
    """Rows of a batch that divides over `layout`."""
    pieces = layout.ways("batch") * layout.microbatches * layout.accumulate
    return math.lcm(pieces, layout.for_generation().ways("batch"), ROWS)


def train(job: str, config: Config, rows: int, layout: Layout) -> Trained:
    """Three steps of a job on the layout's own mesh."""
    with jax.set_mesh(layout.mesh()):
        setup = JOBS[job](config, rows, STEPS, layout)
        losses: list[Mapping[str, float]] = []
        gradients: list[Arrays] = []
        weights: dict[str, np.ndarray] = {}
        compiled = 0
        for step, seen in enumerate(setup.updates):
            losses.append(seen.losses)
            host: dict[str, dict[str, np.ndarray]] = {}
            for name, (model, gradient) in seen.models.items():
                host[name] = host_weights(gradient, layout)
                weights |= {name + path: w for path, w in host_weights(model, layout).items()}
            gradients.append({name + path: g for name, w in host.items() for path, g in w.items()})
            if step == 0:
                compiled = len(compiled_programs())
        recompiles = len(compiled_programs()) - compiled
        programs = [p for watched in setup.programs.values() for p in watched.compiled.values()]
    return Trained(
        losses,
        gradients,
        weights,
        recompiles,
        sum((count_collectives(read(program)) for program in programs), Counter()),
        max(program.memory_analysis().temp_size_in_bytes for program in programs),
    )


def error_of(ours: np.ndarray, reference: np.ndarray, least: float = 0.0) -> float:
    """Largest difference, relative to the reference's largest entry (or to `least`, where that is larger)."""
    scale = max(float(np.abs(reference).max()), least, 1e-30)
    return float(np.abs(ours - reference).max()) / scale


def _worst(ours: Arrays, reference: Arrays) -> tuple[float, str]:
    """The largest error and where it is; entries below a millionth of the largest of all are rounding."""
    least = 1e-6 * max(float(np.abs(x).max()) for x in reference.values())
    errors = {name: error_of(ours[name], x, least) for name, x in reference.items()}
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return errors[worst], worst


def compare(job: str, layout: Layout, ours: Trained, reference: Trained) -> Row:
    """The row of `ours` against the same job on one device."""
    losses = []
    for name in reference.losses[0]:
        a, b = (np.array([step[name] for step in run.losses]) for run in (ours, reference))
        losses.append(error_of(a, b))
    gradients = [_worst(a, b) for a, b in zip(ours.gradients, reference.gradients, strict=True)]
    grad_error, grad_worst = max(gradients, key=lambda found: (math.isnan(found[0]), found[0]))
    return Row(
        layout=spell_layout(layout),
        job=job,
        loss_error=max(losses, key=lambda error: (math.isnan(error), error)),
        grad_error=grad_error,
        grad_worst=grad_worst,
        weight_error=_worst(ours.weights, reference.weights)[0],
        recompiles=ours.recompiles,
        collectives=dict(ours.collectives),  # asdict would make a Counter count pairs
        temp_bytes=ours.temp_bytes,
        bubble=bubble_fraction(layout),
    )


def certify(config: Config, layouts: Mapping[str, Layout], jobs: list[str]) -> Iterator[Row]:
    """A row for every job under every layout, as they are done. Raises UserError on what does not fit the model."""
    for name, layout in layouts.items():
        try:
            config.check(layout)
        except UserError as error:
            raise UserError(f"layout {name}: {error}") from None
    references: dict[tuple[str, int], Trained] = {}
    for name, layout in layouts.items():
        for job in jobs:
            rows = rows_for(layout)
            if (job, rows) not in references:
                references[job, rows] = train(job, config, rows, Layout())
            try:
                row = compare(job, layout, train(job, config, rows, layout), references[job, rows])
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                row = _failed(job, layout, reason)
            yield dataclasses.replace(row, layout=name)


def _failed(job: str, layout: Layout, reason: str) -> Row:
    nan = math.nan
    return Row(
        spell_layout(layout), job, nan, nan, "", nan, 0, {}, 0, bubble_fraction(layout), reason
    )
