"""Freed memory stays with the process on the CPU, and only there."""

import os
import platform
import subprocess
import sys

import pytest

# page faults of the second time that a thread fills 128 MiB
PROGRAM = """
import ctypes, resource, threading
from sharding.host_memory import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def fill():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        piece = libc.malloc(ctypes.c_size_t(2**27))
        ctypes.memset(piece, 1, 2**27)
        libc.free(ctypes.c_void_p(piece))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
faults = []
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("platforms", "kept"), [("cpu", True), ("", False)])
def test_what_is_freed_is_kept_on_the_cpu_alone(platforms: str, kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) < 30) is kept, done.stdout  # at least 64, where pages are of 2 MiB
