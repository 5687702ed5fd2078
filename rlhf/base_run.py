"""What every run does: streams of random numbers, data on disk, a model to start from, checkpoints."""

import zlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax

from glm_jax.checkpoint import Card, card_of, companion_directory, load_model, save_model
from glm_jax.hf.config import Tokens, default_form
from glm_jax.model import CausalLM, init_model
from glm_jax.scalar import ScalarModel
from glm_jax.tokenizers import ChatGLM3Tokenizer, Tokenizer, load_tokenizer
from rlhf.data.prepare import prepare
from rlhf.data.records import Splits
from rlhf.recipe import BaseRecipe
from rlhf.runlog import RunLog
from sharding.layout import Layout
from sharding.processes import on_first, together


class BaseRun:
    """One run of a recipe on one mesh, which is set while it goes."""

    tokenizer: Tokenizer  # known once there is data

    def __init__(self, recipe: BaseRecipe, layout: Layout, log: RunLog) -> None:
        self.recipe = recipe
        self.layout = layout
        self.log = log
        self.directory = recipe.output_dir

    def key(self, purpose: str) -> jax.Array:
        """A random stream of its own for each purpose."""
        return jax.random.fold_in(jax.random.key(self.recipe.seed), zlib.crc32(purpose.encode()))

    def prepare(self, *tables: str) -> Splits:
        """These tables of the data, which the first process writes and then all read."""
        work = partial(prepare, self.recipe.data, self.directory / "data", tables, self.log.note)
        written = on_first(work)
        return together(lambda: written or work())

    def load_tokenizer(self, texts: Iterable[str]) -> Tokenizer:
        """The pretrained model's tokenizer, or one trained on `texts`."""
        if self.recipe.pretrained is not None:
            return load_tokenizer(companion_directory(self.recipe.pretrained))
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
        directory = self.directory / "checkpoints" / name
        save_model(model, self.layout, card, directory, self.tokenizer.save)

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
