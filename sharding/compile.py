"""What the compiler is asked to do: the programs of this process."""

from typing import Any

import jax.monitoring

_compiled: list[str] = []


def _listen(event: str, duration_secs: float, **facts: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(facts.get("fun_name", "a program"))


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiled_programs() -> list[str]:
    """Names of the programs that this process has compiled so far, one found in the compilation cache included."""
    return list(_compiled)
