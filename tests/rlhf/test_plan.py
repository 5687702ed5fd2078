"""Plans: which layouts there are, what rules out the others, and what is told of the rest."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from glm_jax.config import PRESETS, GLMConfig
from rlhf.cli import main
from rlhf.plan import memo, worker
from rlhf.plan import plan as planning
from rlhf.plan.cache import Cache, Entry, cache_key
from rlhf.plan.candidates import find, layouts
from rlhf.plan.page import cells, plan_table, report, write_page
from rlhf.plan.plan import Plan, Task, plan, smallest
from rlhf.plan.recipe import write_recipe
from rlhf.plan.rough import rough
from rlhf.plan.sizes import layer_weights, num_weights
from rlhf.plan.verdict import ProgramVerdict, Request, Verdict, as_json, ask, from_json
from rlhf.programs import Workload, programs
from rlhf.recipe import Recipe, check
from rlhf.recipe_file import load_recipe
from sharding import described
from sharding.chips import GIB, Pod, find_pod
from sharding.described import compiler_version, missing_compiler
from sharding.errors import UserError
from sharding.layout import Layout, parse_layout, spell_layout
from sharding.pipeline import layer_slots, num_ticks

CHATGLM3 = dataclasses.replace(PRESETS["chatglm3-6b"], compute_dtype="bfloat16")
WORK = Workload(512, 1024, 1024)
POD = find_pod("v5e:16x16")
TASK = Task("sft", "chatglm3-6b", CHATGLM3, WORK)


def test_every_factorisation_of_the_pod_is_looked_at() -> None:
    pod = find_pod("v5e:2x2")
    found = {spell_layout(layout) for layout in layouts(pod, 64, 28)}
    sizes = {name.split(":")[0] for name in found}
    assert len(sizes) == 10  # 4 = p d f t: ordered factorisations of 4 into four
    assert {"2x1x2x1:gpipe:2:1", "2x1x2x1:circular:2:2", "2x1x2x1:gpipe:8:1"} <= found


@pytest.mark.parametrize(
    ("config", "work", "pod", "reason"),
    [
        (CHATGLM3, WORK, "v5e:16x16", "pipe x repeats above the 28 layers"),
        (CHATGLM3, WORK, "v5e:16x16", "memory: more than 15.75 GiB a device"),
        (CHATGLM3, Workload(96, 1024, 1024), "v5e:16x16", "batch: 96 rows do not divide"),
        (CHATGLM3, WORK, "v5e:16x16:2", "slices: data is no multiple of 2"),
        (GLMConfig(512, 128, 2, 2, 2, 32, 256), WORK, "v5e:4x4", "model.num_heads = 2"),
    ],
)
def test_what_cannot_be_is_ruled_out_with_its_reason(
    config: GLMConfig, work: Workload, pod: str, reason: str
) -> None:
    found = find("sft", config, work, find_pod(pod))
    assert any(text.startswith(reason) for text in found.ruled_out), found.ruled_out
    total = sum(found.ruled_out.values()) + len(found.candidates)
    assert total == len(list(layouts(find_pod(pod), work.batch, config.num_layers)))


def test_only_data_crosses_slices() -> None:
    found = find("sft", CHATGLM3, WORK, find_pod("v5e:16x16:2"))
    assert found.candidates and all(one.layout.data % 2 == 0 for one in found.candidates)


def test_weights_are_counted_as_the_model_has_them() -> None:
    # 6.24e9 with norms and biases
    assert num_weights(CHATGLM3) == pytest.approx(6_243_584_000, rel=1e-3)
    assert num_weights(PRESETS["chatglm-6b"]) == pytest.approx(6_173_286_400, rel=1e-3)


def test_the_rough_count_knows_what_costs_what() -> None:
    def of(name: str, **changes: Any) -> Any:
        layout = dataclasses.replace(parse_layout(name), **changes)
        return rough("sft", CHATGLM3, layout, WORK, POD)

    full, none = of("1x1x256x1", remat="full"), of("1x1x256x1")
    # 28 layers are made again, but for their last product
    again = 28 * (layer_weights(CHATGLM3) - 4096 * 13696)
    all_of = 3 * 28 * layer_weights(CHATGLM3) + 4 * 4096 * 65024
    assert full.seconds["products"] == pytest.approx(
        none.seconds["products"] * (1 + again / all_of), rel=1e-6
    )
    assert full.memory["activations"] < none.memory["activations"] / 5
    model = full.memory["model and optimizer"]
    assert model == pytest.approx(12 * num_weights(CHATGLM3) / 256, rel=1e-3)
    assert of("1x4x64x1").memory["model and optimizer"] == pytest.approx(4 * model, rel=1e-3)
    tensor = of("1x1x64x4", remat="full")
    assert tensor.seconds["activations"] > 10 * full.seconds["activations"]
    # of eleven ticks eight are of use
    pipe = of("4x1x64x1:gpipe:8:1", remat="full")
    assert pipe.seconds["attention"] == pytest.approx(11 / 8 * full.seconds["attention"])


def test_of_ppo_drawing_answers_is_a_part() -> None:
    layout = parse_layout("1x1x256x1")
    work = Workload(256, 512, 512)
    moved = rough("ppo", CHATGLM3, layout, work, POD)
    kept = rough("ppo", CHATGLM3, layout, work, POD, parse_layout("1x64x1x4"))
    assert 0 < kept.rollout_s < moved.rollout_s < moved.step_s  # which gathers weights every token
    assert {"reference", "critic and optimizer", "reward model"} <= set(kept.memory)


def test_the_memory_of_ppo_is_that_of_its_fullest_moment() -> None:
    layout, work = parse_layout("1x1x256x1"), Workload(256, 512, 512)
    sampling = parse_layout("1x64x1x4")
    learning, drawing = (
        rough("ppo", CHATGLM3, dataclasses.replace(layout, remat=remat), work, POD, sampling).memory
        for remat in ("none", "full")
    )
    assert "gradients" in learning and "keys and values" not in learning
    assert "gradients" not in drawing and sum(drawing.values()) < sum(learning.values())
    # a quarter of a policy in bfloat16, of whose embedding rows are looked up in float32
    held = (2 * num_weights(CHATGLM3) + 2 * 65024 * 4096) / 4
    assert drawing["policy that samples"] == pytest.approx(held, rel=1e-6)
    # of four rows 28 layers' keys and values; of the two groups of heads each shard has one
    assert drawing["keys and values"] == 4 * 28 * 2 * 1024 * 128 * 2


def program(**changes: Any) -> ProgramVerdict:
    fields: dict[str, Any] = {
        "name": "update",
        "runs": 1,
        "tokens": 512 * 2048,
        "model_flops": 10**16,
        "fits": True,
        "peak_bytes": 3 * GIB,
        "beside_bytes": 0,
        "step_s": 1.25,
        "exposed_s": 0.25,
    }
    return ProgramVerdict(**{**fields, **changes})


def told(*verdicts: Verdict, top: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan whose compiler says this, one after the other; asked once more it would fail."""
    waiting = iter(verdicts)
    asked: list[Request] = []

    def verdict(request: Request, cache: Path) -> Verdict:
        asked.append(request)
        return next(waiting)

    monkeypatch.setattr(planning, "ask_once", verdict)
    return plan(TASK, POD, Path("nowhere"), top)


