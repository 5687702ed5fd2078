"""Bugs between a run's data and PPO: the doctor of a whole run names them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlhf.ppo_run
from rlhf.cli import main
from rlhf.reference import References

RECIPE = Path(__file__).with_name("tiny_recipe.py")
Patch = pytest.MonkeyPatch


def _baselines_of_other_prompts(patch: Patch) -> None:
    """Scores of reference answers are those of the prompts before."""
    draw = rlhf.ppo_run.draw_references

    def rolled(*args: Any, **how: Any) -> References:
        found = draw(*args, **how)
        return found._replace(scores=np.roll(found.scores, 1, axis=0))

    patch.setattr(rlhf.ppo_run, "draw_references", rolled)


def _the_same_prompts_every_time(patch: Patch) -> None:
    """The iterator of prompts stands still."""
    shuffled = rlhf.ppo_run.shuffled

    class Still:
        def __init__(self, rows: Any, size: int, seed: int) -> None:
            self._inner = shuffled(rows, size, seed)
            self._first = next(self._inner)

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            return self._first

        def get_state(self) -> Any:
            return self._inner.get_state()

        def set_state(self, state: Any) -> None:
            self._inner.set_state(state)

    patch.setattr(rlhf.ppo_run, "shuffled", Still)


BUGS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "baselines of other prompts": (_baselines_of_other_prompts, "reference answers differ by"),
    "the same prompts every time": (
        _the_same_prompts_every_time,
        "prompts are those of the iteration before",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_run_with_a_planted_bug_stops(
    name: str, monkeypatch: Patch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, line = BUGS[name]
    plant(monkeypatch)
    options = ["--output-dir", str(tmp_path / "run"), "--layout", "dp", "--devices", "8"]
    assert main(["run", str(RECIPE), *options, "--sft.steps", "2", "--reward.steps", "2"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "the doctor stopped PPO: inputs:" in error and line in error
