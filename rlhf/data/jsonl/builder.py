"""The TFDS builder of a user's own JSON lines."""

import tensorflow_datasets as tfds

from rlhf.data.storage import RecordsBuilder


class Jsonl(RecordsBuilder):
    """Records of the user's own files."""

    VERSION = tfds.core.Version("1.0.0")
