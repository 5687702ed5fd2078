"""Watch iterations of PPO and check them."""

from collections import Counter
from typing import Any

import jax
import numpy as np

from glm_jax.tokenizers import Tokenizer
from rlhf.doctor.checks import OF_ROLLOUT, OF_UPDATE
from rlhf.doctor.evidence import Evidence, Keys, Setting, Table, gather
from rlhf.doctor.finding import FLOAT32, Finding
from rlhf.doctor.minibatches import orders_of
from rlhf.doctor.readers import Readers
from rlhf.doctor.recorder import Losses, Recorder
from rlhf.doctor.updates import Learnt
from rlhf.ppo import Models, PPOConfig
from rlhf.ppo_iteration import (
    UNHEARD,
    Inputs,
    Iteration,
    Learners,
    Listener,
    Midway,
    current_models,
)
from sharding.errors import UserError
from sharding.fingerprint import fingerprint
from sharding.processes import together

WORSE = ("skip", "pass", "warn", "fail")
LOOKS = 2  # iterations that are looked at from the first in which a role learns

Print = tuple[int, int] | None  # of a pytree of arrays; None: its memory is gone


class Doctor:
    """Run iterations as `rlhf.ppo_iteration.Iteration` does, and check them.

    Of several iterations a check keeps its worst finding. An iteration costs about twice as long: networks and
    gradients are computed once more, with no memory beyond that of an experience and of a gradient.
    """

    def __init__(self, iterate: Iteration, setting: Setting, strict: bool) -> None:
        """`strict`: a failed check ends the run, before anything is learnt where it can be seen by then."""
        self.iterate = iterate
        self.setting = setting
        self.strict = strict
        self.findings: dict[str, Finding] = {}
        self.looks = 0
        self._readers = Readers(iterate)
        self._losses = Losses(iterate)
        self._start: dict[str, Print] = {}
        self._probed: set[str] = set()
        self._keys: list[tuple[int, ...]] = []
        self._orders: list[np.ndarray] = []
        self._tokens: np.ndarray | None = None  # of the answers looked at last, -1 elsewhere
        self._rows: np.ndarray | None = None  # of the prompts looked at last
        self._left: tuple[int, dict[str, Print], float] | None = None  # learners after an iteration

    def due(self, number: int) -> bool:
        """Tell whether to check iteration `number`: the first two in which each role learns, and every n-th."""
        config = self.setting.config
        first = number <= LOOKS or 0 < number - config.critic_warmup <= LOOKS
        return first or bool(config.doctor_every and number % config.doctor_every == 0)

    def __call__(
        self,
        learners: Learners,
        models: Models,
        inputs: Inputs,
        key: jax.Array,
        actor_learns: bool = True,
        listener: Listener = UNHEARD,
        number: int | None = None,
    ) -> tuple[Learners, dict[str, float], int]:
        """Run iteration `number` (default: one more than was looked at before).

        Raises UserError where it is strict and a check fails.
        """
        number = self.looks + 1 if number is None else number
        before = _prints(models, learners)
        self._start = self._start or {x: before[x] for x in ("reference", "reward")}
        roles = ["critic"] * (learners.critic is not None) + ["actor"] * actor_learns
        probing = not self._probed.issuperset(roles)
        recorder = Recorder(self.iterate, self._losses, probing)
        words = tuple(np.asarray(jax.random.key_data(key)).reshape(-1).tolist())
        consecutive = self._left is not None and self._left[0] == number - 1
        rows = self._rows if consecutive else None
        keys = Keys(number, words, self._expected_key(number), tuple(self._keys), rows)
        found: list[Evidence] = []

        def rolled_out(midway: Midway) -> None:
            assert recorder.seen is not None
            given = {n: print_of(x) for n, x in recorder.seen[0]._asdict().items() if x is not None}
            evidence = gather(
                self.setting,
                self._readers,
                recorder,
                models,
                inputs,
                midway.rolled_out.figures,
                learners.kl_coef,
                before["actor"] == before["reference"],
                [name for name, x in given.items() if x != before.get(name)],
                self._tokens,
                keys,
                probing,
            )
            found.append(evidence)
            for name, check in OF_ROLLOUT.items():
                self._note(name, check(evidence))
            self._conclude()

        watching = _Watching(listener, rolled_out)
        done = recorder.programs(learners, models, inputs, key, actor_learns, watching)
        after = _prints(models, done[0])
        evidence = found[0]._replace(updates=tuple(recorder.updates), probes=tuple(recorder.probes))
        coefs = learners.kl_coef, done[0].kl_coef
        learnt = self._learnt(number, actor_learns, before, after, recorder, coefs)
        for name, examine in OF_UPDATE.items():
            self._note(name, examine(evidence, learnt))
        self._conclude()
        self.looks += 1
        self._probed.update(roles)
        self._keys.append(words)
        self._orders += orders_of(evidence)
        ids, _, target = evidence.answers.sequences
        self._tokens = np.where(target, ids, -1)
        self._rows = np.asarray(inputs.prompts.row)
        self._left = number, after, done[0].kl_coef
        return done

    def _expected_key(self, number: int) -> tuple[int, ...] | None:
        if self.setting.key is None:
            return None
        folded = jax.random.key_data(jax.random.fold_in(self.setting.key, number))
        return tuple(np.asarray(folded).reshape(-1).tolist())

    def _learnt(
        self,
        number: int,
        actor_learns: bool,
        before: dict[str, Print],
        after: dict[str, Print],
        recorder: Recorder,
        kl_coefs: tuple[float, float],
    ) -> Learnt:
        config = self.setting.config
        each = config.epochs * config.minibatches
        carried: dict[str, bool] = {}
        if self._left is not None and self._left[0] == number - 1:
            left = self._left[1]
            carried = {
                role: before[f"{role} state"] == left[f"{role} state"] for role in _roles(before)
            }
            carried["KL coefficient"] = kl_coefs[0] == self._left[2]
        actor_before = max(0, number - 1 - config.critic_warmup) * each
        start, last = self._start, recorder.last
        return Learnt(
            actor_learns=actor_learns,
            frozen={n: None if after[n] is None else after[n] == x for n, x in start.items()},
            changed={role: after[role] != before[role] for role in _roles(before)},
            carried=carried,
            returned={role: after[f"{role} state"] == x for role, x in last.items()},
            done={"critic": (number - 1) * each, "actor": actor_before},
            kl_coef=kl_coefs[1],
            orders=tuple(self._orders),
        )

    def _note(self, name: str, finding: Finding) -> None:
        known = self.findings.get(name)
        if known is None or WORSE.index(finding.status) >= WORSE.index(known.status):
            self.findings[name] = finding

    def _conclude(self) -> None:
        if self.strict:
            together(self._require_health)  # processes may see different shards

    def _require_health(self) -> None:
        failed = [
            f"{name}: {x.seen}; {x.advice}"
            for name, x in self.findings.items()
            if x.status == "fail"
        ]
        if failed:
            raise UserError(f"the doctor stopped PPO: {' | '.join(failed)}")

    @property
    def summary(self) -> str:
        """One line."""
        counts = Counter(finding.status for finding in self.findings.values())
        worries = [
            f"{name}: {x.seen}; {x.advice}"
            for name, x in self.findings.items()
            if x.status == "warn"
        ]
        return " | ".join([f"doctor: {counts['pass']} checks pass", *worries])