def test_the_compiler_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Verdict((program(step_s=2.0),), {"policy": GIB})
    large = program(fits=False, peak_bytes=20 * GIB, step_s=0.0)
    full = Verdict((program(name="critic update"), large), {"start": 6 * GIB})
    fast = Verdict((program(),), {"policy": GIB})
    broken = Verdict((), {}, "the compiler failed: Aborted")
    # what does not fit does not count among the two
    found = told(slow, full, broken, fast, top=2, monkeypatch=monkeypatch)
    assert [one.verdict for one in found.judged] == [fast, slow, full, broken]
    assert found.best is not None and found.best.verdict == fast
    rows = [cells(one, found) for one in found.judged]
    assert rows[0][3:8] == ["1.250", f"{512 * 2048 / 1.25:,.0f}", "15.9%", "3.00", "0.250"]
    assert rows[2][-1].startswith("out of memory in update: 4.25 GiB too much; try")
    assert "start in the host's memory" in rows[2][-1]
    assert rows[2][3:8] == ["–", "–", "–", "20.00", "–"]
    assert rows[3][-1] == "the compiler failed: Aborted"
    assert [row["step_s"] for row in report(found)["layouts"]] == [1.25, 2.0, None, None]
    assert found.judged[2].step_s == found.judged[2].candidate.rough.step_s


