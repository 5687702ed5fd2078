"""Hugging Face directories into checkpoints and back, one tensor at a time, whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.checkpoint import DTYPES, Card, card_of, keys_of, open_source
from glm_jax.companions import check_companions
from glm_jax.config import Head
from glm_jax.hf.classifier import classifier_fields
from glm_jax.hf.config import Form, to_hf
from glm_jax.hf.tables import (
    BLOCK,
    BUFFERS,
    Row,
    num_parameters,
    table,
    tensor_names,
    tensor_shape,
    weight_shapes,
)
from glm_jax.hf.tensors import Source, join, load_weights, make_buffers
from glm_jax.weights import kept_layout
from sharding import checkpoint
from sharding.disk.directory import explained, new_directory
from sharding.disk.find import INDEXES, find_tensors
from sharding.disk.manifest import (
    Entry,
    differing,
    hash_tensors,
    read_entries,
    write_entries,
    write_manifest,
)
from sharding.disk.paths import absolute
from sharding.disk.scratch import Scratch
from sharding.disk.writer import ShardWriter, Spec
from sharding.errors import UserError
from sharding.layout import Layout

# what a repository holds beside weights: configs, tokenizers, remote code, licences, model cards
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md", "*LICENSE*")
OURS = {"manifest.json", *INDEXES}
THREADS = 2  # one reads while another computes; each holds one layer of one tensor
Tell = Callable[[str], None]


def import_hf(directory: Path, out: Path, dtype: str, layout: Layout | None, tell: Tell) -> None:
    """A Hugging Face directory becomes the checkpoint `out`, whole or not at all. Raises UserError.

    Args:
        directory: holds config.json and weights.
        out: must not exist.
        dtype: a key of DTYPES.
        layout: split the model over the current mesh while converting; None: one tensor of one layer at a time on
            the host.
        tell: receives what is worth knowing, a line at a time.
    """
    source = open_source(directory)
    check_companions(directory)
    wanted = DTYPES[dtype]
    card = card_of(directory)
    count = num_parameters(source.config, source.head)
    check_space(out, count * (wanted or _dtype_of(source)).itemsize)
    with new_directory(out) as partial_directory:
        weights = partial_directory / "weights"
        if layout is None:
            entries = _stream(source, wanted, weights)
        else:
            source.config.check(layout)
            checkpoint.save(
                weights, load_weights(source, kept_layout(layout, source.config), wanted)
            )
            entries = hash_tensors(source.tensors, THREADS)
        card.write(partial_directory)
        _keep_companions(directory, source, partial_directory / "hf")
        _check_copies(source, entries)
        write_entries(partial_directory / "import.json", entries)
    tell(f"{out}: {count:,} parameters of {source.form.value}, {source.head.value} head")


def _dtype_of(source: Source) -> np.dtype:
    name, _, _ = next(tensor_names(source.config, source.form, source.head))
    return source.tensors[name].dtype


def check_space(path: Path, wanted: int) -> None:
    """Raise UserError where the file system of `path` has no room for `wanted` bytes."""
    existing = next(parent for parent in absolute(path).parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise UserError(
            f"cannot write {path}: {wanted / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: "
            f"make room or write elsewhere"
        )


def _stream(source: Source, dtype: np.dtype | None, path: Path) -> dict[str, Entry]:
    """Read, turn and write one tensor of one layer at a time; returns the hashes of what was read."""
    config, entries = source.config, dict[str, Entry]()
    arrays, stacked = {}, set()
    for name, shape in weight_shapes(config, source.head).items():
        kind = dtype or source.stored(name, 0).dtype
        if name.startswith(BLOCK):
            shape = (1, config.num_layers, *shape)
            stacked.add(keys_of(name))
        arrays[keys_of(name)] = jax.ShapeDtypeStruct(shape, kind)
    leaves = checkpoint.create(path, arrays, stacked)
    scratch = Scratch()

    def move(name: str, row: Row, layer: int) -> None:
        if name not in source.tensors or row.bias:
            return  # a second copy that was not saved, or no weight
        weights, entries[name] = source.split(row, layer, scratch)
        if row.copy:
            return
        for piece, weight in zip(row.pieces, weights, strict=True):
            keys = keys_of(piece.path)
            index = (0, layer) if row.per_layer else ()
            leaves[keys].write(weight.astype(arrays[keys].dtype, copy=False), *index)

    _in_threads(move, tensor_names(config, source.form, source.head))
    others = {name: t for name, t in source.tensors.items() if name not in entries}
    entries |= hash_tensors(others)
    return {name: entries[name] for name in source.tensors}


def _in_threads(work: Callable[..., None], jobs: Iterable[tuple[Any, ...]]) -> None:
    """Do all jobs; the first error ends them, and is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures: list[Future[None]] = [pool.submit(work, *job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _keep_companions(directory: Path, source: Source, to: Path) -> None:
    with explained(to):
        to.mkdir()
        for path in companions(directory):
            shutil.copyfile(path, to / path.name)
        buffers = [t for name, t in source.tensors.items() if BUFFERS.fullmatch(name)]
        if not buffers:
            return
        (to / "buffers").mkdir()
        specs = [Spec(t.name, t.dtype, t.shape) for t in buffers]
        with ShardWriter(to / "buffers", specs) as writer:
            for stored in buffers:
                writer.put(stored.name, stored.read())


def companions(directory: Path) -> list[Path]:
    """The files of a repository that are neither weights nor an index of them."""
    found = {path for pattern in COMPANIONS for path in directory.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name not in OURS)


def _check_copies(source: Source, entries: Mapping[str, Entry]) -> None:
    """Raise UserError where a second copy of a weight is another one: the original ties them when it loads."""
    rows = table(source.config, source.form, source.head)
    for row in rows:
        if not row.copy or row.tensor not in entries:
            continue
        held = next(r.tensor for r in rows if r.pieces == row.pieces and not r.copy)
        if entries[row.tensor].sha256 != entries[held].sha256:
            raise UserError(
                f"{source.tensors[row.tensor].path}: {row.tensor} is not equal to {held}, which the model uses "
                f"in its place: the checkpoint was not saved by the original code"
            )


def export_hf(
    directory: Path,
    out: Path,
    form: Form | None,
    dtype: str,
    max_shard_bytes: int | None,
    tell: Tell,
) -> None:
    """A checkpoint becomes the Hugging Face directory `out`, whole or not at all. Raises UserError.

    Args:
        directory: a checkpoint.
        out: must not exist.
        form: None: the one it came in.
        dtype: a key of DTYPES.
        max_shard_bytes: a weight file does not grow larger, unless a single tensor does.
        tell: receives what is worth knowing, a line at a time.
    """
    card = Card.read(directory)
    form = form or card.form
    weights = directory / "weights"
    stored = checkpoint.shapes(weights)
    kinds = {
        name: DTYPES[dtype] or np.dtype(stored[keys_of(name)].dtype)
        for name in weight_shapes(card.config, card.head)
    }
    buffers = _buffers(directory, card, form, kinds[".trunk.embedding"])
    origin = _imported(directory) if form is card.form else {}
    specs = _specs(card, form, kinds, buffers, list(origin))
    check_space(out, sum(spec.nbytes for spec in specs))
    original = directory / "hf" / "config.json"
    config_text = _config_text(card, form, kinds[".trunk.embedding"], original)
    with new_directory(out) as partial_directory:
        with ShardWriter(partial_directory, specs, max_shard_bytes) as writer:
            for name, buffer in buffers.items():
                writer.put(name, buffer)
            _write_tensors(card, form, kinds, weights, writer)
        with explained(partial_directory):
            for path in companions(directory / "hf"):
                if path.name != "config.json" and (form is card.form or path.suffix != ".py"):
                    shutil.copyfile(path, partial_directory / path.name)
            (partial_directory / "config.json").write_bytes(config_text)
        write_manifest(partial_directory, writer.entries)
    _compare(out, writer.entries, origin, tell)


def _imported(directory: Path) -> dict[str, Entry]:
    """Hashes of the tensors that the checkpoint was made of; none where it was trained here."""
    path = directory / "import.json"
    return read_entries(path) if path.exists() else {}


def _buffers(directory: Path, card: Card, form: Form, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The original's buffers where it had some, else those that follow from the shape."""
    kept = directory / "hf" / "buffers"
    if form is card.form and kept.exists():
        return {name: stored.read() for name, stored in find_tensors(kept).items()}
    if form is card.form and (directory / "import.json").exists():
        return {}  # the original came without
    return make_buffers(card.config, form, dtype)


def _specs(
    card: Card,
    form: Form,
    kinds: Mapping[str, np.dtype],
    buffers: Mapping[str, np.ndarray],
    order: list[str],
) -> list[Spec]:
    """What is written, in the order of the original where it is known."""
    specs = {
        name: Spec(name, kinds[row.pieces[0].path], tensor_shape(row, card.config, card.head))
        for name, row, _ in tensor_names(card.config, form, card.head)
    }
    specs |= {name: Spec(name, buffer.dtype, buffer.shape) for name, buffer in buffers.items()}
    known = [specs[name] for name in order if name in specs]
    return known + [spec for name, spec in specs.items() if name not in order]


def _config_text(card: Card, form: Form, dtype: np.dtype, original: Path) -> bytes:
    """The original config.json byte for byte where it still describes the model, else one in its field order."""
    if form is card.form and original.exists():
        fields = json.loads(original.read_text(encoding="utf-8"))
        name = "dtype" if "dtype" in fields else "torch_dtype"  # transformers 4.56 has renamed it
        if fields.get(name) == dtype.name:
            return original.read_bytes()
        fields[name] = dtype.name
    else:
        fields = to_hf(card.config, form, dtype.name, card.tokens)
        if card.head is Head.SCALAR:
            fields = classifier_fields(fields, form)
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _write_tensors(
    card: Card, form: Form, kinds: Mapping[str, np.dtype], weights: Path, writer: ShardWriter
) -> None:
    """One layer of one tensor at a time."""
    scratch = Scratch()
    names = weight_shapes(card.config, card.head)
    leaves = {name: checkpoint.open_leaf(weights, keys_of(name)) for name in names}

    def move(name: str, row: Row, layer: int) -> None:
        index = (0, layer) if row.per_layer else ()
        dtype = kinds[row.pieces[0].path]
        parts = [
            (part.astype(dtype, copy=False) for part in leaves[piece.path].read_chunks(*index))
            for piece in row.pieces
        ]
        writer.put(name, join(row, card.config, card.head, parts, dtype, scratch))

    _in_threads(move, tensor_names(card.config, form, card.head))


def _compare(
    out: Path, entries: Mapping[str, Entry], origin: Mapping[str, Entry], tell: Tell
) -> None:
    tell(f"{out}: {len(entries)} tensors, hashes in manifest.json")
    if origin:
        changed = differing(entries, origin)
        same = len(set(entries) | set(origin)) - len(changed)
        first = f", {changed[0]} is the first that is not" if changed else ""
        tell(f"{same} of {len(origin)} tensors are byte for byte those that were imported{first}")
