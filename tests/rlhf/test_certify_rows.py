"""Rows of certify: what passes, what is named, and the command."""

import dataclasses
import itertools
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.batch import Sequences
from glm_jax.config import PRESETS, Config, GLMConfig
from glm_jax.generate import Generation
from glm_jax.model import init_model
from glm_jax.optim import OptimConfig
from glm_jax.weights import named_weights
from rlhf import cli
from rlhf.certify import (
    Case,
    Row,
    Trained,
    certify,
)
from rlhf.trials.compare import PARTS, deepest
from rlhf.trials.jobs import JOBS
from rlhf.trials.models import tiny
from rlhf.trials.recording import Role, Seen
from sharding.errors import UserError
from sharding.layout import (
    LAYOUTS,
    Layout,
    get_layout,
)

MODELS = {name: tiny(PRESETS[name]) for name in ("chatglm-6b", "chatglm3-6b", "glm-4-9b-0414")}


PARAMETERS = ("w_q", "w_k", "attn_norm")
NO_LEARNING = OptimConfig(learning_rate=0.0)  # so that AdamW leaves weights as they are


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Trials that take no time; what they are off by under every layout is what the test puts in."""
    off = dict.fromkeys((*PARTS, "recompiles", "error"), 0.0)

    def train(job: str, config: Config, rows: int, layout: Layout, how: Any = None) -> Trained:
        by = off if layout.num_devices > 1 else dict.fromkeys(off, 0.0)
        if by["error"]:
            raise ValueError("shapes do not fit")
        two = np.array([[1.0, -2.0]])
        ids = np.array([[1, 2], [3, 4]])
        answers = Generation(
            Sequences(ids, ids > 0, ids > 1),
            np.array([[1.0, -0.5]] * 2) + by["answers"],
            ids[:, 0] > 1,
        )
        start = dict.fromkeys(PARAMETERS, two + by["weights"])
        gradients = {name: two + (name != "w_q") * by["gradient"] for name in PARAMETERS}
        weights = {name: w + by["optimizer"] for name, w in start.items()}
        loss = {"loss": 2.0 + by["loss"]}
        data = {"ids": ids + int(by["data"])}
        figures = {"logp": two, "scores": two + by["figures"], "values": two + by["figures"]}
        seen = [
            Seen("iteration 1", "", {"ids": ids}, answers, figures, {}, {}, {}),
            Seen("update 1", "", data, None, {}, loss, gradients, weights),
        ]
        roles = {"": Role(start, NO_LEARNING, 1)}
        collectives = Counter({"all-reduce": 6})
        return Trained(seen, roles, (), int(by["recompiles"]), collectives, 0)

    monkeypatch.setattr("rlhf.certify.train", train)
    return off


@pytest.mark.parametrize(
    ("what", "passes", "fails", "where", "names"),
    [
        ("data", 0, 1, "update 1", ("ids",)),
        ("answers", 1.9e-6, 2.1e-6, "iteration 1", ("logp",)),
        ("figures", 3.9e-5, 4.1e-5, "iteration 1", ("scores", "values")),
        ("loss", 3.9e-6, 4.1e-6, "update 1", ("loss",)),
        ("gradient", 1.3e-4, 1.5e-4, "update 1", ("w_k", "attn_norm")),
        ("optimizer", 0.9e-6, 1.1e-6, "update 1", PARAMETERS),
        ("weights", 3.9e-6, 4.1e-6, "update 1", PARAMETERS),
        ("recompiles", 0, 1, "", ()),
        ("error", 0, 1, "", ()),
        *(
            (part, 0, float("nan"), where, names)
            for part, where, names in (
                ("answers", "iteration 1", ("logp",)),
                ("loss", "update 1", ("loss",)),
                ("gradient", "update 1", PARAMETERS),
                ("optimizer", "update 1", PARAMETERS),
            )
        ),
    ],
)
def test_each_part_has_its_limit_and_is_named(
    fake: dict[str, float],
    what: str,
    passes: float,
    fails: float,
    where: str,
    names: tuple[str, ...],
) -> None:
    layouts = {"tp": Case(get_layout("tp", 8))}
    fake[what] = passes
    (row,) = certify(MODELS["chatglm3-6b"], layouts, ["sft"])
    assert row.passed and not row.difference, row
    fake[what] = fails
    (row,) = certify(MODELS["chatglm3-6b"], layouts, ["sft"])
    assert not row.passed
    if what == "error":
        assert row.failure == "ValueError: shapes do not fit"
        return
    assert row.where == where, row
    if where:
        assert row.part == what and set(row.names) == set(names), row


def test_the_first_difference_is_named_and_not_what_follows(fake: dict[str, float]) -> None:
    for part in PARTS[::-1]:
        fake[part] = 1.0
        (row,) = certify(MODELS["chatglm3-6b"], {"tp": Case(get_layout("tp", 8))}, ["sft"])
        # an iteration's answers come before the batches of its updates
        assert row.part == ("answers" if part == "data" else part), row


def test_the_gradient_that_is_wrong_first_on_the_way_back_is_named() -> None:
    def gradients(wrong: dict[str, int]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {
            name: np.ones((3, 2)) for name in (".blocks.w_q", ".blocks.b_o", ".blocks.w_down")
        }
        found |= {".embedding": np.ones(4), ".final_norm": np.ones(4)}
        for name, layer in wrong.items():
            found[name][layer] += 1.0
        return found

    def named(**wrong: int) -> str:
        by_path = {(".blocks." if name[1] == "_" else ".") + name: x for name, x in wrong.items()}
        return deepest(list(by_path), gradients(by_path), gradients({}))

    assert named(w_q=1, b_o=1, embedding=0) == ".blocks.b_o"
    assert named(w_q=2, b_o=1, embedding=0) == ".blocks.w_q"
    assert named(w_q=2, w_down=2) == ".blocks.w_down"
    assert named(w_q=2, final_norm=2) == ".final_norm"
    assert named(embedding=2) == ".embedding"


def test_the_command(
    fake: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["certify", "--layouts", "dp", "2x1x2x2:circular", "--jobs", "sft,ppo"]
    command += ["--model", "chatglm-6b"]
    report = tmp_path / "report.json"
    assert cli.main([*command, "--json", str(report)]) == 0
    assert "4 of 4 pass" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["pass"] is True and len(found["rows"]) == 4
    wanted = {f.name for f in dataclasses.fields(Row)} | {"pass", "difference", "model"}
    assert wanted == found["rows"][3].keys()
    assert found["rows"][3]["layout"] == "2x1x2x2:circular" and found["rows"][3]["job"] == "ppo"
    assert found["rows"][3]["collectives"] == {"all-reduce": 6}
    fake["weights"] = float("nan")
    assert cli.main([*command, "--json", str(report)]) == 1
    assert "FAIL   update 1: optimizer of w_q and 2 more" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["pass"] is False and found["rows"][0]["weight_error"] is None
    assert found["rows"][0]["difference"] == "update 1: optimizer of w_q and 2 more"


def _asked(options: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Models, layouts and jobs that a command certifies."""
    asked = []

    def certify(config: Config, cases: dict[str, Case], jobs: list[str]) -> list[Row]:
        asked.append((config, cases, jobs))
        return []

    monkeypatch.setattr("rlhf.certify.certify", certify)
    assert cli.main(["certify", *options]) == 0
    return asked


