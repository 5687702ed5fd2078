"""Schedules of PPO's actor and critic and its KL coefficient, through whole runs of updates of one number."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rlhf.ppo_loop
from glm_jax.batch import Prompts, Sequences
from glm_jax.optim import OptimConfig
from glm_jax.sampler import Sampler
from glm_jax.train import TrainState, init_state, make_update
from rlhf.kl import KLConfig
from rlhf.ppo import Experience, Models, PPOConfig
from rlhf.ppo_iteration import Inputs, Iteration, Learners, Listener, Midway, RolledOut, Updates
from rlhf.ppo_loop import make_optimizers, train_ppo
from sharding.errors import UserError
from sharding.layout import Layout

LAYOUT = Layout()
PEAKS = {"actor": 1e-3, "critic": 3e-3}
FAR = 1.0  # a k3 that ends an iteration
Where = tuple[int, int, str]  # iteration and update, from 1, and role


@pytest.fixture(scope="module", autouse=True)
def _mesh() -> Iterator[None]:
    with jax.set_mesh(LAYOUT.mesh()):
        yield


@dataclasses.dataclass
class Run:
    """PPO whose models are one weight each; gradients of -1 make a weight's change its learning rate.

    Attributes:
        far_after: iteration -> updates after which the policy has gone far.
        bad: updates whose gradient is not finite.
        slopes: gradients other than -1, in the order of the actor's updates.
        rates: learning rates of all updates that are made.
    """

    config: PPOConfig
    far_after: Mapping[int, int] = dataclasses.field(default_factory=dict)
    bad: set[Where] = dataclasses.field(default_factory=set)
    slopes: list[float] = dataclasses.field(default_factory=list)
    rates: dict[Where, float] = dataclasses.field(default_factory=dict)
    iteration: int = 0
    update: int = 0  # that is made next

    def __post_init__(self) -> None:
        optimizers = make_optimizers(self.config)
        updates = [
            self._updates(role, optimizer)
            for role, optimizer in zip(PEAKS, optimizers, strict=True)
        ]
        actor, critic = (init_state(OneWeight(), optimizer) for optimizer in optimizers)
        self.learners = Learners(actor, critic, self.config.kl.coef)
        sample, unused = Mock(spec=Sampler), Mock()
        self.iterate = Iteration(self.config, sample, LAYOUT, unused, *updates)

    def _updates(self, role: str, optimizer: Any) -> Any:
        def loss(model: Any, rows: Any, _: Any) -> tuple[jax.Array, dict[str, Any]]:
            return model.w_only * rows, {}

        program = make_update(loss, lambda _: None, optimizer, LAYOUT)

        def update(state: TrainState, _: Any) -> tuple[TrainState, dict[str, Any]]:
            where = (self.iteration, self.update, role)
            before = float(state.model.w_only)
            slope = self.slopes.pop(0) if role == "actor" and self.slopes else -1.0
            state, metrics = program(state, jnp.float32(math.nan if where in self.bad else slope))
            if where not in self.bad:
                self.rates[where] = float(state.model.w_only) - before
            far = self.update >= self.far_after.get(self.iteration, math.inf)
            metrics = {**metrics, "approx_kl": jnp.float32(2 * FAR * far)}
            return state, metrics

        return update

    def finish(self, midway: Midway, listener: Listener, kl: float) -> float:
        """Conclude the current iteration, whose answers have this KL, and give its coefficient."""
        midway = midway._replace(rolled_out=midway.rolled_out._replace(figures={"kl": kl}))
        self.learners, figures, _ = self.iterate.finish(
            self.learners,
            midway,
            itertools.repeat(Sequences(*[np.zeros((1, 1), np.int32)] * 3)),
            jax.random.key(self.iteration),
            self.iteration > self.config.critic_warmup,
            listener,
        )
        return figures["kl_coef"]


class Leaving(Listener):
    """Counts updates; leaves out those whose gradient is not finite; remembers how to resume after one of them."""

    def __init__(self, run: Run, remember: int | None = None) -> None:
        self._run = run
        self._remember = remember
        self.found: tuple[Learners, Updates] | None = None

    def midway(self, learners: Learners, midway: Midway) -> None:
        self._run.update += 1
        if len(midway.updates) == self._remember:
            actor, critic = jax.tree.map(jnp.copy, learners[:2])
            self.found = Learners(actor, critic, learners.kl_coef), list(midway.updates)

    def skip(self, update: int, role: str, model: Any, batch: Any) -> bool:
        return True


class OneWeight(nnx.Module):
    """A model that is a number."""

    def __init__(self) -> None:
        self.w_only = jnp.float32(0.0)


def _rolled_out() -> RolledOut:
    experience = Experience(*[jnp.zeros((4, 1))] * len(Experience._fields))  # type: ignore[arg-type]
    return RolledOut(None, experience, {"kl": 0.0}, 1)


def _config(iterations: int, warmup: int, epochs: int, minibatches: int, **more: Any) -> PPOConfig:
    optim = OptimConfig(warmup_fraction=0.2, weight_decay=0.0, beta1=0.0, beta2=0.0, eps=1e-12)
    return PPOConfig(
        iterations=iterations,
        critic_warmup=warmup,
        epochs=epochs,
        minibatches=minibatches,
        batch_size=4,
        actor=dataclasses.replace(optim, learning_rate=PEAKS["actor"]),
        critic=dataclasses.replace(optim, learning_rate=PEAKS["critic"]),
        **more,
    )


def _rate(position: int, updates: int, peak: float) -> float:
    """Update `position` of `updates`, both from 1."""
    warm = max(1, round(0.2 * updates))
    if position <= warm:
        return peak * position / warm
    share = (position - warm) / (updates - warm)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def _expected(config: PPOConfig, where: Where) -> float:
    iteration, update, role = where
    first = config.critic_warmup if role == "actor" else 0
    each = config.epochs * config.minibatches
    position = (iteration - 1 - first) * each + update
    return _rate(position, (config.iterations - first) * each, PEAKS[role])


# a weight that has grown to 0.1 by 1e-5 is rounded by 4e-9, and Adam's direction is 1 to 1e-6
ATOL = 2e-8


@settings(max_examples=5, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(0, 3),
    st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    st.dictionaries(st.integers(1, 7), st.integers(1, 3)),
    st.sets(st.tuples(st.integers(1, 7), st.integers(1, 4), st.sampled_from(list(PEAKS)))),
)
@example(6, 3, (2, 2), {}, set())
@example(6, 2, (2, 2), {3: 1, 5: 2}, set())
@example(6, 2, (2, 2), {6: 1}, {(1, 2, "critic"), (4, 1, "actor"), (6, 1, "actor")})
def test_a_rate_depends_on_the_iteration_and_the_update_alone(
    iterations: int,
    warmup: int,
    counts: tuple[int, int],
    far_after: dict[int, int],
    bad: set[Where],
) -> None:
    """Not on what was cut off by stop_kl, left out as not finite, or made while the actor was frozen."""
    warmup = min(warmup, iterations - 1)
    config = _config(iterations, warmup, *counts, stop_kl=FAR)
    # an actor's update left out has no KL that could end the iteration
    bad = {x for x in bad if x[2] == "critic" or x[1] != far_after.get(x[0])}
    run = Run(config, far_after, bad)
    made = set()
    for number in range(1, iterations + 1):
        run.iteration, run.update = number, 1
        run.finish(Midway(_rolled_out(), []), Leaving(run), 0.0)
        last = counts[0] * counts[1]
        if number > warmup:
            last = min(last, far_after.get(number, last))
        made |= {
            (number, update, role)
            for update in range(1, last + 1)
            for role in PEAKS
            if role == "critic" or number > warmup
        }
    assert run.rates.keys() == made - bad
    for where, rate in run.rates.items():
        assert rate == pytest.approx(_expected(config, where), rel=1e-4, abs=ATOL), where
    # the numbers that a checkpoint holds: where the next iteration would begin
    each = counts[0] * counts[1]
    assert run.learners.critic is not None
    assert int(run.learners.critic.step) == iterations * each
    assert int(run.learners.actor.step) == (iterations - warmup) * each


@pytest.mark.parametrize("point", [1, 2, 3, 4])
def test_an_iteration_resumed_within_moves_the_schedule_as_far(point: int) -> None:
    config = _config(2, 0, 2, 2, stop_kl=FAR)
    for far_after in ({1: 3}, {1: 1}, {}):
        run = Run(config, far_after)
        run.iteration, run.update = 1, 1
        listener = Leaving(run, remember=point)
        run.finish(Midway(_rolled_out(), []), listener, 0.0)
        whole, run.rates = jax.device_get(run.learners), {}
        if listener.found is None:
            continue
        run.learners, done = listener.found
        run.update = point + 1
        run.finish(Midway(_rolled_out(), done), Leaving(run), 0.0)
        jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(run.learners))
        assert int(whole.actor.step) == 4


def test_the_kl_coefficient_adapts_only_while_the_actor_learns() -> None:
    kl = KLConfig(coef=0.1, target=0.5, horizon=8)
    run = Run(_config(9, 4, 1, 2, kl=kl))
    coefs = []
    for number, divergence in enumerate([0.0, 0.0, 0.0, 5.0, 0.0, 0.5, 5.0, 0.55, 0.45], 1):
        run.iteration, run.update = number, 1
        coefs.append(run.finish(Midway(_rolled_out(), []), Leaving(run), divergence))
    # 4 answers of a horizon of 8: half of the error, which is at most 0.2 either way
    factors = [1.0] * 5 + [0.9, 1.0, 1.1, 1.05]
    assert coefs == pytest.approx(list(np.cumprod(factors) * 0.1))
    assert run.learners.kl_coef == pytest.approx(coefs[-1] * 0.95)


def _plain(function: Any) -> Any:
    """Without the check of types at run time, which knows no stubs."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def test_the_loop_hands_every_iteration_what_the_last_one_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Learners with their moments go on, the models they began from stay, and no two iterations share a key."""
    seen: list[tuple[Any, Any, tuple[int, ...], bool]] = []
    left = [Mock() for _ in range(6)]

    def iterate(learners: Any, models: Any, _: Any, key: Any, learns: bool, __: Any) -> Any:
        seen.append((learners, models, tuple(jax.random.key_data(key).tolist()), learns))
        return left[len(seen)], {}, 0

    saves, models = Mock(), Mock()
    saves.restored.return_value = (left[0], None)
    monkeypatch.setattr(rlhf.ppo_loop, "_Saves", lambda *_: saves)
    monkeypatch.setattr(rlhf.ppo_loop, "make_iteration", lambda *_: iterate)
    prompts = Mock(row=np.zeros(4, np.int32))
    sample = Mock(generation=LAYOUT)
    loop = (itertools.repeat(prompts), None, np.zeros(1), sample, 2, jax.random.key(0), LAYOUT)
    _plain(train_ppo)(models, _config(5, 3, 1, 2), *loop, Mock())
    assert [learners for learners, *_ in seen] == left[:5]
    assert all(found is models for _, found, *_ in seen)
    assert len({key for _, _, key, _ in seen}) == 5
    assert [learns for *_, learns in seen] == [False, False, False, True, True]


