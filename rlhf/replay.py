"""An update whose gradient was not finite, made once more: which of its rows, or which weights, are to blame."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from glm_jax.batch import Judged, Packed, Sequences
from glm_jax.config import Config
from glm_jax.model import init_model
from glm_jax.optim import OptimConfig, make_optimizer
from glm_jax.scalar import init_scalar
from glm_jax.train import Update, init_state, to_host
from glm_jax.weights import from_kept, to_kept
from rlhf.dpo import PAIRS, dpo_update
from rlhf.ppo import actor_update, contents, critic_update
from rlhf.recipe import Recipe, RewardRecipe, check_training
from rlhf.reward import reward_update
from rlhf.sft import sft_update
from sharding import checkpoint
from sharding.disk.arrays import read_arrays
from sharding.errors import UserError
from sharding.layout import Layout

SEQUENCES = Sequences(0, 0, 0)


class Part(NamedTuple):
    """Rows of a batch that are learnt from in one way."""

    name: str  # of a row
    size: int  # how many there are
    batch: Callable[[int], Any]  # a whole batch in which every such row is the one with this number
    update: Update


class Replayed(NamedTuple):
    """What is not finite, by what it is."""

    weights: list[str]
    rows: list[
        tuple[str, int, float, float]
    ]  # kind and number of a row, its loss and gradient norm


def replay(recipe: Recipe | RewardRecipe, fault: Path) -> Replayed:
    """Make the update kept in `fault` again, a row at a time.

    Raises UserError where `fault` holds none, or one of another recipe.
    """
    about = _about(fault)
    layout, shape = check_training(recipe)
    config = dataclasses.replace(shape, compute_dtype=recipe.model.compute_dtype)
    optimizer = make_optimizer(OptimConfig(), 1)
    with jax.set_mesh(layout.mesh()):
        scalar = about["stage"] == "reward" or about["role"] == "critic"
        model = _model(config, layout, fault, scalar)
        weights = [
            jax.tree_util.keystr(path).strip(".")
            for path, x in jax.tree_util.tree_leaves_with_path(model)
            if not bool(jax.numpy.isfinite(x).all())
        ]
        rows = []
        for part in _parts(recipe, layout, optimizer, about, fault / "batch.npz"):
            layout.check_batch(part.size, f"{about['stage']}.batch_size")
            for number in range(part.size):
                state = init_state(model, optimizer)  # which the update takes
                _, metrics = part.update(state, layout.put(part.batch(number)))
                figures = to_host(metrics)
                if not math.isfinite(figures["grad_norm"]):
                    rows.append((part.name, number, figures["loss"], figures["grad_norm"]))
    return Replayed(weights, rows)


def _about(fault: Path) -> Mapping[str, Any]:
    path = fault / "fault.json"
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}; give a folder below faults/ of a run"
        ) from None
    return {"role": "", **found}


def _model(config: Config, layout: Layout, fault: Path, scalar: bool) -> Any:
    init = init_scalar if scalar else init_model
    begin = partial(init, config, layout, jax.random.key(0))
    like = jax.eval_shape(lambda: to_kept(begin(), layout))
    stored = checkpoint.restore(fault / "weights", like)
    return jax.jit(partial(from_kept, layout=layout))(stored)


def _parts(
    recipe: Recipe | RewardRecipe,
    layout: Layout,
    optimizer: Any,
    about: Mapping[str, Any],
    path: Path,
) -> list[Part]:
    if about["stage"] == "reward":
        packed = recipe.reward.pack_length is not None
        shape: Any = Packed(*[0] * 5) if packed else Judged(PAIRS.pairs, 0)
        judged = read_arrays(path, shape)
        update = reward_update(recipe.reward, optimizer, layout)
        return [Part("row", len(judged.weight), partial(_repeated, judged), update)]
    assert isinstance(recipe, Recipe)
    if about["stage"] == "sft":
        rows = read_arrays(path, SEQUENCES)
        return [_sft_part("row", rows, layout, optimizer)]
    if about["stage"] == "dpo":
        pairs, rows = read_arrays(path, (PAIRS, SEQUENCES))
        update = dpo_update(recipe.dpo, optimizer, layout)
        return _mixed_parts("pair", pairs, rows, update, layout, optimizer)
    ppo, answers = recipe.ppo, contents(recipe.ppo)
    if about["role"] == "critic":
        answers = read_arrays(path, answers)
        update = critic_update(ppo, optimizer, layout)
        return [Part("answer", len(answers.scores), partial(_repeated, answers), update)]
    answers, rows = read_arrays(path, (answers, SEQUENCES))
    update = actor_update(ppo, optimizer, layout)
    return _mixed_parts("answer", answers, rows, update, layout, optimizer)


def _mixed_parts(
    name: str, rows: Any, sft_rows: Sequences, update: Update, layout: Layout, optimizer: Any
) -> list[Part]:
    """Rows with which SFT rows are mixed, and those."""
    silent = sft_rows._replace(target=np.zeros_like(sft_rows.target))
    size = len(jax.tree.leaves(rows)[0])
    return [
        Part(name, size, lambda number: (_repeated(rows, number), silent), update),
        _sft_part("SFT row", sft_rows, layout, optimizer),
    ]


def _sft_part(name: str, rows: Sequences, layout: Layout, optimizer: Any) -> Part:
    return Part(name, len(rows.ids), partial(_repeated, rows), sft_update(optimizer, layout))


def _repeated(rows: Any, number: int) -> Any:
    """One row as often as there are rows: the shapes stay, so that one program does for all."""
    return jax.tree.map(lambda x: np.repeat(x[number : number + 1], len(x), axis=0), rows)
