"""Records on disk: TFDS builders that write array_record files, and reading them back.

TensorFlow is never imported: TFDS imports it only for its own tf.data readers.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, get_type_hints, overload

import numpy as np
import tensorflow_datasets as tfds

from rlhf.data.records import Example, Preference, Prompt, Split, Splits

RecordType = type[Example] | type[Preference] | type[Prompt]
RECORD_TYPES: dict[str, RecordType] = {"sft": Example, "preferences": Preference, "prompts": Prompt}


# of another type: JSON; of numbers too, because TFDS writes float64 with the precision of float32
_FEATURES = {str: tfds.features.Text(), bool: np.bool_}
# what JSON makes a list of -> the record's own type
_DECODED: dict[str, Callable[[Any], Any]] = {
    "prompt": tuple,
    "labels": lambda labels: {name: tuple(numbers) for name, numbers in labels.items()},
}


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
    """One builder configuration a table, with the splits `train` and `heldout`.

    A field is a text or a truth; all else is JSON, because a conversation as nested features is
    written and read several times slower.
    """

    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="sft", description="conversations to imitate"),
        tfds.core.BuilderConfig(name="preferences", description="pairs of answers to a prompt"),
        tfds.core.BuilderConfig(name="prompts", description="prompts to answer"),
    ]

    def __init__(self, *, splits: Callable[[], Splits], **kwargs: Any):
        """Args: `splits` gives the records; it is called only when they are not on disk yet."""
        self._splits = splits
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        record = RECORD_TYPES[self.builder_config.name]
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    name: _FEATURES.get(kind, _FEATURES[str])
                    for name, kind in get_type_hints(record).items()
                }
            ),
            disable_shuffling=True,  # the source has chosen the order; row numbers mean something
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        table: Split = getattr(self._splits(), self.builder_config.name)
        return {side: self._generate_examples(rows) for side, rows in table._asdict().items()}

    def _generate_examples(self, rows: Sequence[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        names = _json_fields(RECORD_TYPES[self.builder_config.name])
        for number, record in enumerate(rows):
            fields = record._asdict()
            for name in names:
                value = dict(fields[name]) if name == "labels" else fields[name]
                fields[name] = json.dumps(value, ensure_ascii=False)
            yield number, fields


def _json_fields(record_type: RecordType) -> list[str]:
    """Fields that no feature holds as they are."""
    return [name for name, kind in get_type_hints(record_type).items() if kind not in _FEATURES]


class StoredRecords(Sequence[Any]):
    """The records of one split on disk, decoded when asked for."""

    def __init__(self, source: Any, record_type: RecordType):
        self._source = source
        self._record_type = record_type
        self._json = _json_fields(record_type)

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Any]:
        """All records; read in one go, which is faster than one by one."""
        yield from map(self._decode, self._source.__getitems__(range(len(self))))

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._decode(self._source[index % len(self)])

    def _decode(self, stored: Mapping[str, Any]) -> Any:
        fields: dict[str, Any] = {
            name: value.decode() if isinstance(value, bytes) else np.asarray(value).item()
            for name, value in stored.items()
        }
        for name in self._json:
            fields[name] = _DECODED.get(name, lambda value: value)(json.loads(fields[name]))
        return self._record_type(**fields)
