"""The commands on a model's files, as a user types them."""

import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.checkpoint import Card, card_of, load_model, save_model
from glm_jax.config import GLMConfig
from glm_jax.generate import SamplingConfig, stream
from glm_jax.hf.config import Form, Tokens
from glm_jax.model import init_model
from glm_jax.scalar import ScalarModel
from glm_jax.tokenizers import ChatGLM3Tokenizer
from rlhf.cli import main
from sharding.disk.find import find_tensors
from sharding.layout import Layout

REPOSITORY = Path(__file__).parents[2]
LAYOUT = Layout()
WORDS = [
    f"{a} {b} {c}" for a in ["ask", "tell", "say"] for b in ["red", "blue"] for c in ["of", "me"]
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that knows nothing, with a tokenizer."""
    directory = tmp_path_factory.mktemp("talker") / "checkpoint"
    tokenizer = ChatGLM3Tokenizer.train(WORDS * 3, 300)
    config = GLMConfig(300, 32, 2, 4, 2, 8, 48, max_length=256)
    with jax.set_mesh(LAYOUT.mesh()):
        model = jax.jit(partial(init_model, config, LAYOUT))(jax.random.key(0))
        card = Card(config, Form.CHATGLM3, Tokens(tokenizer.eos_id, tokenizer.pad_id))
        save_model(model, LAYOUT, card, directory, tokenizer.save)
    return directory


def run(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    screen = capsys.readouterr()
    return status, screen.out, screen.err


@pytest.fixture(scope="module")
def scorer(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a scalar head."""
    directory = tmp_path_factory.mktemp("scorer") / "checkpoint"
    tokenizer = ChatGLM3Tokenizer.load(talker / "hf")
    with jax.set_mesh(LAYOUT.mesh()):
        model = ScalarModel(load_model(talker, LAYOUT, "float32").trunk, jax.numpy.arange(32.0))
        save_model(model, LAYOUT, card_of(talker), directory, tokenizer.save)
    return directory


@pytest.mark.parametrize("stream", [[], ["--stream"], ["--layout", "fsdp_tp"]])
def test_import_and_export(
    shared: Path, tmp_path: Path, stream: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared / "golden" / "glm-4-9b-chat"
    assert run("import", source, tmp_path / "ck", *stream, capsys=capsys)[0] == 0
    options = ["--max-shard-size", "200KB"]
    status, out, _ = run("export", tmp_path / "ck", tmp_path / "hf", *options, capsys=capsys)
    assert status == 0 and "25 of 25 tensors are byte for byte those that were imported" in out
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 3
    assert run("verify", tmp_path / "hf", "--manifest", capsys=capsys)[0] == 0
    stored = find_tensors(tmp_path / "hf")["transformer.output_layer.weight"]
    with stored.path.open("r+b") as file:
        file.seek(stored.offset)
        file.write(b"\xff")
    status, out, _ = run("verify", tmp_path / "hf", "--manifest", capsys=capsys)
    assert status == 1 and "transformer.output_layer.weight has changed" in out


def test_export_into_the_other_form(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("import", shared / "golden" / "glm-4-9b-chat", tmp_path / "ck", capsys=capsys)
    assert run("export", tmp_path / "ck", tmp_path / "hf", "--form", "hf", capsys=capsys)[0] == 0
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["architectures"] == ["GlmForCausalLM"]
    run("import", shared / "golden" / "chatglm3-6b", tmp_path / "ck3", capsys=capsys)
    status, _, err = run("export", tmp_path / "ck3", tmp_path / "x", "--form", "hf", capsys=capsys)
    assert status == 1 and err == ("glm-jax: error: --form hf: ChatGLM3 exists as remote only\n")
    status, _, err = run(
        "export", tmp_path / "ck3", tmp_path / "x", "--max-shard-size", "big", capsys=capsys
    )
    assert status == 1 and "'big' is no size" in err


def test_verify_prints_writes_and_fails(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(shared / "golden" / "chatglm3-6b", directory)
    directory.chmod(0o755)
    with np.load(directory / "golden.npz") as file:
        kept: dict[str, Any] = {k: file[k] for k in file.files if k.startswith("left_nopos/")}
    (directory / "golden.npz").unlink()
    np.savez(directory / "golden.npz", **kept)
    report = tmp_path / "report.json"
    arguments = ["verify", str(directory), "--json", str(report)]
    status, out, _ = run(*arguments, "--layout", "tp", "--devices", "8", capsys=capsys)
    assert status == 0 and "3 of 3 agree" in out and "tensor 4, data 2" in out
    written = json.loads(report.read_text())
    assert written["pass"] is True and written["model_type"] == "chatglm"
    assert set(written["cases"][0]) == {"case", "quantity", "max_error", "tolerance", "pass"}

    kept["left_nopos/loss"] = kept["left_nopos/loss"] * 1.0001
    np.savez(directory / "golden.npz", **kept)
    status, out, _ = run(*arguments, capsys=capsys)
    assert status == 1 and "FAIL" in out
    failed = [row["quantity"] for row in json.loads(report.read_text())["cases"] if not row["pass"]]
    assert failed == ["loss"]


def test_inspect_names_what_is_wrong(
    shared: Path, tmp_path: Path, talker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run("inspect", shared / "golden" / "chatglm-6b", capsys=capsys)
    assert status == 0 and "ChatGLM-6B" in out and "pytorch_model-00002-of-00002.bin" in out
    assert run("inspect", talker, capsys=capsys)[0] == 0

    directory = tmp_path / "model"
    shutil.copytree(shared / "golden" / "GLM-4-9B-0414", directory)
    directory.chmod(0o755)
    config = directory / "config.json"
    config.chmod(0o644)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"num_hidden_layers": 2, "intermediate_size": 88}))
    status, out, _ = run("inspect", directory, capsys=capsys)
    assert status == 1
    assert (
        "model.layers.2.mlp.down_proj.weight is unknown: of layer 2, but config.json says 2" in out
    )
    assert (
        "model.layers.0.mlp.down_proj.weight has shape (64, 176), config.json wants (64, 88)"
        in (out)
    )
    config.write_text(json.dumps(fields | {"num_hidden_layers": 4}))
    _, out, _ = run("inspect", directory, capsys=capsys)
    assert "model.layers.3.self_attn.o_proj.weight is missing: attention's output of layer 3" in out


def test_a_scalar_head_goes_in_and_out_and_writes_no_text(
    talker: Path, scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", scorer, tmp_path / "hf", capsys=capsys)[0] == 0
    status, out, _ = run("import", tmp_path / "hf", tmp_path / "ck", "--stream", capsys=capsys)
    assert status == 0 and "of ChatGLM3, scalar head" in out
    for directory, head in (
        (scorer, "scalar"),
        (tmp_path / "hf", "scalar"),
        (tmp_path / "ck", "scalar"),
        (talker, "vocabulary"),
    ):
        status, out, _ = run("inspect", directory, capsys=capsys)
        assert status == 0 and [head in line for line in out.splitlines() if " head " in line] == [
            True
        ]
    demo = REPOSITORY / "configs" / "demo_smoke.py"
    golden: dict[str, Any] = {"full/logits": np.zeros(1)}
    np.savez(tmp_path / "hf" / "golden.npz", **golden)
    for directory in (scorer, tmp_path / "hf", tmp_path / "ck"):
        commands: list[list[str | Path]] = [
            ["generate", directory, "--prompt", "x"],
            ["chat", directory],
            ["run", demo, "--pretrained", directory, "--output-dir", tmp_path / "run"],
        ]
        if directory.name == "hf":
            commands.append(["verify", directory])
        for command in commands:
            status, _, err = run(*command, capsys=capsys)
            assert status == 1 and err.count("\n") == 1
            assert f"{directory} holds a scalar head (a reward model or critic)" in err
    assert not (tmp_path / "run").exists()


def test_generate_gives_the_tokens_of_the_sampler(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-new-tokens", "12", "--seed", "3", "--top-p", "0.9", "--top-k", "50"]
    status, first, _ = run("generate", talker, "--prompt", "ask me", *options, capsys=capsys)
    _, again, _ = run("generate", talker, "--prompt", "ask me", *options, capsys=capsys)
    assert status == 0 and first == again
    tokenizer = ChatGLM3Tokenizer.load(talker / "hf")
    with jax.set_mesh(LAYOUT.mesh()):
        model = load_model(talker, LAYOUT, "float32")
        key = jax.random.fold_in(jax.random.key(3), 0)
        ids = stream(
            model,
            tokenizer.chat_prompt([{"role": "user", "content": "ask me"}]),
            key,
            SamplingConfig(12, 0.8, 50, 0.9),
            tokenizer.stop_ids,
            LAYOUT,
        )
        assert first.strip() == tokenizer.decode_answer(list(ids))
    # and from the Hugging Face directory that the checkpoint becomes
    run("export", talker, tmp_path / "hf", capsys=capsys)
    exported = run("generate", tmp_path / "hf", "--prompt", "ask me", *options, capsys=capsys)[1]
    assert exported == first
    raw = run("generate", talker, "--prompt", "ask me", "--raw", *options, capsys=capsys)[1]
    assert raw != first


def test_chat_keeps_saves_and_forgets(
    talker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "chat.json"
    lines = [
        "/system say red",
        "ask me",
        "tell me",
        f"/save {saved}",
        "/dance",
        "/reset",
        f"/save {saved}.2",
        "/quit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    status, out, _ = run("chat", talker, "--max-new-tokens", "6", capsys=capsys)
    assert status == 0 and "/dance: unknown command" in out
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "say red" and messages[3]["content"] == "tell me"
    assert messages[2]["content"].strip() in out
    kept = json.loads(Path(f"{saved}.2").read_text())
    assert kept == [{"role": "system", "content": "say red"}]


def test_a_prompt_beyond_the_context_is_refused(
    talker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(
        "generate", talker, "--prompt", "x", "--max-new-tokens", "250", capsys=capsys
    )
    assert status == 1 and "but the model's context is 256" in err


def test_a_model_without_its_tokenizer_is_refused(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared / "golden" / "chatglm3-6b"
    status, _, err = run("generate", source, "--prompt", "x", capsys=capsys)
    assert status == 1 and "no tokenizer in" in err
    status, _, err = run("generate", source, "--prompt", "x", "--top-p", "2", capsys=capsys)
    assert status == 1 and "sampling.top_p = 2.0 is out of range" in err
