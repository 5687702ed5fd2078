"""The heart: every job trains to the same weights under every layout as on one device."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_jax.config import PRESETS, Config, GLMConfig
from rlhf import cli
from rlhf.certify import ROWS, Row, Trained, certify, compare, rows_for, train
from rlhf.trials.jobs import JOBS
from rlhf.trials.models import tiny
from sharding.errors import UserError
from sharding.layout import REMATS, Layout, factorisations, get_layout, parse_layout, spell_layout

REPOSITORY = Path(__file__).parents[2]
MODELS = {name: tiny(PRESETS[name]) for name in ("chatglm-6b", "chatglm3-6b", "glm-4-9b-0414")}


@functools.cache
def _reference(job: str, config: Config, rows: int) -> Trained:
    return train(job, config, rows, Layout())


def _row(job: str, config: Config, layout: Layout) -> Row:
    rows = rows_for(layout)
    return compare(job, layout, train(job, config, rows, layout), _reference(job, config, rows))


# every axis, both schedules, more and fewer microbatches than stages, every job and generation
SOME = (
    ("chatglm3-6b", "8x1x1x1:circular:8:2", "sft"),
    ("chatglm3-6b", "1x2x2x2", "sft"),
    ("chatglm3-6b", "4x1x1x2:circular:2:3", "reward"),
    ("chatglm3-6b", "1x1x1x8", "dpo"),
    ("chatglm3-6b", "1x1x4x2", "ppo"),
    ("chatglm3-6b", "2x2x1x2:gpipe:4", "ppo"),
    ("chatglm3-6b", "2x1x2x2:circular", "grpo"),
    ("glm-4-9b-0414", "1x2x1x4", "grpo"),
    ("chatglm-6b", "2x1x2x2:circular:2", "sft"),
    ("chatglm-6b", "1x1x8x1", "reward"),
    ("chatglm-6b", "2x2x2x1:gpipe:1", "dpo"),
    ("glm-4-9b-0414", "1x8x1x1", "sft"),
    ("glm-4-9b-0414", "4x1x2x1:gpipe:2", "sft"),
    ("glm-4-9b-0414", "2x1x1x4:gpipe:2", "reward"),
)


@pytest.mark.parametrize(("model", "layout", "job"), SOME)
def test_some_models_jobs_and_layouts(model: str, layout: str, job: str) -> None:
    row = _row(job, MODELS[model], get_layout(layout, 8))
    assert row.passed, row


def _certify_all(command: tuple[str, str], directory: Path) -> dict[str, Any]:
    jobs, model = command
    report = directory / f"{model}-{jobs}.json"
    options = ["--layouts", "all", "--model", model, "--jobs", jobs, "--json", str(report)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    certify = [sys.executable, "-m", "rlhf.cli", "certify", *options]
    subprocess.run(certify, cwd=REPOSITORY, env=environment, check=False)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.mark.slow
def test_every_job_under_every_factorisation(tmp_path: Path) -> None:
    """30 layouts, 4 jobs, 3 generations, through the command; two at a time, the longest first."""
    commands = itertools.product(("ppo", "sft,reward,dpo"), MODELS)
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(partial(_certify_all, directory=tmp_path), commands))
    assert sum(len(report["rows"]) for report in reports) == 3 * 120
    for report in reports:
        assert report["pass"], [row for row in report["rows"] if not row["pass"]]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_grpo_under_every_factorisation(model: str, tmp_path: Path) -> None:
    report = _certify_all(("grpo", model), tmp_path)
    assert len(report["rows"]) == 30
    assert report["pass"], [row for row in report["rows"] if not row["pass"]]


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("job", ["sft", "dpo"])
def test_accumulated_gradients_are_those_of_the_whole_batch(job: str, accumulate: int) -> None:
    """Rows are ragged: a mean of the pieces' means would not be the mean."""
    layout = Layout(data=2, accumulate=accumulate)
    row = _row(job, MODELS["chatglm3-6b"], layout)
    assert row.passed, row


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_accumulation_within_a_pipeline(job: str) -> None:
    layout = Layout(pipe=2, data=2, tensor=2, microbatches=2, accumulate=2)
    row = _row(job, MODELS["chatglm3-6b"], layout)
    assert row.passed, row


@pytest.mark.parametrize("remat", [remat for remat in REMATS if remat != "none"])
def test_what_is_computed_again_is_the_same(remat: str) -> None:
    layout = Layout(fsdp=2, remat=remat)  # type: ignore[arg-type]
    row = _row("sft", MODELS["glm-4-9b-0414"], layout)
    assert row.passed, row


SIZES = st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4)
# random layouts and shapes; rows and paddings differ with the number of rows that a layout needs
CASES = st.fixed_dictionaries(
    {
        "sizes": SIZES.filter(lambda sizes: 1 < math.prod(sizes) <= 8),
        "microbatches": st.integers(1, 5),
        "repeats": st.integers(1, 3),
        "accumulate": st.sampled_from([1, 1, 2, 3]),
        "remat": st.sampled_from(REMATS),
        "model": st.sampled_from(list(MODELS)),
        "num_layers": st.integers(1, 7),
        "vocab_size": st.integers(61, 70),
        "num_kv_groups": st.sampled_from([1, 2, 4, 8]),
        "ffn_size": st.integers(1, 9).map(lambda n: 8 * n),
        "job": st.sampled_from(["sft", "reward", "dpo"]),
    }
)