def test_an_iteration_samples_and_shuffles_with_keys_of_its_own() -> None:
    keys: list[tuple[int, ...]] = []

    def note(key: jax.Array) -> None:
        keys.append(tuple(jax.random.key_data(key).tolist()))

    class Noting(Iteration):
        def roll_out(self, learners: Any, models: Any, inputs: Any, key: Any) -> Any:
            note(key)
            return learners, _rolled_out()

        def learn(self, learners: Any, midway: Any, sft: Any, key: Any, *_: Any) -> Any:
            note(key)
            return learners, []

    run = Run(_config(2, 0, 1, 1))
    plain = run.iterate
    iterate = Noting(plain.config, plain.sample, LAYOUT, Mock(), Mock(), Mock())
    blank = np.zeros((1, 1), np.int32)
    inputs = Inputs(Prompts(blank, blank, blank[0]), np.zeros(1, np.float32), iter(()))
    models: Any = Models(None, None, None, None)  # type: ignore[arg-type]
    for number in range(3):
        iterate(run.learners, models, inputs, jax.random.fold_in(jax.random.key(0), number))
    assert len(set(keys)) == 6


def test_moments_last_from_one_iteration_to_the_next() -> None:
    """The weight after three iterations is that of one run of Adam on all of their gradients."""
    config = _config(3, 0, 1, 2)
    optim = dataclasses.replace(config.actor, beta1=0.9, beta2=0.5, eps=1.0)
    slopes = [-1.0, -0.2, 0.7, -0.5, 0.9, -0.1]  # none is clipped
    run = Run(dataclasses.replace(config, actor=optim), slopes=list(slopes))
    first = second = expected = 0.0
    for number in (1, 2, 3):
        run.iteration, run.update = number, 1
        run.finish(Midway(_rolled_out(), []), Leaving(run), 0.0)
        for update in (1, 2):
            count = 2 * (number - 1) + update
            slope = slopes[count - 1]
            first, second = 0.9 * first + 0.1 * slope, 0.5 * second + 0.5 * slope**2
            root = math.sqrt(second / (1 - 0.5**count))
            rate = _expected(config, (number, update, "actor"))
            expected -= rate * first / (1 - 0.9**count) / (root + 1.0)
        assert float(run.learners.actor.model.w_only) == pytest.approx(expected, rel=1e-5)


def test_a_warmup_that_leaves_the_actor_nothing_is_refused() -> None:
    for warmup in (5, 6):
        with pytest.raises(UserError, match=rf"critic_warmup = {warmup} leaves none .* = 5"):
            _config(5, warmup, 1, 2).check(LAYOUT, LAYOUT)
    _config(5, 4, 1, 2).check(LAYOUT, LAYOUT)
