"""The programs that are listed are given what training gives them, and what lies in memory has the bytes it says."""

import dataclasses
from typing import Any

import jax
import pytest

from glm_jax.config import PRESETS
from glm_jax.sampler import Sampler
from glm_jax.train import TrainState
from rlhf import shapes
from rlhf.certify import STEPS
from rlhf.ppo import PPOConfig
from rlhf.programs import JOBS, Program, Workload, programs, residents, step_tokens
from rlhf.trials.jobs import JOBS as TRIALS
from rlhf.trials.jobs import Watched
from rlhf.trials.models import ANSWER, PROMPT, place_model, place_scorer, tiny
from sharding.cost import cost
from sharding.errors import UserError
from sharding.hlo import read
from sharding.layout import Layout, get_layout

CONFIG = tiny(PRESETS["chatglm3-6b"])
ROWS = 16
WORKLOAD = Workload(ROWS, PROMPT, ANSWER)
# a trial's iteration has two minibatches of so many rows
PPO, ITERATION = PPOConfig(minibatches=2), Workload(2 * ROWS, PROMPT, ANSWER)


class Given(Watched):
    """A program that remembers what it was given first."""

    def __init__(self, program: Any) -> None:
        super().__init__(program)
        self.args: Any = None

    def __call__(self, *args: Any) -> Any:
        if self.args is None:  # before they are donated
            self.args = jax.tree.map(_noted, args)
        return super().__call__(*args)


@dataclasses.dataclass(frozen=True)
class Noted:
    """An argument: what it is, where it lies, and its bytes on one device."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding | None  # None: it comes from the host, and goes to every device
    num_bytes: int


def _noted(x: Any) -> Noted:
    if not isinstance(x, jax.Array):
        return Noted(x.shape, x.dtype, None, int(x.nbytes))
    device: Any = min(x.sharding.device_set, key=lambda d: d.id)  # type: ignore[attr-defined]
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return Noted(x.shape, x.dtype, x.sharding, 8)
    shards = (shard for shard in x.addressable_shards if shard.device == device)
    return Noted(x.shape, x.dtype, x.sharding, sum(shard.data.nbytes for shard in shards))


def _plain(args: Any) -> Any:
    """Arguments of a trial as training has them: a trial's optimizer keeps the gradient too."""
    state, *others = args
    if isinstance(state, TrainState):
        state = dataclasses.replace(state, opt_state=state.opt_state.inner)
    return (state, *others)


def _same(listed: Program, given: Any) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(listed.args)  # type: ignore[operator]
    for real, shape in zip(jax.tree.leaves(given), jax.tree.leaves(listed.args), strict=True):
        assert (real.shape, real.dtype) == (shape.shape, shape.dtype), listed.name
        if real.sharding is None:
            assert shape.sharding.is_fully_replicated, listed.name
        else:
            assert real.sharding.is_equivalent_to(shape.sharding, len(real.shape)), listed.name


def _bytes(tree: Any) -> int:
    return sum(x.num_bytes for x in jax.tree.leaves(tree))


def _learner(role: str, args: Any) -> dict[str, int]:
    state = args[0]
    return {role: _bytes(state.model), f"{role} optimizer": _bytes((state.step, state.opt_state))}


# under layouts that are certified by default: what a trial compiles there is compiled once
UPDATES = (
    ("sft", "1x2x2x2"),
    ("reward", "4x1x1x2:circular:2:3"),
    ("dpo", "1x1x1x8"),
)


