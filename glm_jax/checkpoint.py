"""Checkpoints: a model on disk, in a form that knows no layout.

A checkpoint is a directory:

    model.json   the shape, the head, the form it came in, its special tokens
    weights/     the Orbax tree of a CausalLM or a ScalarModel, its layers [1, layer, ...]
    seal.json    a hash of every file, where a run wrote it
    hf/          what the original repository holds beside its weights: config.json, tokenizer files, ...
    hf/buffers/  its tensors that are no parameters
    import.json  a hash of every tensor that was read, where they were kept as they are
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from glm_jax.config import Config, GLMConfig, GLMV1Config, Head
from glm_jax.hf.classifier import read_head
from glm_jax.hf.config import RELEASED_TOKENS, Form, Tokens, form_of, from_hf, read_fields
from glm_jax.hf.tables import BLOCK, check_tensors, weight_shapes
from glm_jax.hf.tensors import Source, check_biases, load_weights
from glm_jax.model import CausalLM
from glm_jax.scalar import INIT, ScalarModel, head_of
from glm_jax.weights import from_kept, kept_layout, to_kept
from sharding import checkpoint
from sharding.disk.directory import new_directory, write_json
from sharding.disk.find import find_tensors
from sharding.disk.seal import seal
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import is_first, shared_directory

DTYPES: Mapping[str, np.dtype | None] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "keep": None,
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a checkpoint's model.json says."""

    config: Config
    form: Form
    tokens: Tokens
    head: Head = Head.VOCABULARY

    def write(self, directory: Path) -> None:
        """Write model.json."""
        fields = dataclasses.asdict(self.config)
        del fields["compute_dtype"]  # of a run, not of a model
        card = {
            "architecture": type(self.config).__name__,
            "config": fields,
            "head": self.head.value,
            "form": self.form.name,
            "tokens": dataclasses.asdict(self.tokens),
        }
        write_json(directory / "model.json", card)

    @classmethod
    def read(cls, directory: Path) -> "Card":
        """Read model.json. Raises UserError where it is missing or not what `write` writes."""
        path = directory / "model.json"
        architectures: Mapping[str, type[Config]] = {
            "GLMConfig": GLMConfig,
            "GLMV1Config": GLMV1Config,
        }
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            config = architectures[card["architecture"]](**card["config"])
            head = Head(card.get("head", Head.VOCABULARY.value))  # the only one there was at first
            return cls(config, Form[card["form"]], Tokens(**card["tokens"]), head)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; give a checkpoint") from None
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is no description of a model ({reason})") from None


def is_checkpoint(directory: Path) -> bool:
    """Whether this is one of our checkpoints, not a Hugging Face directory."""
    try:
        return (directory / "model.json").exists()
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}") from None


def card_of(directory: Path) -> Card:
    """What a checkpoint or a Hugging Face directory holds. Raises UserError."""
    if is_checkpoint(directory):
        return Card.read(directory)
    fields, where = read_fields(directory), str(directory / "config.json")
    config, form = from_hf(fields, where), form_of(fields, where)
    released = RELEASED_TOKENS[form]
    tokens = Tokens(
        fields.get("eos_token_id", released.eos), fields.get("pad_token_id", released.pad)
    )
    return Card(config, form, tokens, read_head(fields, where))


def companion_directory(directory: Path) -> Path:
    """Where the tokenizer files of a checkpoint or a Hugging Face directory are."""
    return directory / "hf" if is_checkpoint(directory) else directory


def read_shape(directory: Path) -> Config:
    """The shape of the language model in a checkpoint or a Hugging Face directory. Raises UserError."""
    return card_with(directory, Head.VOCABULARY).config


def card_with(directory: Path, head: Head) -> Card:
    """`card_of` a model with this head. Raises UserError where it has the other one."""
    card = card_of(directory)
    if card.head is head:
        return card
    if head is Head.SCALAR:
        raise UserError(
            f"{directory} holds a language model, which scores nothing: give a model with a scalar head, such as "
            f"checkpoints/reward of a run"
        )
    raise UserError(
        f"{directory} holds a scalar head (a reward model or critic), which writes no text: give a language model, "
        f"such as checkpoints/sft or checkpoints/ppo of a run"
    )


def check_weights(directory: Path, head: Head) -> Card:
    """`card_with`, where the weights are there and have the shapes that they should; reads headers alone.

    Raises UserError.
    """
    card = card_with(directory, head)
    if not is_checkpoint(directory):
        open_source(directory)
        return card
    stored, wanted = checkpoint.shapes(directory / "weights"), stored_shapes(card)
    for keys, shape in wanted.items():
        found = stored[keys].shape if keys in stored else "none"
        if found != shape:
            raise UserError(
                f"{directory}: the shape of {'.'.join(keys)} is {found}, model.json wants {shape}"
            )
    return card


def stored_shapes(card: Card) -> dict[checkpoint.Keys, tuple[int, ...]]:
    """Shapes of the arrays of a checkpoint: layers [1, layer, ...], a vocabulary without padding."""
    return {
        keys_of(path): (1, card.config.num_layers, *shape) if path.startswith(BLOCK) else shape
        for path, shape in weight_shapes(card.config, card.head).items()
    }


