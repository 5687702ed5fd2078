"""What the compiler made of some programs, held against what it makes of them now."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_jax.config import PRESETS
from rlhf.plan.verdict import Request, Verdict
from rlhf.programs import Workload
from sharding.chips import GIB, find_pod
from sharding.errors import UserError
from sharding.layout import Remat, parse_layout

ALLOWED = 0.02  # relative change that is none

Figures = Mapping[str, Mapping[str, int]]  # program -> figure -> value


@dataclasses.dataclass(frozen=True)
class Watched:
    """A job whose programs are watched."""

    job: str
    model: str
    pod: str
    layout: str
    remat: Remat
    batch: int
    prompt_length: int
    response_length: int
    generation: str | None = None
    num_layers: int | None = None  # fewer than the preset's

    def request(self) -> Request:
        """What is asked of the compiler. Raises UserError where there is no such thing."""
        if self.model not in PRESETS:
            raise UserError(f"unknown model {self.model!r}: there are {', '.join(PRESETS)}")
        changes: dict[str, Any] = {"compute_dtype": "bfloat16"}
        if self.num_layers is not None:
            changes["num_layers"] = self.num_layers
        layout = dataclasses.replace(parse_layout(self.layout), remat=self.remat)
        return Request(
            job=self.job,
            config=dataclasses.replace(PRESETS[self.model], **changes),
            layout=layout,
            generation=None if self.generation is None else parse_layout(self.generation),
            workload=Workload(self.batch, self.prompt_length, self.response_length),
            pod=find_pod(self.pod),
        )


def figures(verdict: Verdict) -> Figures:
    """Of every program its memory, cycles, and bytes sent along each axis.

    Raises UserError where one could not be compiled or does not fit.
    """
    if verdict.error is not None:
        raise UserError(verdict.error)
    if verdict.failing is not None:
        raise UserError(
            f"{verdict.failing.name} does not fit: it needs {verdict.peak_bytes / GIB:.2f} GiB"
        )
    return {
        p.name: {
            "peak_bytes": p.peak_bytes,
            "flops": p.flops,
            "cycles": p.cycles,
            **{f"bytes sent: {name}": sent for name, sent in p.sent_bytes.items()},
        }
        for p in verdict.programs
    }


def changes(kept: Figures, now: Figures) -> Iterator[str]:
    """Every figure that differs by more than `ALLOWED`, in one line each."""
    for program in sorted({*kept, *now}):
        before, after = kept.get(program, {}), now.get(program, {})
        for name in sorted({*before, *after}):
            old, new = before.get(name, 0), after.get(name, 0)
            if abs(new - old) > ALLOWED * old:
                more = f"{new / old - 1:+.1%}" if old else "new"
                yield f"{program}: {name}: {old:,} -> {new:,} ({more})"


def read(path: Path) -> dict[str, tuple[Watched, Figures]]:
    """Name -> what is watched, and its figures; none yet: empty. Raises UserError where the file is none of ours."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: (Watched(**entry["what"]), entry.get("figures", {}))
            for name, entry in entries.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no list of watched programs: {error}") from None


def as_json(watched: Mapping[str, tuple[Watched, Figures]]) -> dict[str, Any]:
    """What `read` reads."""
    return {
        name: {"what": dataclasses.asdict(what), "figures": found}
        for name, (what, found) in watched.items()
    }
