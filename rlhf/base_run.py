"""What every run does: streams of random numbers, data on disk, a model to start from, checkpoints."""

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from glm_jax.checkpoint import Card, card_of, load_model, load_scalar, save_model
from glm_jax.companions import tokenizer_of
from glm_jax.hf.config import Tokens, default_form
from glm_jax.keeper import Keeper
from glm_jax.model import CausalLM, init_model
from glm_jax.scalar import ScalarModel
from glm_jax.tokenizers import ChatGLM3Tokenizer, Tokenizer
from glm_jax.train import Report
from rlhf.data.accounts import Accounts
from rlhf.data.prepare import build_tables, fingerprint, open_accounts, open_tables
from rlhf.data.records import Splits
from rlhf.outdir import DATA
from rlhf.progress import NOT_KEPT, Progress
from rlhf.recipe import BaseRecipe
from rlhf.runlog import RunLog, Stage
from rlhf.stage_keeper import Training
from sharding.disk.seal import broken, digest
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import on_first, together, told_by_first


class BaseRun:
    """One run of a recipe on one mesh, which is set while it goes."""

    tokenizer: Tokenizer  # known once there is data
    accounts: Accounts  # of its records

    def __init__(
        self, recipe: BaseRecipe, layout: Layout, log: RunLog, progress: Progress = NOT_KEPT
    ) -> None:
        self.recipe = recipe
        self.layout = layout
        self.log = log
        self.progress = progress
        self.directory = recipe.output_dir

    def key(self, purpose: str) -> jax.Array:
        """A random stream of its own for each purpose."""
        return jax.random.fold_in(jax.random.key(self.recipe.seed), zlib.crc32(purpose.encode()))

    @contextlib.contextmanager
    def train(self, training: Training, total: int) -> Iterator[tuple[Stage, Keeper]]:
        """A stage of `total` steps that goes on from where it was saved."""
        with (
            self.progress.keeper(training, self.layout) as keeper,
            self.log.stage(training.name, total=total, before=keeper.count) as stage,
        ):
            yield stage, keeper

    def pausing(self, name: str, report: Report) -> Report:
        """`report`, after which a stage that is not saved on its way may stop, and is done again later."""

        def told(step: int, metrics: Mapping[str, float], tokens: int) -> None:
            report(step, metrics, tokens)
            self.progress.pause(name)

        return told

    def prepare(self, *tables: str) -> Splits:
        """These tables of the data, which the first process writes and then all read; opens their `accounts`.

        Pairs are neither balanced nor weighed yet: that is done with those that fit.
        """
        self.progress.require_same("data", told_by_first(partial(fingerprint, self.recipe.data)))
        data = self.recipe.data.undebiased()
        root = self.directory / DATA / told_by_first(partial(fingerprint, data))
        on_first(partial(build_tables, data, root, tables, self.log.note))
        self.accounts = together(partial(open_accounts, root, tables))
        return together(partial(open_tables, data, root, tables))

    def note_accounts(self) -> None:
        """Say what was left out of the data, and why: a line for each side of a table."""
        for line in self.accounts.lines():
            self.log.note(f"data: {line}")

    def require_same_models(self, **paths: Path | None) -> None:
        """Raise UserError where a model that the run is made of is no longer what it was when the run began."""
        for name, path in paths.items():
            if path is not None:
                self.progress.require_same(name, told_by_first(partial(digest, path)))

    def load_tokenizer(self, texts: Iterable[str]) -> Tokenizer:
        """The pretrained model's tokenizer, or one trained on `texts`."""
        if self.recipe.pretrained is not None:
            return tokenizer_of(self.recipe.pretrained)
        return ChatGLM3Tokenizer.train(texts, self.recipe.model.vocab_size)

    def load_model(self) -> CausalLM:
        """The pretrained model, or random weights."""
        recipe, layout = self.recipe, self.layout
        if recipe.pretrained is not None:
            return load_model(recipe.pretrained, layout, recipe.model.compute_dtype)
        return jax.jit(partial(init_model, recipe.model, layout))(self.key("init"))

    def save(self, name: str, model: CausalLM | ScalarModel) -> None:
        """A checkpoint, with the tokenizer beside it."""
        config = model.trunk.config
        if self.recipe.pretrained is None:
            tokens = Tokens(self.tokenizer.eos_id, self.tokenizer.pad_id)
            card = Card(config, default_form(config), tokens)
        else:
            card = card_of(self.recipe.pretrained)
        save_model(model, self.layout, card, self.checkpoint(name), self.tokenizer.save)

    def checkpoint(self, name: str) -> Path:
        """Where `save` puts it."""
        return self.directory / "checkpoints" / name

    def saved_model(self, name: str) -> CausalLM:
        """The model that `save` wrote. Raises UserError where it is no longer what it was."""
        on_first(partial(require_whole, self.checkpoint(name)))
        dtype = self.recipe.model.compute_dtype
        return together(partial(load_model, self.checkpoint(name), self.layout, dtype))

    def saved_scalar(self, name: str) -> ScalarModel:
        """The reward model or critic that `save` wrote. Raises UserError where it is no longer what it was."""
        on_first(partial(require_whole, self.checkpoint(name)))
        dtype = self.recipe.model.compute_dtype
        return together(partial(load_scalar, self.checkpoint(name), self.layout, dtype))

    def facts(self, model: CausalLM | ScalarModel) -> dict[str, Any]:
        """What a summary says of the run as such."""
        return {
            "seed": self.recipe.seed,
            "layout": self.recipe.layout,
            "devices": self.layout.num_devices,
            "processes": jax.process_count(),
            "mesh": self.layout.sizes,
            "parameters": sum(x.size for x in jax.tree.leaves(model)),
        }


def require_whole(checkpoint: Path) -> None:
    """Raise UserError where a file of a run's checkpoint has changed since it was written."""
    problems = broken(checkpoint)
    if problems:
        raise UserError(
            f"the run cannot go on from {checkpoint}: {problems[0]}: put the file back, or --restart begins anew"
        )
