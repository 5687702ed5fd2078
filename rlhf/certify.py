"""Any layout gives the same training: every job under a layout against the same job on one device.

From the same weights and data, in float32. What differs is the order of sums, hence rounding; a wrong sharding, a
dropped microbatch or a loss weighted per shard differs by far more. The first update that differs is named, and the
first thing there that does: what comes after it only suffers.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax

from glm_jax.config import Config
from glm_jax.generate import Generation
from rlhf.trials.compare import Errors, Part, deepest, errors_of, largest, typical
from rlhf.trials.jobs import JOBS, SAMPLING_JOBS, Iterations
from rlhf.trials.recording import Arrays, Role, Seen
from sharding.collectives import count_collectives
from sharding.compile import compiled_programs
from sharding.errors import UserError
from sharding.hlo import read
from sharding.layout import Layout, spell_layout
from sharding.pipeline import bubble_fraction

STEPS = 3
ROWS = 16  # of a batch, or the next number that divides
# Largest errors that pass in float32, relative to the largest entry: rounding of 2^-24 = 6e-8, times the root of the
# some thousand terms that are summed on the way through five layers. A gradient cancels and goes the way twice: in
# single entries its rounding is ten times that. The optimizer is held to float64 on the gradient that it was given.
# Each is four times what 450 layouts, jobs and models took, or more.
FLOAT32: Mapping[Part, float] = {
    "data": 0.0,
    "answers": 2e-6,  # of log-probabilities; no answer may differ
    "figures": 2e-5,
    "loss": 2e-6,
    "gradient": 7e-5,
    "optimizer": 5e-7,
    "weights": 2e-6,
}
# In bfloat16 what one device rounds is the measure: root mean square distance from float32, which is larger by far than
# any bug may be small. A layout rounds elsewhere, not more often.
BFLOAT16_HEADROOM = 4.0
BFLOAT16_LEAST = 2.0**-9  # relative rounding error of a number
FLIPPED = (0.25, 0.75)  # least and largest limit of the share of sampled answers that differ


@dataclasses.dataclass(frozen=True)
class Trained:
    """A record of a job on one layout."""

    seen: list[Seen]  # of every update and every iteration's answers, in order
    roles: Mapping[str, Role]
    answers: tuple[Generation, ...]  # of every iteration
    recompiles: int  # programs compiled after the first step
    collectives: Counter[str]  # instructions in the programs of an update
    temp_bytes: (
        int  # of the largest of them, on a device: activations and what else is not an argument
    )

    @property
    def weights(self) -> Arrays:
        """Weights after the last update, by role and path."""
        last = {seen.role: seen.weights for seen in self.seen if seen.weights}
        return {role + path: w for role, ws in last.items() for path, w in ws.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """A job under a layout against one device; errors are relative to the reference."""

    layout: str
    job: str
    loss_error: float
    grad_error: float  # largest of all parameters and updates
    weight_error: float
    adam_error: float  # of weights, from what NumPy's AdamW makes of the same gradients
    where: str  # first update or iteration that differs; "": none does
    part: str  # what differs there: data, answers, figures, loss, gradient, optimizer or weights
    names: tuple[
        str, ...
    ]  # parameters or figures that differ in that part; the likeliest origin comes first
    recompiles: int
    collectives: Mapping[str, int]
    temp_bytes: int
    bubble: float
    failure: str = ""  # why it did not run

    @property
    def passed(self) -> bool:
        """True where everything is within the limits and nothing compiled twice."""
        return not self.failure and not self.where and not self.recompiles

    @property
    def difference(self) -> str:
        """The first difference in words; "" where there is none."""
        if not self.where:
            return ""
        first, *others = (name.lstrip(".") for name in self.names)
        more = f" and {len(others)} more" if others else ""
        return f"{self.where}: {self.part}" + (f" of {first}{more}" if first != self.part else "")


class Case(NamedTuple):
    """A layout to train in, and one to sample in (None: the first one without its pipeline)."""

    layout: Layout
    generation: Layout | None = None


def rows_for(layout: Layout, generation: Layout | None = None) -> int:
    """Rows of a batch that divides over `layout`."""
    pieces = layout.ways("batch") * layout.microbatches * layout.accumulate
    return math.lcm(pieces, (generation or layout).for_generation().ways("batch"), ROWS)


def train(
    job: str,
    config: Config,
    rows: int,
    layout: Layout,
    how: Iterations = Iterations(),
) -> Trained:
    """Three steps of a job on the layout's own mesh; `how` is for jobs of iterations."""
    more = (how,) if job in SAMPLING_JOBS else ()
    with jax.set_mesh(layout.mesh()):
        setup = JOBS[job](config, rows, STEPS, layout, *more)
        seen: list[Seen] = []
        compiled = 0
        for step, found in enumerate(setup.updates):
            seen += found
            if step == 0:
                compiled = len(compiled_programs())
        recompiles = len(compiled_programs()) - compiled
        programs = [p for watched in setup.programs.values() for p in watched.compiled.values()]
    return Trained(
        seen,
        setup.roles,
        tuple(setup.answers),
        recompiles,
        sum((count_collectives(read(program)) for program in programs), Counter()),
        max(program.memory_analysis().temp_size_in_bytes for program in programs),
    )


Limits = Mapping[tuple[Part, str], float]


def _deviation(errors: list[float]) -> float:
    return math.sqrt(sum(x * x for x in errors) / len(errors))


