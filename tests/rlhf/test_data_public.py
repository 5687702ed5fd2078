"""Public data sets: from a directory, from a server, and what is said where there is neither."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import public
from rlhf.data.prepare import prepare
from rlhf.data.public import SOURCES, PublicData
from sharding.errors import UserError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory and the address that serves it."""
    root = tmp_path / "server"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def write(root: Path, name: str, first: int) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "chosen": f"\n\nHuman: ask {i}\n\nAssistant: well",
            "rejected": f"\n\nHuman: ask {i}\n\nAssistant: ill!",
        }
        for i in range(first, first + 20)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def test_files_are_found_or_downloaded_once(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, address = served
    names = SOURCES["hh-rlhf"][1]
    monkeypatch.setitem(public.SOURCES, "hh-rlhf", (address, names))
    directory = tmp_path / "data"
    write(directory, names[0], 0)  # there already
    write(root, names[1], 20)
    data = PublicData("hh-rlhf", directory, heldout_fraction=0.3)
    splits = prepare(data, tmp_path / "prepared", ["preferences"])
    found = {str(r.prompt[0]["content"]) for side in splits.preferences for r in side}
    assert found == {f"ask {i}" for i in range(40)}
    (root / names[1]).unlink()
    again = prepare(data, tmp_path / "prepared", ["preferences"])
    assert list(again.preferences.train) == list(splits.preferences.train)


def test_what_cannot_be_had_is_said_in_one_line(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(public.SOURCES, "oasst1", (served[1], SOURCES["oasst1"][1]))
    with pytest.raises(
        UserError, match=r"2023.*gz: cannot download .*404.*; fetch it yourself"
    ) as caught:
        PublicData("oasst1", tmp_path).paths()
    assert "\n" not in str(caught.value)
