"""Which layouts there are for a job on a pod, and why some cannot be."""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from glm_jax.config import Config
from rlhf.plan.rough import Rough, rough
from rlhf.programs import Workload
from sharding.chips import GIB, Pod
from sharding.errors import UserError
from sharding.layout import Layout, Remat, spell_layout
from sharding.pipeline import layer_slots

REMATS: tuple[Remat, ...] = ("none", "matmuls", "full")
MOST_TENSOR = 16  # beyond it products are so small that nothing is gained
UNSURE = 1.2  # how far above its memory a layout may lie by the rough count and still be compiled


class Candidate(NamedTuple):
    """A layout that may work, and what it takes by the rough count."""

    layout: Layout
    generation: Layout | None  # in which PPO samples
    rough: Rough

    @property
    def name(self) -> str:
        """Layout, remat, and what PPO samples in, for tables."""
        return name_of(self.layout, self.generation)


class Found(NamedTuple):
    """The candidates, and how many layouts each reason rules out."""

    candidates: list[Candidate]
    ruled_out: Counter[str]

    def within(self, available: int) -> "Found":
        """Those alone that take no more than so many bytes by the rough count."""
        fits = [one for one in self.candidates if one.rough.peak_bytes <= available]
        out = Counter({memory_reason(available): len(self.candidates) - len(fits)})
        return Found(fits, self.ruled_out + out)


def name_of(layout: Layout, generation: Layout | None) -> str:
    """Such as 4x1x64x1:circular:8:2 remat full."""
    parts = [spell_layout(layout), f"remat {layout.remat}"]
    if generation is not None:
        parts.append(f"samples in {spell_layout(generation)}")
    return ", ".join(parts)


def layouts(pod: Pod, batch: int, num_layers: int) -> Iterator[Layout]:
    """Every layout of the pod's devices: sizes of the axes, schedules, microbatches, remat."""
    count = pod.num_devices
    for pipe in _divisors(count):
        for data in _divisors(count // pipe):
            for fsdp in _divisors(count // (pipe * data)):
                tensor = count // (pipe * data * fsdp)
                for micro, repeats in _schedules(pipe, batch // (data * fsdp), num_layers):
                    for remat in REMATS:
                        yield Layout(pipe, data, fsdp, tensor, micro, repeats, remat=remat)


def _schedules(pipe: int, rows: int, num_layers: int) -> list[tuple[int, int]]:
    """(microbatches, repeats) for `rows` sequences a shard."""
    if pipe == 1:
        return [(1, 1)]
    micro = [n for n in (pipe, 2 * pipe, 4 * pipe) if n <= max(rows, 1)] or [pipe]
    repeats = (
        {1, 2} if num_layers % pipe else {1, 2, num_layers // pipe}
    )  # the last: layers handed on alone
    return [(n, times) for n in micro for times in sorted(repeats)]


@lru_cache(maxsize=64)
def find(job: str, config: Config, workload: Workload, pod: Pod) -> Found:
    """Every layout of the pod, ruled out or counted roughly, fastest first."""
    ruled_out: Counter[str] = Counter()
    candidates: list[Candidate] = []
    rows = workload.batch // 2 if job == "ppo" else workload.batch  # of an update
    for layout in layouts(pod, rows, config.num_layers):
        reason = misfit(job, config, workload, pod, layout, rows)
        if reason is not None:
            ruled_out[reason] += 1
            continue
        for generation in _generations(job, config, workload, layout):
            taken = rough(job, config, layout, workload, pod, generation)
            one = Candidate(layout, generation, taken)
            if taken.peak_bytes <= UNSURE * pod.chip.memory_bytes:
                candidates.append(one)
                continue
            ruled_out[memory_reason(pod.chip.memory_bytes)] += 1
    return Found(sorted(candidates, key=lambda one: one.rough.step_s), ruled_out)


def memory_reason(available: int) -> str:
    """Why a layout is ruled out that takes more."""
    return f"memory: more than {available / GIB:.2f} GiB a device"


def misfit(
    job: str, config: Config, workload: Workload, pod: Pod, layout: Layout, rows: int
) -> str | None:
    """Why a layout cannot be, whatever the memory; None where it can."""
    if layout.data % pod.slices:
        return f"slices: data is no multiple of {pod.slices}, and only data may cross slices"
    if layout.tensor > MOST_TENSOR:
        return f"tensor above {MOST_TENSOR}"
    chunks = layout.pipe * layout.repeats
    if chunks > config.num_layers:
        return f"pipe x repeats above the {config.num_layers} layers"
    if layout.pipe > 1 and layer_slots(config.num_layers, layout).size > 1.25 * config.num_layers:
        return "pipe: more than a quarter of the layers' slots would be empty"
    try:
        config.check(layout)
    except UserError as error:
        return str(error).split(":")[0]
    pieces = layout.ways("batch") * layout.microbatches
    if rows % pieces:
        return f"batch: {rows} rows do not divide over shards x microbatches"
    return None


def _generations(
    job: str, config: Config, workload: Workload, layout: Layout
) -> list[Layout | None]:
    """Layouts to sample in: without fsdp no weight is moved at every token."""
    if job != "ppo":
        return [None]
    count, found = layout.num_devices, []
    for tensor in (n for n in _divisors(count) if n <= MOST_TENSOR):
        one = Layout(data=count // tensor, tensor=tensor)
        try:
            config.check(one.for_generation())
        except UserError:
            continue
        if workload.batch % one.ways("batch") == 0:
            found.append(one)
    own = layout.for_generation()
    return [*found, None] if workload.batch % own.ways("batch") == 0 else list(found)


def _divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]
