"""Every form is told from its fields and read to the same records; every mistake has a kind and a place."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.forms.ours import line_of
from rlhf.data.mistakes import OnMistake, Tally
from rlhf.data.reading import read_records
from rlhf.data.records import Comparison, Example
from sharding.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALK = (user("hi"), assistant("hello"), user("how?"))
RATED = {"helpfulness": {"Rating": "5", "Rationale": "x"}, "honesty": {"Rating": "N/A"}}
CASES: list[tuple[dict[str, Any], list[Any]]] = [
    (
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: hello",
            "rejected": "\n\nHuman: hi\n\nAssistant: bye",
        },
        [Comparison((user("hi"),), ("hello", "bye"), (1, 2))],
    ),
    (
        {
            "prompt": "how?",
            "prompt_id": "1",
            "messages": [],
            "score_chosen": 1.0,
            "score_rejected": 0.0,
            "chosen": [*TALK, assistant("well")],
            "rejected": [*TALK, assistant("ill")],
        },
        [Comparison(TALK, ("well", "ill"), (1, 2), {"score": (1.0, 0.0)})],
    ),
    (
        {
            "instruction": "how?",
            "input": "",
            "output": ["a", "b", "c"],
            "history": [["hi", "hello"]],
        },
        [Comparison(TALK, ("a", "b", "c"), (1, 2, 3))],
    ),
    (
        {"instruction": "add", "input": "1 2", "output": "3"},
        [Example((user("add\n1 2"),), "3")],
    ),
    (
        {
            "idx": 0,
            "motivation_app": "Gmail",
            "cmp_key": "x",
            "instruction": "add",
            "input": "",
            "response1": "1",
            "response2": "2",
            "annotator1": 1,
            "annotator2": 2,
            "annotator3": 0,
        },
        [
            Comparison(
                (user("add"),), ("1", "2"), ranks, {}, f"annotator{i + 1}", "Gmail", listed=True
            )
            for i, ranks in enumerate([(1, 2), (2, 1), (1, 1)])
        ],
    ),
    (
        {"input": "add", "output_1": "1", "output_2": "2", "label": 2},
        [Comparison((user("add"),), ("1", "2"), (2, 1), listed=True)],
    ),
    (
        {
            "source": "flan",
            "instruction": "add",
            "models": ["m", "n"],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
            "completions": [
                {
                    "response": "1",
                    "overall_score": 9.0,
                    "annotations": {"helpfulness": {"Rating": "3"}},
                },
                {"response": "2", "overall_score": 1.0, "annotations": RATED},
            ],
        },
        [
            Comparison(
                *((user("add"),), ("1", "2"), (2, 1), {"helpfulness": (3.0, 5.0)}, "", "flan"),
                listed=True,
            )
        ],
    ),
    (
        {
            "message_tree_id": "1",
            "tree_state": "ready",
            "prompt": {
                "role": "prompter",
                "text": "hi",
                "lang": "en",
                "replies": [
                    {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
                    {
                        "role": "assistant",
                        "text": "hello",
                        "rank": 0,
                        "replies": [
                            {
                                "role": "prompter",
                                "text": "how?",
                                "replies": [
                                    {"role": "assistant", "text": "well", "rank": 0},
                                    {"role": "assistant", "text": "unranked", "rank": None},
                                    {"role": "assistant", "text": "ill", "rank": 1},
                                ],
                            }
                        ],
                    },
                ],
            },
        },
        [
            Comparison((user("hi"),), ("worse", "hello"), (2, 1), {}, "", "en", listed=True),
            Comparison(TALK, ("well", "ill"), (1, 2), listed=True),
        ],
    ),
    (
        {
            "id": "1",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "hello"},
                {"from": "human", "value": "how?"},
                {"from": "gpt", "value": "well"},
            ],
        },
        [Example(TALK, "well")],
    ),
    (
        {"prompt": "add", "chosen": "2", "rejected": "1", "annotator": "a", "task": "math"},
        [Comparison((user("add"),), ("2", "1"), (1, 2), {}, "a", "math")],
    ),
]


def read(path: Path, policy: OnMistake | None = None) -> tuple[list[Any], Tally]:
    tally = Tally(policy or OnMistake())
    return [record for _, record in read_records([path], tally)], tally


@pytest.mark.parametrize(("entry", "records"), CASES)
@pytest.mark.parametrize("kind", ["lines", "array", "gzip"])
def test_every_form_is_told_and_read(
    tmp_path: Path, entry: dict[str, Any], records: list[Any], kind: str
) -> None:
    text = json.dumps([entry, entry], indent=1) if kind == "array" else f"{json.dumps(entry)}\n" * 2
    path = tmp_path / "data"
    path.write_bytes(gzip.compress(text.encode()) if kind == "gzip" else text.encode())
    assert read(path)[0] == records * 2


@pytest.mark.parametrize(("entry", "records"), CASES)
def test_what_is_written_in_our_form_is_read_back(
    tmp_path: Path, entry: dict[str, Any], records: list[Any]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line_of(record)) for record in records), encoding="utf-8")
    assert read(path)[0] == records


TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: hello"


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (b'{"prompt": "\xff"}', "unreadable", "not UTF-8 (byte 12 of the line)"),
        ("é".encode("latin-1"), "unreadable", "not UTF-8 (byte 0 of the line)"),
        (b"{", "unreadable", "malformed JSON"),
        (b"3", "unreadable", "not a JSON object"),
        (b'{"prompt": "' + b"x" * 2**21 + b'"}', "unreadable", "a line of 2,097,167 bytes"),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}, "equal", "the same text"),
        (
            {"chosen": TRANSCRIPT, "rejected": "\n\nHuman: ho\n\nAssistant: bye"},
            "prompt_differs",
            "answer different prompts",
        ),
        ({"chosen": TRANSCRIPT, "rejected": "\n\nHuman: hi"}, "malformed", "does not end with"),
        ({"chosen": TRANSCRIPT, "rejected": "hi"}, "malformed", "does not begin with"),
        ({"chosen": TRANSCRIPT, "rejected": f"{TRANSCRIPT}\n\nAssistant: "}, "prompt_differs", ""),
        (
            {"chosen": TRANSCRIPT, "rejected": "\n\nHuman: hi\n\nAssistant: "},
            "empty",
            "empty response",
        ),
        ({"chosen": TRANSCRIPT}, "malformed", "field 'rejected' is missing"),
        ({"chosen": TRANSCRIPT, "rejected": 3}, "malformed", "neither a transcript nor a list"),
        (
            {"chosen": TRANSCRIPT, "rejected": "x", "more": 1},
            "unknown_field",
            "unknown field 'more'",
        ),
    ],
)
def test_a_mistake_is_named_counted_and_skipped_or_refused(
    tmp_path: Path, entry: Any, kind: str, message: str
) -> None:
    good = {"chosen": TRANSCRIPT, "rejected": "\n\nHuman: hi\n\nAssistant: bye"}
    lines = [json.dumps(good).encode()] * 2
    lines.insert(1, entry if isinstance(entry, bytes) else json.dumps(entry).encode())
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    policy = OnMistake(max_entry_mib=1.0)
    with pytest.raises(UserError) as caught:
        read(path, policy)
    assert f"{path}:2: " in str(caught.value) and message in str(caught.value)
    assert f"{kind} = skip" in str(caught.value)
    told: list[dict[str, str]] = []
    skip = OnMistake(
        **{**vars(OnMistake.skip_all()), "max_entry_mib": 1.0, "unknown_field": "skip"}
    )
    tally = Tally(skip, told.append)
    assert len(list(read_records([path], tally))) == 2 == tally.read
    assert tally.skipped == Counter({kind: 1}) and told[0]["where"] == f"{path}:2"


def test_a_field_that_is_not_known_can_be_ignored_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "x": 1}\n' * 3, encoding="utf-8")
    records, tally = read(path, OnMistake.skip_all())
    assert len(records) == 3 and tally.ignored == Counter({"x": 3})
    assert tally.lines() == ["field 'x' ignored in 3 entries"]


def test_a_line_of_a_hundred_megabytes_is_passed_over_without_holding_it(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b" " * 2**20)
        file.write(b'\n{"prompt": "a"}\n')
    tracemalloc.start()
    records, tally = read(path, OnMistake(unreadable="skip", max_entry_mib=4.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records) == 1 and tally.skipped == Counter(unreadable=1)
    assert peak < 16 * 2**20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08\x00damaged", "damaged gzip file"),
        (gzip.compress(b'{"prompt": "a"}\n' * 9, mtime=0)[:-9], "damaged gzip file"),
        (b'[{"prompt": "a"}\n, {', "data:2: malformed JSON"),
        (b'[{"prompt": "a"} {"prompt": "b"}]', "data:1: malformed JSON"),
        (b'[{"prompt": "\xff"}]', "not UTF-8"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path, OnMistake.skip_all())
    assert "\n" not in str(caught.value)


@needs_data
@pytest.mark.parametrize(
    ("file", "records", "skipped"),
    [
        # counted by hand: 5 transcripts answer another prompt, 4 say nothing
        ("hh-rlhf/harmless-base-test.jsonl.gz", 2303, {"prompt_differs": 5, "empty": 4}),
        ("oasst1-zh/oaast_rm_zh.json", 769, {"equal": 6}),
        ("oasst1-zh/oaast_sft_zh.json", 689, {}),
        # 6 with true for a text, 55 with an empty one; three judgements each of the other 938
        ("pandalm-testset/testset-v1.json", 3 * 938, {"malformed": 6, "empty": 55}),
        ("llmbar/LLMBar-Natural.json", 100, {}),
        ("llmbar/Processed-LLMEval2.json", 198, {"equal": 1, "empty": 1}),
    ],
)
def test_public_data_is_read(file: str, records: int, skipped: dict[str, int]) -> None:
    found, tally = read(SHARED / file, OnMistake.skip_all())
    assert len(found) == records and tally.skipped == Counter(skipped)
    assert not tally.ignored
