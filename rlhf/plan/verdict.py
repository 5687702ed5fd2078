"""What the compiler says of a candidate: every program of the job, for one device."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax.config import Config
from rlhf.programs import Workload
from sharding.chips import Pod
from sharding.described import ENVIRONMENT
from sharding.layout import Layout

ROLLOUT = ("to generation", "generate", "to training")  # programs that PPO draws answers with


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be compiled."""

    job: str
    config: Config
    layout: Layout
    generation: Layout | None
    workload: Workload
    pod: Pod


@dataclasses.dataclass(frozen=True)
class ProgramVerdict:
    """A program, as compiled; bytes of one device, seconds of one run."""

    name: str
    runs: int  # in a step
    tokens: int
    model_flops: int  # of all devices together
    fits: bool
    peak_bytes: int  # as the compiler says; of one that does not fit, what it needs
    beside_bytes: int  # of what else is in memory meanwhile
    step_s: float = 0.0
    products_s: float = 0.0
    kernels_s: float = 0.0
    memory_s: float = 0.0
    exposed_s: float = 0.0
    flops: int = 0
    memory_bytes: int = 0
    cycles: int = 0  # as the compiler estimates
    sent_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by mesh axes and kind


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All programs of a candidate, those from one that does not fit, or why they could not be compiled."""

    programs: tuple[ProgramVerdict, ...]
    residents: Mapping[str, int]  # role -> bytes
    error: str | None = None

    @property
    def fits(self) -> bool:
        """Whether every program does, with what else is in memory."""
        return self.error is None and self.failing is None

    @property
    def failing(self) -> ProgramVerdict | None:
        """The program that does not fit."""
        return next((program for program in self.programs if not program.fits), None)

    @property
    def step_s(self) -> float:
        """Of all programs, one after the other."""
        return sum(program.runs * program.step_s for program in self.programs)

    @property
    def peak_bytes(self) -> int:
        """At the fullest moment, what lies beside a program included."""
        return max((p.peak_bytes + p.beside_bytes for p in self.programs), default=0)

    @property
    def rollout_share(self) -> float:
        """Of a step's time, that for drawing answers."""
        drawing = sum(p.runs * p.step_s for p in self.programs if p.name in ROLLOUT)
        return drawing / self.step_s if self.step_s else 0.0

    def mfu(self, pod: Pod) -> float:
        """Model FLOPs utilisation of a step."""
        flops = sum(p.runs * p.model_flops for p in self.programs)
        return pod.chip.utilisation(flops, self.step_s, pod.num_devices) if self.step_s else 0.0


def as_json(verdict: Verdict) -> dict[str, Any]:
    """The fields of a verdict."""
    return dataclasses.asdict(verdict)


def from_json(fields: Mapping[str, Any]) -> Verdict:
    """The verdict with these fields."""
    programs = tuple(ProgramVerdict(**program) for program in fields["programs"])
    return Verdict(programs, fields["residents"], fields["error"])


def ask(request: Request, cache: Path) -> Verdict:
    """Compile in a process of its own, or read what the folder `cache` has of it."""
    command = [sys.executable, "-m", "rlhf.plan.worker", str(cache)]
    ran = subprocess.run(
        command, input=pickle.dumps(request), capture_output=True, env={**os.environ, **ENVIRONMENT}
    )
    if ran.returncode < 0:
        name = signal.Signals(-ran.returncode).name
        return Verdict((), {}, f"the compiler crashed ({name}): choose another layout")
    if ran.returncode:
        lines = ran.stderr.decode(errors="replace").strip().splitlines()
        return Verdict((), {}, f"the compiler failed: {lines[-1] if lines else ran.returncode}")
    return from_json(json.loads(ran.stdout))
