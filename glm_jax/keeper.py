"""Saving a training while it goes, and going on from there."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Tree = TypeVar("Tree")
Facts = Mapping[str, Any]
NO_FACTS: Facts = {}
NO_METRICS: Mapping[str, float] = {}


class Keeper:
    """What a training tells how far it is; this one keeps nothing, so that every training begins at its beginning.

    Attributes:
        facts: what was told when the state was saved that the training goes on from; None: it begins.
        count: the count that was told with it.
    """

    facts: Facts | None = None
    count: int = 0

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        """Finish what is being written."""

    def restore(self, make: Callable[[], Tree]) -> Tree:
        """The saved tree of arrays, like the one that `make` makes; where there is none, that one."""
        return make()

    def keep(
        self,
        tree: Any,
        count: int,
        facts: Facts | Callable[[], Facts] = NO_FACTS,
        within: int = 0,
        metrics: Mapping[str, float] = NO_METRICS,
    ) -> None:
        """Save arrays and facts (what JSON can hold) if it is time to.

        `count` updates or iterations are done, and `within` the next one so many moments have passed; such moments are
        saved only where somebody asks the training to stop. `metrics` of the last one may say how good the model is.
        """

    def skip(self, step: int, model: Any, batch: Any, role: str = "") -> bool:
        """Whether the training goes on after update `step`, whose gradient on `batch` is not finite.

        Neither `model` nor the optimizer have learnt from it. `role` says which model it is where several learn.
        """
        return False


NOTHING_KEPT = Keeper()
