"""The TFDS builder of the reviews."""

import tensorflow_datasets as tfds

from rlhf.data.storage import RecordsBuilder


class Reviews(RecordsBuilder):
    """Chinese product reviews: openings as prompts, praise preferred to blame."""

    VERSION = tfds.core.Version("2.0.0")
