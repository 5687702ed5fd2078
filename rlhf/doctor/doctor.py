"""Watch iterations of PPO and check them."""

from collections import Counter
from collections.abc import Mapping
from functools import partial

import jax

from glm_jax.scalar import apply_scalar
from glm_jax.tokenizers import Tokenizer
from glm_jax.train import to_host
from rlhf.doctor.checks import OF_ROLLOUT, OF_UPDATE
from rlhf.doctor.evidence import Learnt, Setting, gather
from rlhf.doctor.finding import Finding
from rlhf.ppo import Models, PPOConfig
from rlhf.ppo_iteration import (
    UNHEARD,
    Inputs,
    Iteration,
    Learners,
    Listener,
    Midway,
    current_models,
    minibatches,
)
from sharding.errors import UserError
from sharding.fingerprint import fingerprint

WORSE = ("skip", "pass", "warn", "fail")
TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.1}


class Doctor:
    """An iteration that is looked at while it goes; does what `rlhf.ppo_iteration.Iteration` does, and finds out.

    Of several iterations a check keeps its worst finding. What it costs: once more through reward model and critic, and
    a second experience with the padding on the other side; no memory beyond an experience.
    """

    def __init__(self, iterate: Iteration, setting: Setting, strict: bool) -> None:
        """`strict`: a failed check ends the run, before anything is learnt where it can be seen by then."""
        self.iterate = iterate
        self.setting = setting
        self.strict = strict
        self.findings: dict[str, Finding] = {}
        self._apply = jax.jit(partial(apply_scalar, layout=iterate.layout))
        self._start: Prints = {}
        self._updates: Counter[str] = Counter()

    def __call__(
        self,
        learners: Learners,
        models: Models,
        inputs: Inputs,
        key: jax.Array,
        actor_learns: bool = True,
        listener: Listener = UNHEARD,
    ) -> tuple[Learners, dict[str, float], int]:
        """The iteration. Raises UserError where it is strict and a check fails."""
        sample_key, shuffle_key = jax.random.split(key)
        iterate, before = self.iterate, _prints(models, learners)
        self._start = self._start or before
        learners, rolled_out = iterate.roll_out(learners, models, inputs, sample_key)
        same = before["actor"] == before["reference"]
        evidence = gather(
            self.setting, iterate, self._apply, learners, models, inputs, rolled_out, same
        )
        for name, check in OF_ROLLOUT.items():
            self._note(name, check(evidence))
        self._conclude()
        learners, updates = iterate.learn(
            learners,
            Midway(rolled_out, []),
            inputs.sft_batches,
            shuffle_key,
            actor_learns,
            listener,
        )
        after = _prints(models, learners)
        learn = [name for name in ("actor", "critic") if name in after]
        self._updates.update(
            {name: len(updates) for name in learn if name != "actor" or actor_learns}
        )
        learnt = Learnt(
            next(minibatches(shuffle_key, self.setting.config)),
            to_host(updates[0]),
            {
                name: None if after[name] is None else after[name] == before[name]
                for name in ("reference", "reward")
            },
            {name: after[name] != self._start[name] for name in learn},
            self._updates,
        )
        for name, examine in OF_UPDATE.items():
            self._note(name, examine(evidence, learnt))
        self._conclude()
        return iterate.concluded(learners, rolled_out, updates, actor_learns)

    def _note(self, name: str, finding: Finding) -> None:
        known = self.findings.get(name)
        # that something has changed at last is what counts, all else must hold every time
        if (
            known is None
            or name == "learning"
            or WORSE.index(finding.status) >= WORSE.index(known.status)
        ):
            self.findings[name] = finding

    def _conclude(self) -> None:
        failed = [
            f"{name}: {x.seen}; {x.advice}"
            for name, x in self.findings.items()
            if x.status == "fail"
        ]
        if failed and self.strict:
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


Prints = dict[str, tuple[int, int] | None]  # of models by role; None: its memory is gone


def _prints(models: Models, learners: Learners) -> Prints:
    found: Prints = {}
    current = current_models(models, learners)
    for name, model in current._asdict().items():
        if model is None:
            continue
        try:
            found[name] = fingerprint(model)
        except (RuntimeError, ValueError):  # deleted, or donated, by an update
            found[name] = None
    return found


def setting_of(
    config: PPOConfig, tokenizer: Tokenizer, compute_dtype: str, trained: bool = True
) -> Setting:
    """What a run's evidence is seen against; log-probabilities may differ by the rounding of the compute dtype."""
    tolerance = TOLERANCE.get(compute_dtype, 1e-4)
    return Setting(config, tokenizer.stop_ids, tokenizer.eos_id, tolerance, trained)
