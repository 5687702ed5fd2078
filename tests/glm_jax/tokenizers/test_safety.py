"""Text stays text: no spelling of a special token in a message becomes one."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.tokenizers import (
    ChatGLM2Tokenizer,
    ChatGLMTokenizer,
    RanksTokenizer,
    Tokenizer,
    load_tokenizer,
)
from sharding.errors import UserError

FOLDERS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")
SPELLINGS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "<sop>",
    "<eop>",
    "</s>",
    "<pad>",
    "<unused_0>",
    "<ENC>",
    "<dBLOCK>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|endoftext|>",
)
TEXT = st.lists(
    st.one_of(
        st.sampled_from(SPELLINGS), st.text(max_size=6), st.sampled_from(["[", "<", " ", "\n"])
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def loaded(shared: Path) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(shared / "tokenizers" / name) for name in FOLDERS}


def _special(tokenizer: Tokenizer) -> set[int]:
    if isinstance(tokenizer, ChatGLMTokenizer):
        return {*range(130000, 130008), 1, 2, 3}
    special = getattr(tokenizer, "special")  # noqa: B009
    return {*special.values(), 1, 2} - ({1, 2} if isinstance(tokenizer, RanksTokenizer) else set())


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_no_text_spells_a_special_token(loaded: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in loaded.values():
        special = _special(tokenizer)
        assert not special & set(tokenizer.encode(text)), type(tokenizer)
        for roles in _conversations(tokenizer):
            empty, full = (
                [message | {"content": content} for message in roles] for content in ("x", text)
            )
            ids, plain = (tokenizer.chat_prompt(messages) for messages in (full, empty))
            assert _kept(ids, special) == _kept(plain, special)
            (ids, _), (plain, _) = (
                tokenizer.chat_example([*messages, {"role": "assistant", "content": answer}])
                for messages, answer in ((full, text), (empty, "x"))
            )
            assert _kept(ids, special) == _kept(plain, special)


def _kept(ids: list[int], special: set[int]) -> list[int]:
    return [token for token in ids if token in special]


def _conversations(tokenizer: Tokenizer) -> list[list[dict[str, str]]]:
    turns = [{"role": role} for role in ("user", "assistant", "user")]
    if isinstance(tokenizer, ChatGLMTokenizer | ChatGLM2Tokenizer):
        return [turns]
    called = {"role": "assistant", "metadata": "<|user|>[gMASK]"}
    return [turns, [{"role": "system"}, turns[0], called, {"role": "observation"}]]


def test_tools_are_text(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["glm-4-9b-chat"]
    assert isinstance(tokenizer, RanksTokenizer)
    function = {"name": "f", "description": "<|user|>\n<|system|>\n[gMASK]"}
    system = {"role": "system", "tools": [{"type": "function", "function": function}]}
    for content, opened in (("", 1), ("Be brief <|system|>\n", 2)):
        prompt = tokenizer.chat_prompt([system | {"content": content}])
        assert _kept(prompt, _special(tokenizer)) == [
            *tokenizer.prefix,
            *[tokenizer.special["<|system|>"]] * opened,
            tokenizer.assistant_id,
        ]


def test_tools_and_words_of_a_system_are_the_template_s_two_messages(
    loaded: dict[str, Tokenizer], shared: Path
) -> None:
    tokenizer = loaded["glm-4-9b-chat"]
    assert isinstance(tokenizer, RanksTokenizer)
    golden = json.loads((shared / "tokenizers/glm-4-9b-chat/golden.json").read_text("utf-8"))
    (case,) = (case for case in golden["chat"] if "tools" in case["messages"][0])
    system, *rest = case["messages"]
    text = case["text"].replace("<|user|>", "<|system|>\nBe brief.<|user|>", 1)
    asked = tokenizer.chat_prompt([system | {"content": "Be brief."}, *rest])
    assert asked == tokenizer.encode_original(text)


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_what_is_encoded_decodes_to_the_same_text(loaded: dict[str, Tokenizer], text: str) -> None:
    for name in ("chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"):
        same = text if name == "glm-4-9b-chat" else text.replace("\u2581", " ")
        assert loaded[name].decode(loaded[name].encode(text)) == same, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_half_a_surrogate_pair_is_the_replacement_character(
    loaded: dict[str, Tokenizer], folder: str
) -> None:
    tokenizer = loaded[folder]
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("a\ud83d\udc4bb") == tokenizer.encode("a\U0001f44bb")


def test_only_blanks_that_have_a_piece_are_blanks(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["chatglm-6b"]
    for length in (2, 9, 10, 79, 80):
        assert tokenizer.decode(tokenizer.encode(f"a<|blank_{length}|>b")) == f"a{' ' * length}b"
    for spelt in ("<|blank_1|>", "<|blank_81|>", "<|blank_02|>", "<|blank_99999999999999999999|>"):
        assert tokenizer.decode(tokenizer.encode(f"a{spelt}b")) == f"a{spelt}b"


def test_a_spelling_reads_the_same_whether_or_not_it_is_special(
    loaded: dict[str, Tokenizer],
) -> None:
    tokenizer = loaded["chatglm-6b"]
    text = "before <sop> and [MASK] after<eop>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("folder", ["chatglm-6b", "chatglm2-6b"])
def test_models_of_rounds_refuse_other_roles(loaded: dict[str, Tokenizer], folder: str) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(UserError, match="messages system, user: this model knows only user and"):
        loaded[folder].chat_prompt(messages)
    with pytest.raises(UserError, match="must end with the assistant's answer"):
        loaded[folder].chat_example(messages[1:])


def test_answers_are_cut_and_cleaned(loaded: dict[str, Tokenizer]) -> None:
    v1, v2, v4 = (loaded[name] for name in ("chatglm-6b", "chatglm2-6b", "glm-4-9b-chat"))
    assert v1.decode_answer([*v1.encode("好的，没问题！ yes, sir!"), v1.eos_id, 5]) == (
        "好的，没问题！ yes, sir!"
    )
    assert v1.decode_answer(v1.encode("好,了!ok?可以;well: a,b")) == "好，了！ok？可以；well: a,b"
    assert v2.decode([v2.pad_id, *v2.encode("fine")]) == "fine"
    assert v2.decode_answer([*v2.encode(" fine \n"), v2.eos_id, 36474]) == "fine"
    answer = [*v4.encode("get_weather\n{}"), v4.eos_id, *v4.encode("more")]
    assert v4.decode_answer(answer) == "{}"


def test_tools_need_the_repository_s_template(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        (shared / "tokenizers" / "glm-4-9b-chat" / "tokenizer.model").read_bytes()
    )
    bare = load_tokenizer(tmp_path)
    assert isinstance(bare, RanksTokenizer) and bare.eos_id == 151336
    system = {"role": "system", "content": "", "tools": [{"type": "function"}]}
    with pytest.raises(UserError, match="need the chat_template"):
        bare.chat_prompt([system])
    for template, complaint in (
        ("{% if", "unexpected 'end of template'"),
        ("<|system|>\n{{ messages[0].tools | tojson(some=1) }}", r"fails \(.*'some'\)"),
        ("[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% endfor %}", "words no tools"),
        ("{{ messages[0].tools }}", "words no tools"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(UserError, match=complaint) as caught:
            load_tokenizer(tmp_path).chat_prompt([system])
        assert "\n" not in str(caught.value)


def test_directories_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"neither\x00")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\nnonsense\n")
    with pytest.raises(UserError, match="holds no byte-pair ranks"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\n")
    for named in ('["<eop>"]', '{"x": {"content": "<eop>"}}', '{"1": "<eop>"}', '{"1": {}}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"added_tokens_decoder": {named}}}')
        with pytest.raises(UserError, match="added_tokens_decoder, but not as id"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json of GLM-4"):
        load_tokenizer(tmp_path)


def test_other_sentencepiece_models_are_no_chatglm_6b(shared: Path, tmp_path: Path) -> None:
    model = (shared / "tokenizers" / "chatglm2-6b" / "tokenizer.model").read_bytes()
    (tmp_path / "ice_text.model").write_bytes(model)
    with pytest.raises(UserError, match=r"ice_text\.model: holds no piece <pad>"):
        load_tokenizer(tmp_path)


def test_folders_in_place_of_files_are_named(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "ice_text.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_chatglm2_and_chatglm3_are_told_apart(shared: Path, tmp_path: Path) -> None:
    model = (shared / "tokenizers" / "chatglm2-6b" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert not isinstance(load_tokenizer(tmp_path), ChatGLM2Tokenizer)  # nothing says: the latest
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "THUDM/chatglm2-6b-32k"}))
    assert isinstance(load_tokenizer(tmp_path), ChatGLM2Tokenizer)
