"""Time and memory of a job under a layout, from shapes alone: good enough to say which layouts are worth compiling."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping

from glm_jax.config import Config
from rlhf.plan.rough_memory import resident_bytes, sampling_bytes, training_bytes
from rlhf.plan.rough_time import drawing_seconds, pass_seconds
from rlhf.plan.sizes import Pass
from rlhf.programs import Workload
from sharding.chips import Pod
from sharding.layout import Layout


@dataclasses.dataclass(frozen=True)
class Rough:
    """What a step takes."""

    seconds: Mapping[str, float]  # by kind of work
    rollout_s: float  # of which drawing answers
    memory: Mapping[str, int]  # bytes by role

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.memory.values())


def rough(
    job: str,
    config: Config,
    layout: Layout,
    workload: Workload,
    pod: Pod,
    generation: Layout | None = None,
    minibatches: int = 2,
) -> Rough:
    """Of a step of `job`, which of PPO is an iteration."""
    seconds: dict[str, float] = defaultdict(float)
    passes = list(_passes(job, workload, minibatches))
    for one in passes:
        for name, value in pass_seconds(one, config, layout, pod).items():
            seconds[name] += value * one.times
    training = max((one for one in passes if one.backward), key=lambda one: one.rows * one.length)
    rollout, working = 0.0, training_bytes(training, config, layout)
    if job == "ppo":
        sampling = (generation or layout).for_generation()
        drawn = drawing_seconds(config, sampling, workload, pod)
        rollout = sum(drawn.values())
        for name, value in drawn.items():
            seconds[name] += value
        held = sampling_bytes(config, sampling, workload)
        working = max(working, held, key=lambda x: sum(x.values()))
    memory = resident_bytes(job, config, layout) | working
    return Rough(dict(seconds), rollout, {name: int(size) for name, size in memory.items()})


def _passes(job: str, workload: Workload, minibatches: int) -> Iterator[Pass]:
    rows, length = workload.batch, workload.length
    if job == "sft":
        yield Pass(rows, length, True, True)
    elif job == "reward":
        yield Pass(2 * rows, length, False, True)
    elif job == "dpo":
        yield Pass(2 * rows + workload.sft_rows(rows), length, True, True)
    else:
        piece = rows // minibatches
        yield Pass(rows, length, True, False, 2)  # policy and reference
        yield Pass(rows, length, False, False, 2)  # reward model and critic
        yield Pass(piece + workload.sft_rows(piece), length, True, True, minibatches)
        yield Pass(piece, length, False, True, minibatches)  # critic