def test_what_was_asked_before_of_the_same_code_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, asked = Verdict((program(),), {"policy": GIB}), list[Request]()

    def answer(request: Request, cache: Path) -> Verdict:
        asked.append(request)
        return found

    monkeypatch.setattr(memo, "ask", answer)
    first, other = (Request("sft", CHATGLM3, Layout(fsdp=n), None, WORK, POD) for n in (256, 128))
    assert [memo.ask_once(one, tmp_path) for one in (first, first, other)] == [found] * 3
    assert asked == [first, other]
    broken = Verdict((), {}, "the compiler crashed (SIGKILL): choose another layout")
    monkeypatch.setattr(memo, "ask", lambda request, cache: broken)
    larger = dataclasses.replace(first, workload=Workload(1024, 1024, 1024))
    assert memo.ask_once(larger, tmp_path) == broken  # by chance, perhaps
    monkeypatch.setattr(memo, "ask", answer)
    assert memo.ask_once(larger, tmp_path) == found


def test_a_verdict_is_of_its_code_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("sft", CHATGLM3, Layout(fsdp=256), None, WORK, POD)
    keys: list[str] = []
    for changed in (None, "glm_jax/model.py", "rlhf/sft.py", "sharding/deep/place.py"):
        root = tmp_path / str(len(keys))
        for name in ("glm_jax/model.py", "rlhf/sft.py", "sharding/deep/place.py"):
            (root / name).parent.mkdir(parents=True)
            (root / name).write_text("changed" if name == changed else "")
        keys.append(memo.verdict_key(request, root))
    monkeypatch.setenv("JAX_PLATFORMS", "another, which no compiler of plans is told")
    assert memo.verdict_key(request, tmp_path / "0") == keys[0]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=1")
    keys.append(memo.verdict_key(request, tmp_path / "0"))
    monkeypatch.setattr("importlib.metadata.distributions", list)
    shutil.copytree(tmp_path / "0", tmp_path / "copy")
    keys.append(memo.verdict_key(request, tmp_path / "copy"))
    assert len(set(keys)) == len(keys) == 6


def test_programs_for_other_gpus_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler is told of a GPU is no part of a program's text."""
    mesh = jax.make_mesh((8,), ("x",))
    lowered = jax.jit(lambda x: x).lower(1.0)
    pod = find_pod("h100:8")
    keys = {cache_key(lowered, mesh, pod), cache_key(lowered, mesh, find_pod("v5e:2x4"))}
    monkeypatch.setattr("rlhf.plan.cache.target", lambda chip: "another")
    keys |= {cache_key(lowered, mesh, pod), cache_key(lowered, mesh, find_pod("v5e:2x4"))}
    assert len(keys) == 3


def test_a_step_of_ppo_is_the_sum_of_its_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(
        (
            program(name="generate", step_s=3.0, peak_bytes=GIB, beside_bytes=5 * GIB),
            program(name="actor update", runs=2, step_s=0.5),
        ),
        {"policy": GIB},
    )
    assert verdict.step_s == 4.0 and verdict.rollout_share == 0.75
    assert verdict.peak_bytes == 6 * GIB
    assert verdict.mfu(POD) == pytest.approx(3e16 / (4 * 197e12 * 256))
    assert from_json(json.loads(json.dumps(as_json(verdict)))) == verdict


def test_without_a_compiler_the_rough_count_is_told() -> None:
    found = plan(TASK, find_pod("h100:64"), None, 5)
    steps = [one.step_s for one in found.judged]
    assert not found.compiled and steps == sorted(steps) and len(steps) == 5
    fields = report(found)
    assert fields["layouts"][0]["compiled"] is None and fields["ruled_out"]


