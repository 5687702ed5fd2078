"""Compile the programs of one candidate for a described pod: python -m rlhf.plan.worker CACHE < request > verdict.

A process of its own, since compilers want their environment before JAX starts and may take the process with them.
"""

import dataclasses
import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from rlhf.plan.cache import Cache, Entry
from rlhf.plan.verdict import ProgramVerdict, Request, Verdict, as_json
from rlhf.programs import Program, programs, residents
from sharding.cost import cost
from sharding.described import described_devices
from sharding.devices import places
from sharding.errors import UserError
from sharding.hlo import parse
from sharding.schedule import estimate


def verdict(request: Request, cache: Cache) -> Verdict:
    """Compile the programs of the request, down to the first that does not fit: it decides, and they take minutes.

    What the cache has is not compiled again.
    """
    devices = described_devices(request.pod)
    with jax.set_mesh(request.layout.mesh(devices)):
        held = residents(request.job, request.config, request.layout)
        listed = programs(
            request.job, request.config, request.layout, request.workload, request.generation
        )
    found: list[ProgramVerdict] = []
    for program in reversed(listed):  # the updates, which need most, are the last of a step
        entry = cache.compiled(program.lower(), program.mesh, request.pod)
        found.insert(0, _judged(program, entry, held, request))
        if not found[0].fits:
            break
    return Verdict(tuple(found), held)


def _judged(
    program: Program, entry: Entry, held: Mapping[str, int], request: Request
) -> ProgramVerdict:
    beside = sum(held[role] for role in program.beside)
    found = ProgramVerdict(
        name=program.name,
        runs=program.runs,
        tokens=program.tokens,
        model_flops=program.flops,
        fits=entry.text is not None and entry.peak_bytes + beside <= request.pod.chip.memory_bytes,
        peak_bytes=entry.peak_bytes,
        beside_bytes=beside,
    )
    if entry.text is None:
        return found
    module = parse(entry.text)
    taken = cost(module)
    time = estimate(module, request.pod, places(program.mesh.devices, request.pod))
    sent: dict[str, int] = {}
    for x in taken.collectives:
        name = f"{'+'.join(x.axes(dict(program.mesh.shape)))} {x.kind}"
        sent[name] = sent.get(name, 0) + x.times * x.sent_bytes
    return dataclasses.replace(
        found,
        step_s=time.step_s,
        products_s=time.products_s,
        kernels_s=time.kernels_s,
        memory_s=time.memory_s,
        exposed_s=time.exposed_s,
        flops=taken.flops,
        memory_bytes=taken.memory_bytes,
        cycles=taken.cycles,
        sent_bytes=sent,
    )


def main() -> int:
    """Read a pickled Request, write the verdict as JSON."""
    request: Request = pickle.load(sys.stdin.buffer)
    try:
        found = verdict(request, Cache(Path(sys.argv[1])))
    except UserError as error:
        found = Verdict((), {}, str(error))
    except jax.errors.JaxRuntimeError as error:
        found = Verdict((), {}, f"the compiler gives up: {' '.join(str(error).split())[:200]}")
    sys.stdout.write(json.dumps(as_json(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
