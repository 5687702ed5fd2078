"""Find the best layouts of a job on a pod: count all roughly, then ask the compiler about the best of them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal, NamedTuple

from glm_jax.config import Config
from rlhf.plan.candidates import Candidate, Found, find
from rlhf.plan.memo import ask_once
from rlhf.plan.verdict import Request, Verdict
from rlhf.programs import Workload
from sharding.chips import Pod, pods
from sharding.errors import UserError

Objective = Literal["time", "memory", "smallest"]
TRIED = 3
Heard = Callable[[int, int, "Judged"], None]  # (done, of how many, the newest)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be planned."""

    job: str
    model: str  # its name, for tables
    config: Config
    workload: Workload
    objective: Objective = "time"


class Judged(NamedTuple):
    """A candidate, and what the compiler says; None where it was not asked."""

    candidate: Candidate
    verdict: Verdict | None
    available: int  # bytes of a device

    @property
    def fits(self) -> bool:
        """By the compiler, or by the rough count where it was not asked."""
        if self.verdict is None:
            return self.candidate.rough.peak_bytes <= self.available
        return self.verdict.fits

    @property
    def step_s(self) -> float:
        """Seconds of a step; roughly, where it does not fit: not all of its programs were compiled."""
        if self.verdict is None or not self.verdict.fits:
            return self.candidate.rough.step_s
        return self.verdict.step_s

    @property
    def peak_bytes(self) -> int:
        """Of a device, at the fullest moment."""
        return self.candidate.rough.peak_bytes if self.verdict is None else self.verdict.peak_bytes


class Plan(NamedTuple):
    """The answer: candidates, best first, those that do not fit last."""

    task: Task
    pod: Pod
    judged: list[Judged]
    candidates: int  # that the rough count left
    ruled_out: Counter[str]
    compiled: bool  # whether the compiler was asked

    @property
    def best(self) -> Judged | None:
        """The first one that fits."""
        return next((one for one in self.judged if one.fits), None)


def plan(
    task: Task,
    pod: Pod,
    cache: Path | None,
    top: int = 10,
    workers: int = 1,
    heard: Heard = lambda done, count, one: None,
) -> Plan:
    """The best layouts of the pod by the objective. Raises UserError where none can fit, naming the smallest pod.

    Those that the compiler refuses do not count among the `top`: more are compiled, `TRIED` times as many at most.

    Args:
        task: job, model, workload and objective.
        pod: where it is to run.
        cache: folder of compiled programs; None: the compiler is not asked.
        top: how many layouts to find that fit.
        workers: compilers at a time.
        heard: told of every candidate as its verdict comes.
    """
    found = find(task.job, task.config, task.workload, pod)
    if cache is None:  # nobody says that what the rough count finds too large is not
        found = found.within(pod.chip.memory_bytes)
    if not found.candidates:
        raise UserError(_none_fits(task, pod, found))
    ranked = _ranked(found.candidates, task.objective)[: TRIED * top]
    if cache is None:
        judged = [Judged(one, None, pod.chip.memory_bytes) for one in ranked[:top]]
    else:
        judged = []
        while ranked and (missing := top - sum(one.fits for one in judged)):
            chosen, ranked = ranked[:missing], ranked[missing:]
            judged += _ask_all(task, pod, chosen, cache, workers, heard)
    judged.sort(key=lambda one: _rank(one, task.objective))
    return Plan(task, pod, judged, len(found.candidates), found.ruled_out, cache is not None)


def smallest(
    task: Task,
    pod: Pod,
    cache: Path | None,
    workers: int = 1,
    heard: Heard = lambda done, count, one: None,
) -> Plan:
    """The plan of the smallest pod of this kind of chip on which the job fits. Raises UserError where none does."""
    for size in pods(pod.chip):
        found = find(task.job, task.config, task.workload, size)
        if not (found.candidates if cache is not None else _some_fits(task, size)):
            continue
        leanest = dataclasses.replace(task, objective="memory")
        tried = plan(leanest, size, cache, 2, workers, heard)
        if tried.best is not None:
            return tried
    raise UserError(f"{task.job} of {task.model} fits on no pod of {pod.chip.name}")


def _ranked(candidates: Sequence[Candidate], objective: Objective) -> list[Candidate]:
    """Those most worth compiling first."""
    if objective == "time":
        return sorted(candidates, key=lambda one: one.rough.step_s)
    return sorted(candidates, key=lambda one: one.rough.peak_bytes)


def _rank(one: Judged, objective: Objective) -> tuple[bool, bool, float]:
    """What fits first, what could not be compiled last."""
    failed = one.verdict is not None and one.verdict.error is not None
    measure = one.step_s if objective == "time" and one.fits else float(one.peak_bytes)
    return not one.fits, failed, measure


def _ask_all(
    task: Task,
    pod: Pod,
    chosen: Sequence[Candidate],
    cache: Path,
    workers: int,
    heard: Heard,
) -> Iterator[Judged]:
    """Verdicts as they come; interrupted, those that came are kept in the cache."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: dict[Future[Verdict], Candidate] = {
            pool.submit(ask_once, _request(task, pod, one), cache): one for one in chosen
        }
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                judged = Judged(waiting[future], future.result(), pod.chip.memory_bytes)
                heard(done, len(chosen), judged)
                yield judged
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def _request(task: Task, pod: Pod, one: Candidate) -> Request:
    return Request(task.job, task.config, one.layout, one.generation, task.workload, pod)


def _some_fits(task: Task, pod: Pod) -> bool:
    """By the rough count."""
    found = find(task.job, task.config, task.workload, pod)
    return any(one.rough.peak_bytes <= pod.chip.memory_bytes for one in found.candidates)


def _none_fits(task: Task, pod: Pod, found: Found) -> str:
    reasons = ", ".join(f"{reason} ({count})" for reason, count in found.ruled_out.most_common(3))
    larger = (p for p in pods(pod.chip) if p.num_devices > pod.num_devices)
    fitting = next((p for p in larger if _some_fits(task, p)), None)
    hint = (
        f"the smallest pod that would: {fitting.name}" if fitting else "no pod of this chip would"
    )
    return f"no layout of {task.job} of {task.model} fits on {pod.name} ({reasons}); {hint}"