def bfloat16_limits(one_device: Trained, reference: Trained) -> Limits:
    """Limits of a layout's distance from float32 in bfloat16: four times that of one device."""
    errors = list(errors_of(one_device.seen, reference.seen, one_device.roles, typical))
    limits: dict[tuple[Part, str], float] = {}
    for found in errors:
        for name, error in found.by_name.items():
            room = max(BFLOAT16_HEADROOM * error, BFLOAT16_LEAST)
            limits[found.part, name] = max(limits.get((found.part, name), 0.0), room)
    # a single number may agree by chance: the limit of each loss is four standard deviations of those of its role, or
    # of all, whatever is more
    of_losses = [found.by_name for found in errors if found.part == "loss"]
    by_role = {
        name: [by_name[name] for by_name in of_losses if name in by_name]
        for name in {name for by_name in of_losses for name in by_name}
    }
    everything = _deviation([x for losses in by_role.values() for x in losses])
    for name, losses in by_role.items():
        limits["loss", name] = BFLOAT16_HEADROOM * max(_deviation(losses), everything)
    if ("answers", "answers") in limits:  # one token that flips at a near tie changes an answer
        share = limits["answers", "answers"]
        limits["answers", "answers"] = min(max(share, FLIPPED[0]), FLIPPED[1])
    exact = ("data", "optimizer")
    return {key: x for key, x in limits.items() if key[0] not in exact}


def _limit(limits: Limits, part: Part, name: str) -> float:
    """The limit of a part's error; without one of bfloat16 that of float32."""
    if (part, name) == ("answers", "answers") and not limits:
        return 0.0
    return limits.get((part, name), FLOAT32[part])


def compare(
    job: str, layout: Layout, ours: Trained, reference: Trained, limits: Limits | None = None
) -> Row:
    """The row of `ours` against the same job on one device; `limits` are those of bfloat16."""
    limits = limits or {}
    measure = typical if limits else largest
    errors = list(errors_of(ours.seen, reference.seen, ours.roles, measure))
    where, part = "", ""
    names: tuple[str, ...] = ()
    for found in errors:
        wrong = _beyond(found, limits)
        if wrong:
            where, part, names = found.where, found.part, tuple(wrong)
            if part == "gradient":
                at = next(i for i, seen in enumerate(ours.seen) if seen.where == where)
                origin = deepest(wrong, ours.seen[at].gradients, reference.seen[at].gradients)
                names = (origin, *(name for name in wrong if name != origin))
            break

    def worst(part: Part) -> float:
        every = [x for found in errors if found.part == part for x in found.by_name.values()]
        return max(every, key=lambda x: (math.isnan(x), x))

    return Row(
        layout=spell_layout(layout),
        job=job,
        loss_error=worst("loss"),
        grad_error=worst("gradient"),
        weight_error=worst("weights"),
        adam_error=worst("optimizer"),
        where=where,
        part=part,
        names=names,
        recompiles=ours.recompiles,
        collectives=dict(ours.collectives),  # asdict would make a Counter count pairs
        temp_bytes=ours.temp_bytes,
        bubble=bubble_fraction(layout),
    )


def _beyond(found: Errors, limits: Limits) -> list[str]:
    """Names whose error is not within its limit; NaN is not."""
    return [
        name
        for name, error in found.by_name.items()
        if not error <= _limit(limits, found.part, name)
    ]


def certify(config: Config, cases: Mapping[str, Case], jobs: Iterable[str]) -> Iterator[Row]:
    """A row for every job and case, as they are done. Raises UserError on what does not fit the model.

    Where the model computes in bfloat16, every case is held to one device in float32, as far as one device in bfloat16
    is from it.
    """
    for name, case in cases.items():
        try:
            for layout in case:
                if layout is not None:
                    config.check(layout)
        except UserError as error:
            raise UserError(f"layout {name}: {error}") from None
    references: dict[tuple[str, int], tuple[Trained, Limits]] = {}
    done = set()
    for (name, (layout, generation)), job in itertools.product(cases.items(), jobs):
        case = Case(layout, generation if job in SAMPLING_JOBS else None)
        if (job, case) in done:
            continue
        done.add((job, case))
        rows = rows_for(*case)
        if (job, rows) not in references:
            references[job, rows] = reference_of(job, config, rows)
        reference, limits = references[job, rows]
        try:
            how = iterations(config, reference, case.generation)
            ours = train(job, config, rows, layout, how)
            row = compare(job, layout, ours, reference, limits)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            row = _failed(job, layout, reason)
        yield dataclasses.replace(row, layout=name)


def iterations(
    config: Config, reference: Trained | None = None, generation: Layout | None = None
) -> Iterations:
    """Settings of iterations that are compared with `reference`: they learn from its answers."""
    replay = () if reference is None else reference.answers
    return Iterations(generation, replay, clip=config.compute_dtype == "float32")


def reference_of(job: str, config: Config, rows: int) -> tuple[Trained, Limits]:
    """The job on one device in float32, and the limits of bfloat16 where the model computes in it."""
    exact = dataclasses.replace(config, compute_dtype="float32")
    reference = train(job, exact, rows, Layout(), iterations(config))  # with the clip of `config`
    if config.compute_dtype == "float32":
        return reference, {}
    rounded = train(job, config, rows, Layout(), iterations(config, reference))
    return reference, bfloat16_limits(rounded, reference)


def _failed(job: str, layout: Layout, reason: str) -> Row:
    nan = math.nan
    return Row(
        layout=spell_layout(layout),
        job=job,
        loss_error=nan,
        grad_error=nan,
        weight_error=nan,
        adam_error=nan,
        where="",
        part="",
        names=(),
        recompiles=0,
        collectives={},
        temp_bytes=0,
        bubble=bubble_fraction(layout),
        failure=reason,
    )
