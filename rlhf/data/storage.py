"""Records on disk: TFDS builders that write array_record files, and reading them back.

TensorFlow is never imported: TFDS imports it only for its own tf.data readers.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import numpy as np
import tensorflow_datasets as tfds

from rlhf.data.records import Example, Preference, Prompt, Split, Splits

RecordType = type[Example] | type[Preference] | type[Prompt]
RECORD_TYPES: dict[str, RecordType] = {"sft": Example, "preferences": Preference, "prompts": Prompt}

FIELD = "record"


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
    """One builder configuration a table, with the splits `train` and `heldout`.

    A record is one JSON text, which gives the same bytes in every process; protocol buffers write the features of an
    example in an order that differs from process to process.
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
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict({FIELD: tfds.features.Text()}),
            disable_shuffling=True,  # the source has chosen the order; row numbers mean something
        )

    def _split_generators(
        self, dl_manager: Any
    ) -> dict[str, Iterator[tuple[int, dict[str, bytes]]]]:
        table: Split = getattr(self._splits(), self.builder_config.name)
        return {side: self._generate_examples(rows) for side, rows in table._asdict().items()}

    def _generate_examples(self, rows: Sequence[Any]) -> Iterator[tuple[int, dict[str, bytes]]]:
        for number, record in enumerate(rows):
            text = json.dumps(record._asdict(), ensure_ascii=False, default=_plain)
            yield number, {FIELD: text.encode("utf-8", "surrogatepass")}


def _plain(value: np.generic | Mapping[str, Any]) -> Any:
    """The Python number of a NumPy one, to the bit; a dict of any other mapping."""
    return value.item() if isinstance(value, np.generic) else dict(value)


class StoredRecords(Sequence[Any]):
    """The records of one split on disk, decoded when asked for."""

    def __init__(self, source: Any, record_type: RecordType):
        self._source = source
        self._record_type = record_type

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
        fields: dict[str, Any] = json.loads(stored[FIELD])
        fields["prompt"] = tuple(fields["prompt"])
        if "labels" in fields:
            fields["labels"] = {name: tuple(marks) for name, marks in fields["labels"].items()}
        return self._record_type(**fields)
