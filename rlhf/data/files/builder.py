"""The TFDS builder of a user's own files."""

import tensorflow_datasets as tfds

from rlhf.data.storage import RecordsBuilder


class Files(RecordsBuilder):
    """Records of the user's own files."""

    VERSION = tfds.core.Version("3.0.0")
