"""What becomes of the host memory that a program has freed."""

import ctypes
import sys

import jax

# glibc's names for its settings (malloc.h), and the most that an int says
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep for the next update what this one frees, where JAX is told to run on the CPU alone.

    XLA asks for an update's temporary arrays as one piece and frees it at the end; glibc hands a piece that large
    back to the system at once, and the next update waits while the same pages are filled with zeros. Call it before
    JAX starts: its threads choose then where they get memory from. On an accelerator nothing changes, since there the
    host had rather give back what it read a checkpoint into; neither does it without glibc.
    """
    if jax.config.values["jax_platforms"] != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # only the one arena that grows in place can keep pieces of any size
        for setting, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, MOST)):
            mallopt(setting, value)