class _Watching(Listener):
    """A listener that also calls back once the iteration is rolled out."""

    def __init__(self, listener: Listener, rolled_out: Any) -> None:
        self._listener = listener
        self._rolled_out = rolled_out

    def midway(self, learners: Learners, midway: Midway) -> None:
        if not midway.updates:
            self._rolled_out(midway)
        self._listener.midway(learners, midway)

    def skip(self, update: int, role: str, model: Any, batch: Any) -> bool:
        return self._listener.skip(update, role, model, batch)


def _roles(prints: dict[str, Print]) -> list[str]:
    return [role for role in ("actor", "critic") if role in prints]


def print_of(tree: Any) -> Print:
    """The fingerprint of a pytree of arrays; None where an update has freed one of them."""
    try:
        return fingerprint(tree)
    except (RuntimeError, ValueError):  # deleted, or donated
        return None


def _prints(models: Models, learners: Learners) -> dict[str, Print]:
    """Fingerprint every model by role, and the weights and optimizer of those that learn."""
    found = {
        name: print_of(model)
        for name, model in current_models(models, learners)._asdict().items()
        if model is not None
    }
    for role in ("actor", "critic"):
        if (state := getattr(learners, role)) is not None:
            found[f"{role} state"] = print_of((state.model, state.opt_state))
    return found


def setting_of(
    config: PPOConfig,
    tokenizer: Tokenizer,
    trained: bool = True,
    table: Table | None = None,
    key: jax.Array | None = None,
) -> Setting:
    """Settings of a run, whose optimizers follow its recipe; limits follow the rounding that is measured."""
    stops = tokenizer.stop_ids, tokenizer.eos_id
    return Setting(config, *stops, FLOAT32, trained, True, table, key)