def test_default_cases_have_schedules_stages_with_shards_and_biases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = _asked([], monkeypatch)
    weights = set()
    with jax.set_mesh(Layout().mesh()):
        for config, _, _ in asked:
            shapes = jax.eval_shape(partial(init_model, config, Layout()), jax.random.key(0))
            weights |= {name.split(".")[-1] for name in named_weights(shapes)}
    assert {"b_o", "b_out", "b_in", "b_q"} <= weights
    for _, cases, jobs in asked:
        layouts = [case.layout for case in cases.values()]
        assert any(x.pipe > 1 and x.repeats > 1 for x in layouts)
        assert any(x.pipe > 1 and x.fsdp > 1 for x in layouts)
        assert set(jobs) == set(JOBS)
        named = {get_layout(name, 8) for name in LAYOUTS if name != "single"}
        assert named < set(layouts)


def test_options_vary_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--layouts", "dp", "tp", "--accumulate", "1", "2", "--remat", "none", "full"]
    options += ["--generation-layout", "1x8x1x1", "--compute-dtype", "bfloat16"]
    for config, cases, _ in _asked(options, monkeypatch):
        assert config.compute_dtype == "bfloat16"
        varied = {(c.layout.data, c.layout.accumulate, c.layout.remat) for c in cases.values()}
        assert varied == set(itertools.product((8, 1), (1, 2), ("none", "full")))
        assert {case.generation for case in cases.values()} == {Layout(data=8)}
        assert "tp accumulate=2 remat=full generation=1x8x1x1" in cases


def test_only_jobs_that_sample_are_repeated_for_a_generation_layout(fake: dict[str, float]) -> None:
    layout = get_layout("tp", 8)
    cases = {"a": Case(layout, Layout(data=8)), "b": Case(layout, Layout(fsdp=8))}
    rows = certify(MODELS["chatglm3-6b"], cases, ["sft", "ppo"])
    assert [(row.layout, row.job) for row in rows] == [("a", "sft"), ("a", "ppo"), ("b", "ppo")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "sft,kto"], "unknown job 'kto': choose some of sft, reward, dpo, ppo, grpo"),
        (["--model", "chatglm3-6"], "unknown model 'chatglm3-6': did you mean chatglm3-6b"),
        (["--layouts", "ddp"], "unknown layout 'ddp'"),
        (["--layouts", "2x2x2"], "unknown layout '2x2x2'.*PIPExDATAxFSDPxTENSOR"),
        (["--layouts", "2x2x2x2"], "needs 16 devices but has 8"),
        (["--layouts", "2x2x2x1:gpipe:2:2"], "gpipe with 2 repeats"),
        (["--accumulate", "0", "--layouts", "dp"], "accumulate = 0: give a positive number"),
        (["--generation-layout", "2x2"], "unknown layout '2x2'"),
        (["--layouts", "2x2x2x1:circular:0"], "microbatches = 0: give a positive number"),
    ],
)
def test_wrong_options_are_one_clear_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["certify", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("glm-jax: error:") and error.count("\n") == 1
    assert re.search(message, error), error


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_would_work() -> None:
    config = MODELS["chatglm3-6b"]
    assert isinstance(config, GLMConfig)
    config = dataclasses.replace(config, num_heads=6, num_kv_groups=2)
    with pytest.raises(UserError, match=r"num_heads = 6 .* tensor 8: .* 1, 2, 3, 6"):
        list(certify(config, {"tp": Case(get_layout("tp", 8))}, ["sft"]))