def _case(case: dict[str, Any]) -> tuple[Config, Layout]:
    # not in the strategy: type checks draw random numbers, which hypothesis forbids there
    pipe, data, fsdp, tensor = case["sizes"]
    layout = Layout(
        pipe,
        data,
        fsdp,
        tensor,
        microbatches=case["microbatches"] if pipe > 1 else 1,
        repeats=case["repeats"] if pipe > 1 else 1,
        accumulate=case["accumulate"],
        remat=case["remat"],
    )
    config = MODELS[case["model"]]
    names = ["num_layers", "vocab_size"]
    if isinstance(config, GLMConfig):
        names += ["num_kv_groups", "ffn_size"]
    return dataclasses.replace(config, **{name: case[name] for name in names}), layout


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CASES)
def test_random_shapes_under_random_layouts(case: dict[str, Any]) -> None:
    config, layout = _case(case)
    row = _row(case["job"], config, layout)
    assert row.passed, (config, layout, row)


def test_training_moves_the_weights() -> None:
    """What makes equality mean something: the weights that agree are not those of the start."""
    config = MODELS["chatglm3-6b"]
    one, other = (_reference(job, config, ROWS).weights for job in ("sft", "dpo"))
    assert float(np.abs(one[".w_head"] - other[".w_head"]).max()) > 5e-3


def test_factorisations_are_all_of_them() -> None:
    found = list(factorisations(8))
    assert len({tuple(layout.sizes.values()) for layout in found}) == 20
    assert len(found) == len(set(found)) == 30
    assert all(parse_layout(spell_layout(layout)) == layout for layout in found)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Trials that take no time; what they are off by under every layout is what the test puts in."""
    off = {"loss": 0.0, "gradient": 0.0, "weight": 0.0, "recompiles": 0.0}

    def train(job: str, config: Config, rows: int, layout: Layout) -> Trained:
        by = off if layout.num_devices > 1 else dict.fromkeys(off, 0.0)
        if by["loss"] == 7.0:
            raise ValueError("shapes do not fit")
        array = np.array([1.0, -2.0])
        return Trained(
            losses=[{"loss": 2.0 + by["loss"]}],
            gradients=[{".w_q": array, ".w_k": array + by["gradient"]}],
            weights={".w_q": array + by["weight"]},
            recompiles=int(by["recompiles"]),
            collectives=Counter({"all-reduce": 6}),
            temp_bytes=0,
        )

    monkeypatch.setattr("rlhf.certify.train", train)
    return off


@pytest.mark.parametrize(
    ("what", "passes", "fails"),
    [
        ("loss", 1.9e-6, 2.1e-6),
        ("gradient", 0.9e-4, 1.1e-4),
        ("weight", 1.9e-5, 2.1e-5),
        ("recompiles", 0, 1),
        ("loss", 0, float("nan")),
        ("gradient", 0, float("nan")),
        ("weight", 0, float("nan")),
        ("loss", 0, 7.0),
    ],
)
def test_what_passes_and_what_fails(
    fake: dict[str, float], what: str, passes: float, fails: float
) -> None:
    layouts = {"tp": get_layout("tp", 8)}
    for value, expected in ((passes, True), (fails, False)):
        fake[what] = value
        (row,) = certify(MODELS["chatglm3-6b"], layouts, ["sft"])
        assert row.passed is expected, row
    if what == "gradient":
        assert row.grad_worst == ".w_k"
    if fails == 7.0:
        assert row.failure == "ValueError: shapes do not fit"


def test_the_command(
    fake: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["certify", "--layouts", "dp", "2x1x2x2:circular", "--jobs", "sft,ppo"]
    report = tmp_path / "report.json"
    assert cli.main([*command, "--json", str(report)]) == 0
    assert "4 of 4 pass" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["pass"] is True and len(found["rows"]) == 4
    wanted = {
        "layout",
        "job",
        "loss_error",
        "grad_error",
        "grad_worst",
        "weight_error",
        "recompiles",
    }
    assert {*wanted, "pass"} <= found["rows"][3].keys()
    assert found["rows"][3]["layout"] == "2x1x2x2:circular" and found["rows"][3]["job"] == "ppo"
    assert found["rows"][3]["collectives"] == {"all-reduce": 6}
    fake["weight"] = float("nan")
    assert cli.main([*command, "--json", str(report)]) == 1
    assert "FAIL" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["pass"] is False and found["rows"][0]["weight_error"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "sft,kto"], "unknown job 'kto': choose some of sft, reward, dpo, ppo, grpo"),
        (["--model", "chatglm3-6"], "unknown model 'chatglm3-6': did you mean chatglm3-6b"),
        (["--layouts", "ddp"], "unknown layout 'ddp'"),
        (["--layouts", "2x2x2"], "unknown layout '2x2x2'.*PIPExDATAxFSDPxTENSOR"),
        (["--layouts", "2x2x2x2"], "needs 16 devices but has 8"),
        (["--layouts", "2x2x2x1:gpipe:2:2"], "gpipe with 2 repeats"),
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
        list(certify(config, {"tp": get_layout("tp", 8)}, ["sft"]))
