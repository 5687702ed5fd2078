"""How long a compiled program takes on a pod: its schedule, walked in order against the limits of the chip.

A compiler prints a program in the order in which it runs. A device does one thing at a time, for as long as its
products take or its bytes through memory (Williams et al. 2009, the roofline); what is started in the background -
collectives, copies between memory and chip - runs beside it on links and memory of its own until the instruction that
waits for it.
"""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from sharding.chips import Pod
from sharding.collectives import Collective, collective, kind_of, rendezvous
from sharding.errors import UserError
from sharding.flops import flops
from sharding.hlo import Computation, Instruction, Module
from sharding.kernels import kernel_flops
from sharding.loops import PARTS, Visit, trips, walk
from sharding.network import Transfer, transfer
from sharding.traffic import COPIES, HOST, copied, memory_bytes

# What real chips reach of their peak; docs/planning.md has what these were held against.
PRODUCT_SHARE = 0.95  # in products
KERNEL_SHARE = 0.4  # in attention kernels, whose products are small and wait for softmax
MEMORY_SHARE = 0.85
LINK_SHARE = 1.0


@dataclasses.dataclass(frozen=True)
class Sent:
    """A collective of a program; seconds of all its runs."""

    collective: Collective
    seconds: float  # that it takes
    exposed_seconds: float  # of which the device waits


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program; what a device does adds up to `step_s`."""

    step_s: float
    products_s: float
    kernels_s: float  # in attention kernels
    memory_s: float  # waiting for the memory
    collectives: tuple[Sent, ...]

    @property
    def exposed_s(self) -> float:
        """Waiting for other devices."""
        return sum(x.exposed_seconds for x in self.collectives)


def estimate(module: Module, pod: Pod, places: Sequence[int] | None = None) -> Estimate:
    """Walk the program of one device of `pod`. Raises UserError where it is for more devices than there are.

    `places` says where on the pod each of the program's devices stands, as `sharding.network` numbers them; None: in
    order.
    """
    if module.num_partitions > pod.num_devices:
        raise UserError(
            f"the program runs on {module.num_partitions} devices but {pod.name} has {pod.num_devices}: "
            f"give the pod that it was compiled for"
        )
    run = _Run(module, pod, places)
    run.through(module.entry, 1)
    return run.estimate()


class _Run:
    """A device's clock, what goes on beside it, and the seconds so far."""

    def __init__(self, module: Module, pod: Pod, places: Sequence[int] | None) -> None:
        self._module = module
        self._pod = pod
        self._places = places
        self._now = 0.0
        self._busy: dict[
            object, float
        ] = {}  # a link, or the memory -> when it has done what it has
        # name or channel of what was started -> when it ends, and of a collective its name
        self._started: dict[str, tuple[float, str | None]] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._sent: dict[str, tuple[Collective, Transfer]] = {}
        self._taken: dict[str, float] = defaultdict(float)
        self._exposed: dict[str, float] = defaultdict(float)

    def estimate(self) -> Estimate:
        sent = (
            Sent(of, self._taken[name], self._exposed[name]) for name, (of, _) in self._sent.items()
        )
        products, kernels, memory = (self._seconds[x] for x in ("products", "kernels", "memory"))
        return Estimate(self._now, products, kernels, memory, tuple(sent))

    def through(self, computation: Computation, times: int) -> None:
        """Run a computation once; its seconds count `times`."""
        for x in computation.instructions.values():
            if x.opcode == "while":
                self._loop(computation, x, times)
            elif x.opcode == "call":
                self.through(self._module[x.called[0]], times)
            elif x.opcode == "conditional":
                self._longest_branch(x, times)
            else:
                self._one(computation, x, times)

    def _loop(self, computation: Computation, x: Instruction, times: int) -> None:
        body = self._module[(x.attribute("body") or "").lstrip("%")]
        rounds = trips(self._module, computation, x)
        rounds = 1 if rounds is None else rounds
        if rounds:
            self.through(body, times)
        if rounds > 1:  # those after the first are alike: what it started is on its way
            began = self._now
            self.through(body, times * (rounds - 1))
            self._skip((self._now - began) * (rounds - 2))

    def _skip(self, seconds: float) -> None:
        self._now += seconds
        self._busy = {name: end + seconds for name, end in self._busy.items()}
        self._started = {name: (end + seconds, of) for name, (end, of) in self._started.items()}

    def _longest_branch(self, x: Instruction, times: int) -> None:
        runs = [self._copied() for _ in x.called]
        for run, name in zip(runs, x.called, strict=True):
            run.through(self._module[name], times)
        if runs:
            self.__dict__ |= max(runs, key=lambda run: run._now).__dict__

    def _copied(self) -> "_Run":
        run = copy.copy(self)
        for name, value in self.__dict__.items():
            if isinstance(value, dict):
                run.__dict__[name] = value.copy()
        return run

    def _one(self, computation: Computation, x: Instruction, times: int) -> None:
        inside = [Visit(x, computation, 1, computation.name)]
        if x.opcode in PARTS:
            for name in x.called:
                inside += walk(self._module, self._module[name])
        if x.opcode.endswith("-done"):
            started = computation[x.operands[0]]
            self._wait(rendezvous(started) or started.name, times)
        elif x.opcode == "async-update":
            self._started[x.name] = self._started.pop(x.operands[0], (self._now, None))
        elif x.opcode in COPIES:
            self._started[x.name] = self._copy(computation, x), None
        else:
            self._work(computation, x, inside, times)
            self._talk(x, inside, times)

    def _work(
        self, computation: Computation, x: Instruction, inside: list[Visit], times: int
    ) -> None:
        """What the device itself does: products and memory at once."""
        peak = self._pod.chip.flops
        products = sum(flops(v.computation, v.instruction) for v in inside) / peak / PRODUCT_SHARE
        kernels = kernel_flops(computation, x) / peak / KERNEL_SHARE
        background = x.opcode.endswith("-start") or x.opcode in ("send", "recv")
        moved = 0 if background else memory_bytes(self._module, computation, x)
        end = self._now + products + kernels
        waited = max(self._memory(moved) - end, 0.0) if moved else 0.0
        self._now = end + waited
        for part, seconds in (("products", products), ("kernels", kernels), ("memory", waited)):
            self._seconds[part] += times * seconds

    def _copy(self, computation: Computation, x: Instruction) -> float:
        """When a copy has ended that begins now; to and from the host there is one lane each."""
        end = self._memory(memory_bytes(self._module, computation, x))
        copy = copied(x)
        if HOST not in (copy.source, copy.target):
            return end
        lane = "to host" if copy.target == HOST else "from host"
        free = max(self._now, self._busy.get(lane, 0.0))
        self._busy[lane] = free + copy.num_bytes / self._pod.chip.host_bandwidth
        return max(end, self._busy[lane])

    def _memory(self, moved: int) -> float:
        """When the memory is done with so many bytes; it serves those who asked before first."""
        bandwidth = self._pod.chip.memory_bandwidth * MEMORY_SHARE
        end = max(self._now, self._busy.get("memory", 0.0)) + moved / bandwidth
        self._busy["memory"] = end
        return end

    def _talk(self, x: Instruction, inside: list[Visit], times: int) -> None:
        """Start a collective, or wait for one; a fusion may carry one that runs in the background a step on."""
        talks = [v for v in inside if kind_of(v.instruction) is not None]
        if not talks:
            return
        targets = {v.instruction.attribute("custom_call_target") for v in inside}
        alone = (
            x.opcode.endswith("-start") or x.opcode == "send"
        )  # its end is an instruction of its own
        background = alone or "AsyncCollectiveStart" in targets
        for talk in talks:
            channel = talk.instruction.attribute("channel_id") or talk.instruction.name
            key = (rendezvous(x) or x.name) if alone else channel
            if "AsyncCollectiveDone" in targets:
                self._wait(key, times)
            elif key not in self._started:
                self._start(key, talk, times)
                if not background:
                    self._wait(key, times)

    def _start(self, key: str, talk: Visit, times: int) -> None:
        name = talk.instruction.name
        if name not in self._sent:
            found = collective(talk, self._module.num_partitions)
            standing = found if self._places is None else found.at(self._places)
            self._sent[name] = found, transfer(standing, self._pod)
        _, took = self._sent[name]
        seconds = took.seconds / LINK_SHARE
        end = max([self._now, *(self._busy.get(link, 0.0) for link in took.links)]) + seconds
        self._started[key] = end, name
        self._busy |= dict.fromkeys(took.links, end)
        self._taken[name] += times * seconds

    def _wait(self, key: str, times: int) -> None:
        end, name = self._started.pop(key, (self._now, None))
        waited = max(end - self._now, 0.0)
        self._now += waited
        if name is None:
            self._seconds["memory"] += times * waited
        else:
            self._exposed[name] += times * waited
