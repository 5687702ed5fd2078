"""What tensors a Hugging Face directory holds, in whichever format."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from sharding.disk import safetensors_file, torch_bin
from sharding.disk.stored import Stored
from sharding.errors import UserError

Reader = Callable[[Path], dict[str, Stored]]
# whole file, files of several, index; the first format of which a file exists is read
FORMATS: tuple[tuple[str, str, str, Reader], ...] = (
    (
        "model.safetensors",
        "*.safetensors",
        "model.safetensors.index.json",
        safetensors_file.read_header,
    ),
    (
        "pytorch_model.bin",
        "pytorch_model*.bin",
        "pytorch_model.bin.index.json",
        torch_bin.read_index,
    ),
)
INDEXES = tuple(index for _, _, index, _ in FORMATS)


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Name -> tensor of all weight files of a directory; only headers are read.

    Where an index exists it decides which files count. Raises UserError, naming file and tensor, for files that are
    missing, damaged, or that contradict the index or each other.
    """
    for whole, pattern, index, read in FORMATS:
        if (directory / index).exists():
            return _by_index(directory, directory / index, read)
        files = sorted(directory.glob(pattern))
        if (directory / whole) in files:
            files = [directory / whole]
        if files:
            return _merged(files, read)
    raise UserError(
        f"no weights in {directory}: expected *.safetensors or pytorch_model*.bin files"
    )


def weight_files(directory: Path) -> list[Path]:
    """The files that `find_tensors` reads."""
    return sorted({tensor.path for tensor in find_tensors(directory).values()})


def _merged(files: list[Path], read: Reader) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for path in files:
        for name, tensor in read(path).items():
            if name in tensors:
                raise UserError(f"tensor {name} is in {tensors[name].path} and in {path}: keep one")
            tensors[name] = tensor
    return tensors


def _by_index(directory: Path, index: Path, read: Reader) -> dict[str, Stored]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise ValueError("weight_map is empty")
        shards = {name: Path(str(shard)) for name, shard in weight_map.items()}
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{index}: not an index of weight files: {error}") from None
    for name, shard in shards.items():
        if shard.name != str(shard):
            raise UserError(f"{index}: tensor {name} is placed outside the directory: {shard}")
        if not (directory / shard).exists():
            raise UserError(
                f"{index}: shard {shard}, which holds tensor {name}, is missing: fetch it"
            )
    found = {shard: read(directory / shard) for shard in sorted(set(shards.values()))}
    for shard, tensors in found.items():
        for name in tensors:
            if shards.get(name) != shard:
                raise UserError(
                    f"{directory / shard}: tensor {name} is not placed there by {index.name}"
                )
    for name, shard in shards.items():
        if name not in found[shard]:
            raise UserError(
                f"{directory / shard}: tensor {name} is missing, {index.name} places it there"
            )
    return {name: found[shard][name] for name, shard in shards.items()}