def open_source(directory: Path) -> Source:
    """The tensors of a Hugging Face directory, checked against its config.json. Raises UserError."""
    card = card_of(directory)
    tensors = find_tensors(directory)
    shapes = {name: stored.shape for name, stored in tensors.items()}
    check_tensors(card.config, card.form, card.head, shapes, str(directory))
    source = Source(card.config, card.form, card.head, tensors)
    check_biases(source)
    return source


def load_model(
    directory: Path, layout: Layout, compute_dtype: str, dtype: str = "float32"
) -> CausalLM:
    """The model of a checkpoint or a Hugging Face directory, split as `layout` says on the current mesh.

    `compute_dtype` is that of matrix products, of a run and not of a model; `dtype` that of the weights ("keep": as
    stored). Raises UserError.
    """
    model: CausalLM = _load(directory, Head.VOCABULARY, layout, compute_dtype, dtype)
    return model


def load_scalar(
    directory: Path, layout: Layout, compute_dtype: str, dtype: str = "float32"
) -> ScalarModel:
    """`load_model` of a reward model or critic. Raises UserError."""
    model: ScalarModel = _load(directory, Head.SCALAR, layout, compute_dtype, dtype)
    return model


def _load(directory: Path, head: Head, layout: Layout, compute_dtype: str, dtype: str) -> Any:
    wanted = DTYPES[dtype]
    card = card_with(directory, head)
    if not is_checkpoint(directory):
        source = open_source(directory)
        config = dataclasses.replace(source.config, compute_dtype=compute_dtype)
        config.check(layout)
        return load_weights(dataclasses.replace(source, config=config), layout, wanted)
    config = dataclasses.replace(card.config, compute_dtype=compute_dtype)
    config.check(layout)
    stored = checkpoint.shapes(directory / "weights")
    flat = kept_layout(layout, config)

    def typed(path: tuple[jax.tree_util.KeyEntry, ...], x: Any) -> Any:
        keys = keys_of(jax.tree_util.keystr(path))
        if keys not in stored:
            raise UserError(f"{directory}: {'.'.join(keys)} is not among its weights")
        return jax.ShapeDtypeStruct(x.shape, wanted or stored[keys].dtype, sharding=x.sharding)

    like = jax.tree_util.tree_map_with_path(typed, _shapes(config, head, flat))
    model = checkpoint.restore(directory / "weights", like)
    return jax.jit(partial(from_kept, layout=layout), donate_argnums=0)(model)


def save_model(
    model: CausalLM | ScalarModel,
    layout: Layout,
    card: Card,
    directory: Path,
    save_tokenizer: Callable[[Path], Any],
) -> None:
    """Write a checkpoint of a model that lies on the current mesh as `layout` says; whole or not at all.

    The model says which head it has, whatever `card` says.
    Every process of a run must call it, with a directory that all of them share.
    """
    card = dataclasses.replace(card, head=head_of(model))
    model = jax.jit(partial(to_kept, layout=layout))(model)
    with shared_directory(directory, replace=True) as partial_directory:
        checkpoint.save(partial_directory / "weights", model)
        if is_first():
            card.write(partial_directory)
            (partial_directory / "hf").mkdir()
            save_tokenizer(partial_directory / "hf")
            seal(partial_directory)


def resave(directory: Path, layout: Layout, out: Path) -> None:
    """Copy a checkpoint by way of the current mesh, so that its files are the shards of `layout`. Raises UserError."""
    if out.exists():
        raise UserError(f"{out} exists already: choose another name or remove it")
    card = Card.read(directory)
    load = load_scalar if card.head is Head.SCALAR else load_model
    model = load(directory, layout, "float32", dtype="keep")

    def copy_companions(hf: Path) -> None:
        shutil.copytree(directory / "hf", hf, dirs_exist_ok=True)

    save_model(model, layout, card, out, copy_companions)


def extract(state: Path, prefix: checkpoint.Keys, like: Path, head: Head, out: Path) -> None:
    """The model at `prefix` of the Orbax tree `state` as a checkpoint, one array at a time on the host.

    Its card, but for the head, and its companions are those of the checkpoint `like`. Raises UserError.
    """
    found = {
        keys[len(prefix) :]: shape
        for keys, shape in checkpoint.shapes(state).items()
        if keys[: len(prefix)] == prefix
    }
    if not found:
        raise UserError(f"{state} holds no {'.'.join(prefix)}")
    card = dataclasses.replace(Card.read(like), head=head)
    with new_directory(out) as partial_directory:
        stacked = [keys for keys in found if "blocks" in keys]
        leaves = checkpoint.create(partial_directory / "weights", found, stacked)
        for keys, leaf in leaves.items():
            leaf.write(checkpoint.open_leaf(state, (*prefix, *keys)).read())
        card.write(partial_directory)
        shutil.copytree(like / "hf", partial_directory / "hf")
        seal(partial_directory)


def _shapes(config: Config, head: Head, layout: Layout) -> CausalLM | ScalarModel:
    return jax.eval_shape(partial(INIT[head], config, layout), jax.random.key(0))


def keys_of(path: str) -> checkpoint.Keys:
    """(".trunk.embedding") -> ("trunk", "embedding")."""
    return tuple(path.strip(".").split("."))
