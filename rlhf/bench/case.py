"""What is measured, and what was found: all that a process of its own is told, and what it answers."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from glm_jax.config import PRESETS, Config
from rlhf.programs import Workload, check
from rlhf.trials.models import tiny
from sharding.layout import Layout, Remat, get_layout


@dataclasses.dataclass(frozen=True)
class Model:
    """Whose training is measured."""

    preset: str
    tiny: bool  # with few and odd sizes instead of its own
    dtype: str  # of products
    num_layers: int | None  # None: as many as it has

    @property
    def config(self) -> Config:
        """Its shape."""
        own = PRESETS[self.preset]
        config = dataclasses.replace(tiny(own) if self.tiny else own, compute_dtype=self.dtype)
        if self.num_layers is not None:
            config = dataclasses.replace(config, num_layers=self.num_layers)
        return config

    @property
    def name(self) -> str:
        """For people."""
        layers = f", {self.num_layers} layers" if self.num_layers is not None else ""
        return f"{'a tiny ' if self.tiny else ''}{self.preset}{layers} in {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One job under one layout."""

    layout: str
    job: str
    model: Model
    devices: int
    workload: Workload
    steps: int  # that are timed
    remat: Remat
    generation: str | None  # the layout in which PPO samples; None: `layout` without its pipeline
    profile: str | None  # folder of a trace of some steps

    @property
    def layouts(self) -> tuple[Layout, Layout | None]:
        """Of training and of generation. Raises UserError where they do not fit the devices."""
        layout = dataclasses.replace(get_layout(self.layout, self.devices), remat=self.remat)
        generation = self.generation and get_layout(self.generation, self.devices)
        return layout, generation or None

    def check(self) -> None:
        """Raise UserError where layouts, model, job and workload do not fit each other."""
        layout, generation = self.layouts
        check(self.job, self.model.config, layout, self.workload, generation)
        if generation is not None:
            self.model.config.check(generation.for_generation())

    def as_json(self) -> dict[str, Any]:
        """What `case_of` reads."""
        return dataclasses.asdict(self)


def case_of(fields: Mapping[str, Any]) -> Case:
    """The case of these fields."""
    model, workload = Model(**fields["model"]), Workload(**fields["workload"])
    return Case(**{**fields, "model": model, "workload": workload})


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind."""

    runs: int
    sent_bytes: int  # by every device


@dataclasses.dataclass(frozen=True)
class ProgramRow:
    """One program of a job; but for `runs` and what is predicted all is of one run, on every device."""

    name: str
    runs: int  # in a step
    compile_s: float
    memory_bytes: int  # at its peak, with what lies beside its arguments
    flops: int  # of products, as often as they are executed
    collectives: Mapping[str, Moved]
    step_s: float | None = None  # median of its runs by itself; None: it was not run
    predicted_s: float | None = None  # None: the devices are not known


@dataclasses.dataclass(frozen=True)
class Row:
    """A job under a layout; of a step, which of PPO is an iteration, unless it says otherwise."""

    layout: str
    job: str
    failure: str = ""  # why there are no numbers
    programs: tuple[ProgramRow, ...] = ()
    tokens: int = 0
    step_s: tuple[float, ...] = ()  # of every step that was timed
    model_flops: int = 0  # that the model asks for, of all devices together
    mfu: float | None = None  # None: the peak of the devices is not known
    allocated_bytes: int | None = (
        None  # the most that a device had; None: its runtime does not tell
    )

    @property
    def median_s(self) -> float | None:
        """Of the timed steps."""
        return statistics.median(self.step_s) if self.step_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """Of all devices together, by the median."""
        return self.tokens / self.median_s if self.median_s else None

    @property
    def compile_s(self) -> float:
        """Of all programs."""
        return sum(program.compile_s for program in self.programs)

    @property
    def memory_bytes(self) -> int:
        """Of the program that takes most."""
        return max((program.memory_bytes for program in self.programs), default=0)

    @property
    def collectives(self) -> Mapping[str, Moved]:
        """By kind."""
        found: dict[str, Moved] = {}
        for program in self.programs:
            for kind, moved in program.collectives.items():
                before = found.get(kind, Moved(0, 0))
                found[kind] = Moved(
                    before.runs + program.runs * moved.runs,
                    before.sent_bytes + program.runs * moved.sent_bytes,
                )
        return found

    @property
    def predicted_s(self) -> float | None:
        """What the programs are predicted to take together; None where that is not known of one of them."""
        seconds = [program.predicted_s for program in self.programs]
        if not seconds or None in seconds:
            return None
        return sum(p.runs * (p.predicted_s or 0.0) for p in self.programs)

    @property
    def ratio(self) -> float | None:
        """Measured / predicted."""
        if self.median_s is None or not self.predicted_s:
            return None
        return self.median_s / self.predicted_s

    def as_json(self) -> dict[str, Any]:
        """Every field and what follows from them; `row_of` reads it."""
        derived = ("median_s", "tokens_per_s", "compile_s", "memory_bytes", "predicted_s", "ratio")
        collectives = {kind: dataclasses.asdict(moved) for kind, moved in self.collectives.items()}
        return {
            **dataclasses.asdict(self),
            **{name: getattr(self, name) for name in derived},
            "collectives": collectives,
        }


def row_of(fields: Mapping[str, Any]) -> Row:
    """The row that `Row.as_json` wrote."""
    own = {field.name for field in dataclasses.fields(Row)}
    kept = {name: value for name, value in fields.items() if name in own}
    programs = tuple(_program(program) for program in fields["programs"])
    return Row(**{**kept, "programs": programs, "step_s": tuple(fields["step_s"])})


def _program(fields: Mapping[str, Any]) -> ProgramRow:
    moved = {kind: Moved(**numbers) for kind, numbers in fields["collectives"].items()}
    return ProgramRow(**{**fields, "collectives": moved})