@pytest.mark.parametrize(("job", "name"), UPDATES)
def test_an_update_is_given_what_is_listed(
    job: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.trials.jobs.Watched", Given)
    layout = get_layout(name, 8)
    with jax.set_mesh(layout.mesh()):
        trial = TRIALS[job](CONFIG, ROWS, STEPS, layout)
        next(trial.updates)
        found = residents(job, CONFIG, layout)
        (listed,) = programs(job, CONFIG, layout, WORKLOAD)
        listed.lower()
        place: Any = place_scorer if job == "reward" else place_model
        start = jax.tree.map(_noted, place(CONFIG, layout))
    args = _plain(trial.programs["update"].args)  # type: ignore[attr-defined]
    _same(listed, args)
    role = next(iter(found))
    assert found == {**_learner(role, args), "start": _bytes(start)}
    assert (listed.runs, listed.beside) == (1, ("start",))


@pytest.mark.parametrize("name", ["2x2x1x2:gpipe:4"])
def test_an_iteration_gives_its_programs_what_is_listed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing: dict[str, Given] = {}

    class Watching(Sampler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            for program in ("to_generation", "generate", "to_training"):
                drawing[program.replace("_", " ")] = Given(getattr(self, program))
                setattr(self, program, drawing[program.replace("_", " ")])

    monkeypatch.setattr("rlhf.trials.jobs.Watched", Given)
    monkeypatch.setattr("rlhf.trials.ppo.Sampler", Watching)
    layout = get_layout(name, 8)
    with jax.set_mesh(layout.mesh()):
        trial = TRIALS["ppo"](CONFIG, ROWS, STEPS, layout)
        next(trial.updates)
        found = residents("ppo", CONFIG, layout, PPO)
        listed = {p.name: p for p in programs("ppo", CONFIG, layout, ITERATION, ppo=PPO)}
        for program in listed.values():
            program.lower()
    given: dict[str, Any] = {name: x.args for name, x in drawing.items()}
    given |= {x: trial.programs[y].args for x, y in NAMES.items()}  # type: ignore[attr-defined]
    assert list(listed) == list(given)
    for name, args in given.items():
        _same(listed[name], _plain(args))
    models = given["experience"][0]
    assert found == {
        **_learner("policy", _plain(given["actor update"])),
        **_learner("critic", _plain(given["critic update"])),
        "reference": _bytes(models.reference),
        "reward model": _bytes(models.reward),
    }
    assert [program.runs for program in listed.values()] == [1, 1, 1, 1, 2, 2]
    assert listed["experience"].beside == ("policy optimizer", "critic optimizer")
    (compiled,) = drawing["generate"].compiled.values()
    assert ANSWER in [x.trips for x in cost(read(compiled)).loops if x.times == 1]


NAMES = {
    "experience": "experience_of",
    "critic update": "update_critic",
    "actor update": "update_actor",
}


def test_group_advantages_need_no_critic() -> None:
    layout = Layout(data=4)
    ppo = dataclasses.replace(PPO, advantage="grpo", samples=4, epochs=3)
    with jax.set_mesh(layout.mesh()):
        found = {p.name: p for p in programs("ppo", CONFIG, layout, WORKLOAD, ppo=ppo)}
        assert "critic" not in residents("ppo", CONFIG, layout, ppo)
    assert list(found) == ["generate", "experience", "actor update"]
    assert found["actor update"].runs == 6
    _, asked, seeds, _ = found["generate"].args
    assert (asked.ids.shape, seeds.shape) == ((ROWS // 4, PROMPT), (ROWS // 4, 4))


def test_a_policy_that_computes_in_bfloat16_lies_beside_its_copy_that_samples() -> None:
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    layout, generation = Layout(fsdp=8), Layout(data=2, tensor=4)
    with jax.set_mesh(layout.mesh()):
        found = {p.name: p for p in programs("ppo", config, layout, ITERATION, generation, ppo=PPO)}
        enter, draw = found["to generation"], found["generate"]
        moved = jax.eval_shape(enter.function, *enter.args)
    assert "to training" not in found
    assert "policy" in draw.beside and "policy" not in enter.beside
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(moved)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(draw.args[0])
    ]
    assert {str(x.dtype) for x in jax.tree.leaves(moved)} == {"bfloat16", "float32"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["chatglm-6b", "glm-4-9b-0414"])
@pytest.mark.parametrize("name", ["dp", "tp", "hsdp", "4x1x1x2:gpipe:2"])
@pytest.mark.parametrize("job", JOBS)
def test_every_program_can_be_compiled(job: str, name: str, model: str) -> None:
    layout = get_layout(name, 8)
    with jax.set_mesh(layout.mesh()):
        for program in programs(job, tiny(PRESETS[model]), layout, WORKLOAD):
            memory: Any = program.lower().compile().memory_analysis()
            assert 0 < memory.argument_size_in_bytes <= shapes.num_bytes(program.args)


def test_a_real_model_takes_no_memory() -> None:
    layout = Layout(fsdp=8, remat="full")
    with jax.set_mesh(layout.mesh()):
        before = len(jax.live_arrays())
        found = programs("ppo", PRESETS["chatglm3-6b"], layout, Workload(64, 512, 512))
        sizes = residents("ppo", PRESETS["chatglm3-6b"], layout)
        assert len(jax.live_arrays()) == before
    assert sizes["policy optimizer"] == pytest.approx(2 * 4 * 6_243_584_000 / 8, rel=1e-3)
    tokens = 64 * 1024
    by_name = {program.name: program for program in found}
    matmuls = 6_243_584_000 - 65024 * 4096  # of the embedding rows are looked up
    assert by_name["actor update"].flops == pytest.approx(6 * matmuls * tokens, rel=0.02)
    assert step_tokens("ppo", Workload(64, 512, 512)) == tokens


@pytest.mark.parametrize(
    ("job", "layout", "workload", "message"),
    [
        ("kto", Layout(), WORKLOAD, "unknown job 'kto': choose some of sft, reward, dpo, ppo"),
        ("sft", Layout(data=8), Workload(12, 6, 6), "batch = 12 does not divide over 8"),
        ("ppo", Layout(data=8), Workload(8, 6, 6), "ppo.batch_size / ppo.minibatches = 4"),
        ("dpo", Layout(data=8), Workload(8, 6, 6, 4), "sft_batch = 4 does not divide"),
        ("sft", Layout(), Workload(8, 60, 6), "66 tokens exceed the context"),
        ("ppo", Layout(), Workload(8, 60, 4), "65 tokens exceed the context"),
        ("sft", Layout(fsdp=3), WORKLOAD, "model.hidden_size = 32 does not divide"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    job: str, layout: Layout, workload: Workload, message: str
) -> None:
    with (
        jax.set_mesh(layout.mesh()),
        pytest.raises(UserError, match=message.replace("(", r"\(")) as error,
    ):
        programs(job, CONFIG, layout, workload, ppo=PPO)
    assert "\n" not in str(error.value)


def test_a_workload_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="response_length = 0: give a positive number"):
        Workload(8, 4, 0)
