"""The TFDS builder of the oracle's world."""

import tensorflow_datasets as tfds

from rlhf.data.storage import RecordsBuilder


class Oracle(RecordsBuilder):
    """Requests for words, answers of words, and judgements of annotators whose faults are known."""

    VERSION = tfds.core.Version("2.0.0")