def test_the_page_has_pictures_and_reasons(tmp_path: Path) -> None:
    found = plan(TASK, POD, None, 4)
    write_page(found, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "Memory against time" in text and "pipe x repeats above" in text
    assert plan_table(found).row_count == 4


def test_where_nothing_fits_the_smallest_pod_that_would_is_named() -> None:
    task = dataclasses.replace(TASK, workload=Workload(16, 1024, 1024))
    for name in ("v5e:2x2", "v5e:2x4"):
        with pytest.raises(UserError, match=f"fits on {name} .*smallest pod that would: v5e:4x4"):
            plan(task, find_pod(name), None)
    assert plan(task, find_pod("v5e:4x4"), None).best is not None


def test_the_smallest_pod_is_found() -> None:
    task = dataclasses.replace(TASK, objective="smallest", workload=Workload(64, 512, 512))
    found = smallest(task, POD, None)
    assert found.pod.name == "v5e:4x4" and found.best is not None


@pytest.mark.parametrize("job", ["sft", "ppo"])
def test_the_recipe_of_a_plan_is_accepted(job: str, tmp_path: Path) -> None:
    """On the eight devices there are: an H100 host."""
    task = Task(job, "chatglm3-6b", CHATGLM3, Workload(32, 64, 64))
    found = plan(task, find_pod("h100:8"), None, 1)
    write_recipe(found, tmp_path / "found.py")
    recipe, text = load_recipe(tmp_path / "found.py")
    assert isinstance(recipe, Recipe) and "chatglm3-6b on h100:8" in text
    assert "Counted roughly" in text
    layout, generation = check(recipe)
    best = found.judged[0].candidate
    assert spell_layout(layout) == spell_layout(best.layout) and layout.remat == best.layout.remat
    if best.generation is not None:
        assert generation.sizes == best.generation.sizes
    assert recipe.model.compute_dtype == "bfloat16"


class Told(Cache):
    """A cache in whose place the test says what a program needs, the first asked about first."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = list(entries)

    def compiled(self, lowered: jax.stages.Lowered, mesh: Mesh, pod: Pod) -> Entry:
        return self.entries.pop(0)


def test_the_first_program_that_does_not_fit_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates are asked about first; of what is beside a program its size counts too."""
    monkeypatch.setattr(worker, "described_devices", lambda pod: jax.devices())
    config = GLMConfig(512, 128, 2, 4, 2, 32, 256)
    layout, pod = parse_layout("1x1x8x1"), find_pod("v5e:2x4")
    request = Request("ppo", config, layout, None, Workload(16, 64, 64), pod)
    text = "HloModule small\n\nENTRY main (x: f32[]) -> f32[] {\n  ROOT x = f32[] parameter(0)\n}\n"
    small = Entry(GIB, text)
    with jax.set_mesh(layout.mesh(jax.devices())):
        names = [program.name for program in programs("ppo", config, layout, request.workload)]
    cache = Told(small, Entry(pod.chip.memory_bytes, small.text), small)
    found = worker.verdict(request, cache)
    assert [program.name for program in found.programs] == names[-2:]
    assert [program.fits for program in found.programs] == [False, True]
    assert not found.fits and len(cache.entries) == 1
    found = worker.verdict(request, Told(Entry(20 * GIB, None)))
    assert [(program.name, program.fits) for program in found.programs] == [(names[-1], False)]
    found = worker.verdict(request, Told(*[small] * len(names)))
    assert found.fits and [program.name for program in found.programs] == names


@pytest.mark.parametrize("name", ["v5e:2x2", "h100:8", "h100:16"])
def test_the_compiler_is_asked_once(name: str, tmp_path: Path) -> None:
    pod = find_pod(name)
    if compiler_version(pod.chip) is None:
        pytest.skip(missing_compiler(pod.chip))
    config = GLMConfig(512, 128, 2, 4, 2, 32, 256, compute_dtype="bfloat16")
    task = Task("sft", "small", config, Workload(16, 64, 64))
    first = plan(task, pod, tmp_path, 1)
    verdict = first.judged[0].verdict
    assert verdict is not None and verdict.error is None and verdict.fits
    assert verdict.programs[0].kernels_s > 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.gz")}
    again = plan(task, pod, tmp_path, 1)
    assert again.judged == first.judged
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.gz")}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            "--model chatglm3-6 --pod v5e:16x16",
            "unknown model 'chatglm3-6': did you mean chatglm3-6b",
        ),
        (
            "--model chatglm3-6b --pod v5e:16x32",
            "unknown pod 'v5e:16x32': there are such as v5e:16x16",
        ),
        ("--model chatglm3-6b --pod v9:4x4", "no chip 'v9'"),
        ("--model chatglm3-6b --pod v5e:2x2 --rough", "the smallest pod that would: v5e:4x8"),
        ("--model chatglm3-6b --pod v5e:16x16 --batch 0", "batch = 0: give a positive number"),
        ("--model chatglm3-6b --pod v5e:16x16 --top 0", "--top 0: give a positive number"),
        ("--model chatglm3-6b --pod v5e:16x16 --batch 7 --rough", "batch: 7 rows do not divide"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(
    args: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *args.split()]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("glm-jax: error:") and error.count("\n") == 0
    assert line in error


@pytest.mark.parametrize(("pod", "extra"), [("v5e:4x4", "plan"), ("h100:8", "cuda")])
def test_without_a_compiler_the_plan_says_so(
    pod: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(described, "compiler_version", lambda chip: None)
    assert main(["plan", "--model", "chatglm3-6b", "--pod", pod, "--batch", "64"]) == 0
    printed = capsys.readouterr().out
    assert f"(pip install glm-jax[{extra}]): layouts are counted from shapes alone" in printed
    with pytest.raises(UserError, match="no compiler for"):
        described.described_devices(find_pod(pod))


def test_a_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("plan.json", "plan.html", "recipe.py")]
    options = [
        f"--{name}={path}" for name, path in zip(("json", "html", "recipe"), paths, strict=True)
    ]
    args = [
        "plan",
        "--model",
        "chatglm3-6b",
        "--pod",
        "v5e:16x16",
        "--rough",
        "--top",
        "3",
        *options,
    ]
    assert main(args) == 0
    assert all(path.exists() for path in paths)
    rows = json.loads(paths[0].read_text())["layouts"]
    assert len(rows) == 3
    printed = capsys.readouterr().out
    assert all(row["layout"] in printed for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed"
)
def test_the_choice_is_within_five_percent_of_the_best_of_all_layouts(tmp_path: Path) -> None:
    """Every layout of a small model on v5e:4x4 is compiled: 117 programs, half an hour on two idle cores."""
    config = GLMConfig(2048, 512, 2, 4, 2, 128, 1408, compute_dtype="bfloat16")
    task, pod = Task("sft", "small", config, Workload(64, 256, 256)), find_pod("v5e:4x4")
    chosen = plan(task, pod, tmp_path, workers=2).best
    assert chosen is not None
    everything = plan(task, pod, tmp_path, top=10_000, workers=2)
    assert len(everything.judged) == everything.candidates > 100
    fastest = min(one.step_s for one in everything.judged if one.fits)
    assert chosen.step_s <= 1.05 * fastest, everything.best


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed"
)
def test_the_compiler_takes_pipelines_and_tensor_shards_in_every_program(tmp_path: Path) -> None:
    """It crashes on two pipelines of a program whose attention is one function."""
    config = GLMConfig(512, 512, 2, 4, 2, 128, 1024, compute_dtype="bfloat16")
    layout, generation = parse_layout("2x1x4x2:gpipe:2:1"), parse_layout("1x4x1x4")
    request = Request("ppo", config, layout, generation, Workload(64, 64, 64), find_pod("v5e:4x4"))
    found = ask(request, tmp_path)
    assert found.error is None and found.fits


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed"
)
@pytest.mark.parametrize(
    ("model", "pod", "name", "rows", "length"),
    [
        ("chatglm3-6b", "v5e:16x16", "1x1x256x1", 512, 2048),
        ("chatglm3-6b", "v5e:16x16", "4x1x64x1:gpipe:8:1", 512, 2048),
        ("glm-4-32b-0414", "v5p:4x4x4", "1x1x64x1", 128, 4096),
    ],
)
def test_flops_of_the_presets_are_those_of_a_hand_count(
    model: str, pod: str, name: str, rows: int, length: int, tmp_path: Path
) -> None:
    """Of one device under full remat: layers forward twice and backward, in every tick of a pipeline."""
    config = dataclasses.replace(PRESETS[model], compute_dtype="bfloat16")
    layout = dataclasses.replace(parse_layout(name), remat="full")
    half = length // 2
    request = Request(
        "sft", config, layout, None, Workload(rows, half, length - half), find_pod(pod)
    )
    (found,) = ask(request, tmp_path).programs
    tokens = rows * length // layout.ways("batch")
    D, F, heads = config.hidden_size, config.ffn_size, config.num_heads * config.head_dim
    into = D * (heads + 2 * config.num_kv_groups * config.head_dim) + 2 * D * F
    # each is two operations, and its gradient two products; of the last, down to D, nobody asks a second time
    layer = 2 * tokens * (4 * (into + D * heads) + 3 * D * F)
    blocks = length // 512
    pairs = 512 * 512 * blocks * (blocks + 1) // 2  # that a causal mask leaves, in whole blocks
    layer += 9 * 2 * (tokens // length) * pairs * heads  # two products twice, five of the gradient
    head = 4 * 2 * tokens * D * config.vocab_size // layout.ways("vocab")
    ticks = num_ticks(layout) / layout.microbatches  # a stage works in every one
    slots = layer_slots(config.num_layers, layout).shape[1]
    assert found.flops == pytest.approx(slots * ticks * layer + head, rel=0.02)
