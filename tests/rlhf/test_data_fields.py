"""Every field that a format declares is read, names the entry, or is counted as not read."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from glm_jax.tokenizers import ChatFormatError, ChatGLM3Tokenizer, load_tokenizer
from rlhf.data.mistakes import Mistake, OnMistake, Tally
from rlhf.data.reading import FORMS, read_records
from rlhf.data.records import Comparison, Example, dialogue_key

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


def chat(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


PARTS = {"system": "be brief", "tools": [{"name": "f"}], "metadata": "m"}
LONG = {"role": "system", "content": PARTS["system"], "tools": PARTS["tools"]}
OURS = {"prompt": [LONG, *chat("hi")], "task": "t", "id": 1}
OF_PAIRS = {"annotator": "a", "weight": 2.0, "labels": {"x": [1, 2]}}
# form -> an entry with every field that it declares, and another value for each
ENTRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pair": (
        {**OURS, **OF_PAIRS, "chosen": "b", "rejected": "c", "chosen_first": True, "strength": 1},
        {"chosen_first": False, "strength": 2, "chosen": "d", "rejected": "e"},
    ),
    "ranking": (
        {**OURS, **OF_PAIRS, "responses": ["b", "c"], "ranks": [2, 1]},
        {"responses": ["b", "d"], "ranks": [1, 2]},
    ),
    "example": ({**OURS, "response": "b"}, {"response": "c"}),
    "prompt": (dict(OURS), {}),
    "hh": (
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: a",
            "rejected": "\n\nHuman: hi\n\nAssistant: b",
        },
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: c",
            "rejected": "\n\nHuman: hi\n\nAssistant: d",
        },
    ),
    "chats": (
        {
            "prompt": "hi",
            "prompt_id": "1",
            "messages": chat("hi", "a"),
            "chosen": chat("hi", "a"),
            "rejected": chat("hi", "b"),
            "score_chosen": 2.0,
            "score_rejected": 1,
        },
        {
            "prompt": "ho",
            "prompt_id": "2",
            "messages": [],
            "chosen": chat("hi", "c"),
            "rejected": chat("hi", "d"),
            "score_chosen": None,
            "score_rejected": 3,
        },
    ),
    "tree": (
        {
            "message_tree_id": "1",
            "tree_state": "ready",
            "origin": "x",
            "prompt": {
                "role": "prompter",
                "text": "hi",
                "replies": [
                    {"role": "assistant", "text": t, "rank": n} for n, t in enumerate("ab")
                ],
            },
        },
        {
            "message_tree_id": "2",
            "tree_state": "deleted",
            "origin": "y",
            "prompt": {
                "role": "prompter",
                "text": "hi",
                "replies": [
                    {"role": "assistant", "text": t, "rank": n} for n, t in enumerate("ba")
                ],
            },
        },
    ),
    "ultrafeedback": (
        {
            "source": "s",
            "instruction": "hi",
            "models": ["m"],
            "correct_answers": ["a"],
            "incorrect_answers": ["b"],
            "completions": [{"response": t, "overall_score": n} for n, t in enumerate("ab")],
        },
        {
            "source": "r",
            "instruction": "ho",
            "models": ["n"],
            "correct_answers": ["c"],
            "incorrect_answers": ["d"],
            "completions": [{"response": t, "overall_score": n} for n, t in enumerate("ba")],
        },
    ),
    "pandalm": (
        {
            "idx": 0,
            "motivation_app": "x",
            "cmp_key": "k",
            "instruction": "hi",
            "input": "1",
            "response1": "a",
            "response2": "b",
            "annotator1": 1,
            "annotator2": 1,
            "annotator3": 1,
        },
        {
            "idx": 1,
            "motivation_app": "y",
            "cmp_key": "l",
            "instruction": "ho",
            "input": "2",
            "response1": "c",
            "response2": "d",
            "annotator1": 2,
            "annotator2": 0,
            "annotator3": 2,
        },
    ),
    "llmbar": (
        {"input": "hi", "output_1": "a", "output_2": "b", "label": 1},
        {"input": "ho", "output_1": "c", "output_2": "d", "label": 2},
    ),
    "sharegpt": (
        {
            "id": "1",
            "system": "be brief",
            "tools": '[{"name": "f"}]',
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}],
        },
        {
            "id": "2",
            "system": "be long",
            "tools": '[{"name": "g"}]',
            "conversations": [{"from": "human", "value": "ho"}, {"from": "gpt", "value": "a"}],
        },
    ),
    "alpaca": (
        {
            "instruction": "hi",
            "input": "1",
            "output": "a",
            "history": [["q", "r"]],
            "system": "be brief",
        },
        {"instruction": "ho", "input": "2", "output": "b", "history": [], "system": "be long"},
    ),
}
FOR_OURS = {
    "prompt": [LONG, *chat("ho")],
    "task": "u",
    "id": 2,
    "annotator": "b",
    "weight": 3.0,
    "labels": {"x": [1, 3]},
}
CASES = [(name, field) for name in ENTRIES for field in sorted(ENTRIES[name][0])]


def read(path: Path, entry: dict[str, Any], form: str) -> tuple[Any, Tally]:
    path.write_text(json.dumps(entry), encoding="utf-8")
    tally = Tally(OnMistake())
    return [record for _, record in read_records([path], tally, form)], tally


def test_the_entries_have_every_declared_field() -> None:
    assert ENTRIES.keys() == FORMS.keys()
    for name, (entry, _) in ENTRIES.items():
        form = FORMS[name]
        assert entry.keys() == form.required | form.optional
        assert form.identifiers | form.unread <= entry.keys()
        assert not form.identifiers & form.unread


@pytest.mark.parametrize(("form", "field"), CASES)
def test_another_value_of_a_declared_field_is_noticed(
    tmp_path: Path, form: str, field: str
) -> None:
    entry, others = ENTRIES[form]
    records, tally = read(tmp_path / "x", entry, form)
    other, _ = read(tmp_path / "x", {**entry, field: {**FOR_OURS, **others}[field]}, form)
    unread = field in FORMS[form].unread
    assert (other != records) == (field not in FORMS[form].identifiers and not unread)
    assert (tally.ignored[field] == 1) == unread
    if unread:
        assert f"field {field!r} ignored in 1 entries" in tally.lines()


def test_what_is_not_read_is_in_the_documentation() -> None:
    """Each by the name of its form."""
    text = (REPOSITORY / "docs" / "data.md").read_text("utf-8")
    section = text.split("## Fields that are not read", 1)[1].split("\n## ", 1)[0]
    for form in FORMS.values():
        for field in form.identifiers | form.unread:
            assert f"`{field}`" in section, (form.name, field)


@pytest.mark.parametrize("part", ["metadata", "tools", "role", "content"])
@pytest.mark.parametrize("form", ["pair", "ranking", "example", "prompt", "chats"])
def test_every_field_of_a_message_is_read(tmp_path: Path, form: str, part: str) -> None:
    entry = copy.deepcopy(ENTRIES[form][0])
    talks = [entry["prompt"]] if form != "chats" else [entry["chosen"], entry["rejected"]]
    for talk in talks:
        talk.insert(
            0, {"role": "system", "content": "x", "tools": [{"name": "f"}], "metadata": "m"}
        )
        if talk[1]["role"] == "system":
            del talk[1]
    before, _ = read(tmp_path / "x", entry, form)
    new = {"metadata": "n", "tools": [{"name": "g"}], "role": "user", "content": "y"}
    for talk in talks:
        talk[0][part] = new[part]
        if part == "role":
            del talk[0]["tools"]
    after, _ = read(tmp_path / "x", entry, form)
    assert before != after
    for talk in talks:
        talk[0]["strange"] = 1
    path = tmp_path / "x"
    path.write_text(json.dumps(entry), encoding="utf-8")
    tally = Tally(OnMistake.skip_all())
    assert list(read_records([path], tally, form))
    assert any(name.endswith("[].strange") for name in tally.ignored)


GOOD = ENTRIES["sharegpt"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "[{"}, "'tools' is no JSON"),
        ({"tools": '{"name": "f"}'}, "'tools' is not a list of objects"),
        ({"tools": [3]}, "'tools' is not a list of objects"),
        ({"system": 3}, "'system' is not a text"),
        (
            {"conversations": [{"from": "system", "value": "x"}, *GOOD["conversations"]]},
            "two system messages",
        ),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "a turn is not from one of"),
    ],
)
def test_what_is_wrong_with_tools_and_system_is_said(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(Mistake, match=message):
        FORMS["sharegpt"].parse({**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, "'weight' is 0: give a positive number"),
        ({"weight": float("inf")}, "'weight' is inf: give a number"),
        ({"weight": True}, "'weight' is True: give a number"),
        ({"weight": 10**400}, "'weight' is 1000.*: give a number"),
        ({"chosen_first": 1}, "'chosen_first' is 1: give true or false"),
        ({"strength": "much"}, "'strength' is much: give a number"),
        ({"labels": {"x": [1, float("nan")]}}, r"'labels.x' is nan: give a number"),
        ({"chosen": "half \ud83d"}, "'chosen' holds half of a character"),
        ({"prompt": "half \ud83d"}, "'prompt' holds half of a character"),
        ({"prompt": [{"role": "user", "content": "x", "tools": []}]}, "'tools' of another message"),
    ],
)
def test_values_that_mean_nothing_are_mistakes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Mistake, match=message):
        FORMS["pair"].parse({**ENTRIES["pair"][0], **change})


@needs_shared
def test_sharegpts_system_and_tools_reach_the_model() -> None:
    """In the words of each generation that has some; the others say that they have none."""
    path = SHARED / "cases" / "files" / "sharegpt_system.json"
    expected = json.loads((SHARED / "cases" / "expected.json").read_text("utf-8"))
    ((talk, answer),) = expected["sharegpt_system.json"]["examples"]
    tally = Tally(OnMistake())
    ((_, record),) = read_records([path], tally)
    assert isinstance(record, Example) and record.response == answer
    assert " | ".join(f"{m['role']}: {m['content']}" for m in record.prompt) == talk
    assert record.prompt[0]["tools"] == [{"name": "get_time"}] and not tally.ignored
    bare = tuple({**m, "tools": []} if "tools" in m else m for m in record.prompt)
    assert dialogue_key(record.prompt) == dialogue_key(bare)
    for name in ("chatglm3-6b", "glm-4-9b-chat"):
        tokenizer = load_tokenizer(SHARED / "tokenizers" / name)
        text = tokenizer.decode(tokenizer.chat_prompt(record.prompt))
        assert "get_time" in text and record.prompt[0]["content"] in text
        assert "get_time" not in tokenizer.decode(tokenizer.chat_prompt(bare))
    for name in ("chatglm-6b", "chatglm2-6b"):
        with pytest.raises(ChatFormatError, match="only user and assistant in turn"):
            load_tokenizer(SHARED / "tokenizers" / name).chat_prompt(record.prompt)


@needs_shared
def test_glm4_words_a_bare_function_as_a_typed_one_and_loses_no_tool() -> None:
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "glm-4-9b-chat")
    ask = lambda tools: tokenizer.chat_prompt(  # noqa: E731
        [{"role": "system", "content": "", "tools": tools}, *chat("hi")]
    )
    bare = {"name": "get_time", "parameters": {}}
    typed = {"type": "function", "function": bare}
    assert ask([bare]) == ask([typed]) != ask([{**bare, "name": "get_date"}])
    assert ask([bare, {"type": "python"}]) == ask([typed, {"type": "python"}])
    with pytest.raises(ChatFormatError, match="words no tool such as"):
        ask([typed, {"type": "telepathy"}])


@needs_shared
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b"])
def test_a_prompt_without_a_place_for_metadata_refuses_it(name: str) -> None:
    tokenizer = load_tokenizer(SHARED / "tokenizers" / name)
    talk = [*chat("hi", "{}", "and?")]
    talk[1]["metadata"] = "get_time"
    with pytest.raises(ChatFormatError, match="has metadata"):
        tokenizer.chat_prompt(talk)


def test_tools_without_a_text_beside_them_are_a_system_message(tmp_path: Path) -> None:
    entry = {**GOOD, "system": ""}
    (record,), _ = read(tmp_path / "x", entry, "sharegpt")
    assert record.prompt[0] == {"role": "system", "content": "", "tools": [{"name": "f"}]}
    tokenizer = ChatGLM3Tokenizer.train(["get the time now", "be brief"] * 9, 290)
    assert '"name": "f"' in tokenizer.decode(tokenizer.chat_prompt(record.prompt))
    (record,), _ = read(tmp_path / "x", {**entry, "tools": "[]"}, "sharegpt")
    assert record.prompt == tuple(chat("hi"))


def test_prompts_that_differ_in_tools_only_are_not_the_same(tmp_path: Path) -> None:
    from rlhf.data.records import same_prompt

    prompts = [
        (first, *chat("hi"))
        for first in (LONG, {**LONG, "tools": [{"name": "g"}]}, {**LONG, "metadata": "m"})
    ]
    assert len(set(map(same_prompt, prompts))) == 3 and len(set(map(dialogue_key, prompts))) == 1


def test_an_order_made_by_preference_is_no_order_of_the_data(tmp_path: Path) -> None:
    """A format that lists the better answer first by definition says nothing of positions."""
    listed = {}
    for name, (entry, _) in ENTRIES.items():
        entry = {k: v for k, v in entry.items() if k not in ("chosen_first", "ranks")}
        if name == "alpaca":
            entry["output"] = ["a", "b"]
        for record in read(tmp_path / "x", entry, name)[0]:
            if isinstance(record, Comparison):
                listed[name] = record.listed
    best_first = {name for name, said in listed.items() if not said}
    assert best_first == {"pair", "ranking", "hh", "chats", "alpaca"}
    assert listed.keys() - best_first == {"tree", "ultrafeedback", "pandalm", "llmbar"}
    assert read(tmp_path / "x", ENTRIES["pair"][0], "pair")[0][0].listed
    assert read(tmp_path / "x", ENTRIES["ranking"][0], "ranking")[0][0].listed
