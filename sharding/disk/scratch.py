"""Memory that is used again and again."""

import threading

import numpy as np


class Scratch(threading.local):
    """A buffer a thread, as large as the largest array it was asked for.

    A fresh array of many MiB is made of fresh pages, which the kernel has to clear: that costs more than copying into
    memory at hand.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray:
        """A vector that holds anything, over what the last call of this thread returned."""
        needed = size * dtype.itemsize
        if needed > self._bytes.size:
            self._bytes = np.empty(0, np.uint8)  # not both at a time
            self._bytes = np.empty(needed, np.uint8)
        return self._bytes[:needed].view(dtype)
