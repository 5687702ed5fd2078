"""Public preference data by name: found in a directory, else downloaded into it."""

import os
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlhf.data.accounts import Accounts
from rlhf.data.files.files import FilesData, Tell, silent
from rlhf.data.filter_config import Debiasing, FilterConfig
from rlhf.data.mistakes import OnMistake
from rlhf.data.records import Splits
from sharding.errors import UserError

_HUB = "https://huggingface.co/datasets"
TIMEOUT_S = 20.0  # without a byte
# set -> where its files of comparisons are, and their names
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "hh-rlhf": (
        f"{_HUB}/Anthropic/hh-rlhf/resolve/main",
        ("harmless-base/train.jsonl.gz", "helpful-base/train.jsonl.gz"),
    ),
    "oasst1": (
        f"{_HUB}/OpenAssistant/oasst1/resolve/main",
        ("2023-04-12_oasst_ready.trees.jsonl.gz",),
    ),
    "ultrafeedback": (
        f"{_HUB}/openbmb/UltraFeedback/resolve/main",
        (
            *("evol_instruct.jsonl", "false_qa.jsonl", "flan.jsonl"),
            *("sharegpt.jsonl", "truthful_qa.jsonl", "ultrachat.jsonl"),
        ),
    ),
}


@dataclass(frozen=True)
class PublicData:
    """Comparisons that others have published."""

    name: Literal["hh-rlhf", "oasst1", "ultrafeedback"]
    # where their files are, under the names that they are published by, or are downloaded to
    directory: Path
    sft: Path | tuple[Path, ...] = ()  # conversations to imitate, of your own
    heldout_fraction: float = 0.1  # share of the distinct dialogues that is held out
    seed: int = 0  # draws which
    # directory of the tokenizer that lengths are balanced in; None: a run's own, or characters outside a run
    tokenizer: Path | None = None
    filters: FilterConfig = FilterConfig()
    mistakes: OnMistake = OnMistake.skip_all()  # such files have some

    def files(self) -> FilesData:
        """The files, which are downloaded where they are not there. Raises UserError where they cannot be had."""
        base, names = SOURCES[self.name]
        self._download({n: f"{base}/{n}" for n in names if not (self.directory / n).exists()})
        return FilesData(
            self.sft,
            tuple(self.directory / name for name in names),
            heldout_fraction=self.heldout_fraction,
            seed=self.seed,
            tokenizer=self.tokenizer,
            filters=self.filters,
            mistakes=self.mistakes,
        )

    def paths(self) -> dict[str, Path]:
        """The files to read, by "field number"."""
        return self.files().paths()

    def splits(self, tell: Tell = silent) -> Splits:
        """All records; see FilesData."""
        return self.files().splits(tell)

    def accounted(self, tell: Tell = silent) -> tuple[Splits, Accounts]:
        """See FilesData."""
        return self.files().accounted(tell)

    def undebiased(self) -> "PublicData":
        """See FilesData."""
        return replace(self, filters=replace(self.filters, balance=False, weigh="pair"))

    def debiasing(self) -> Debiasing | None:
        """See FilesData."""
        return Debiasing(self.filters, self.tokenizer)

    def _download(self, urls: dict[str, str]) -> None:
        """Not by TFDS's own manager, which goes on trying for minutes where there is no network."""
        for name, url in urls.items():
            path = self.directory / name
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with (
                    urllib.request.urlopen(url, timeout=TIMEOUT_S) as source,
                    temporary.open("wb") as target,
                ):
                    shutil.copyfileobj(source, target)
                temporary.replace(path)
            except OSError as error:  # of the network, of the server, of the disk
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                raise UserError(
                    f"{path}: cannot download {url} ({error}); fetch it yourself and put it there"
                ) from error
            finally:
                temporary.unlink(missing_ok=True)
