"""Random settings of sampling, dtype, estimator, masks and layout: the doctor stops no sound run."""

import dataclasses
import random

import jax
import pytest

from glm_jax.config import PRESETS
from glm_jax.generate import SamplingConfig
from glm_jax.optim import OptimConfig, make_optimizer
from rlhf.doctor.doctor import Doctor
from rlhf.doctor.evidence import Setting
from rlhf.kl import KLConfig
from rlhf.ppo import PPOConfig
from rlhf.trials.models import ANSWER, STOP_IDS, tiny
from rlhf.trials.ppo import small_ppo
from sharding.layout import Layout

PRESET = ("chatglm3-6b", "chatglm-6b", "glm-4-9b-0414")
LAYOUTS = (Layout(), Layout(data=2), Layout(fsdp=2, tensor=2), Layout(data=2, accumulate=2))
RUNS = 4  # of every setting, each with prompts and random numbers of its own


def setting(seed: int) -> tuple[str, str, PPOConfig, Layout]:
    """A model, a dtype, settings of PPO and a layout."""
    draw = random.Random(seed)
    advantage = draw.choice(["gae", "gae", "rloo", "grpo"])
    in_loss = draw.random() < 0.4
    sampling = SamplingConfig(
        max_new_tokens=ANSWER,
        temperature=draw.choice([0.5, 0.7, 1.0, 1.3]),
        top_k=draw.choice([0, 0, 5, 20]),
        top_p=draw.choice([1.0, 0.95, 0.9, 0.6]),
    )
    kl = KLConfig(
        coef=draw.choice([0.0, 0.05, 0.3]) or 0.01,
        place="loss" if in_loss else "reward",
        target=None if in_loss else draw.choice([None, 0.1]),
        horizon=50,
        log_ratio_clip=None if in_loss else draw.choice([None, 0.5]),
    )
    config = PPOConfig(
        iterations=2,
        batch_size=16,
        samples=1 if advantage == "gae" and draw.random() < 0.5 else 4,
        minibatches=draw.choice([1, 2]),
        epochs=draw.choice([1, 2]),
        stop_kl=draw.choice([None, None, 0.02]),
        critic_warmup=1 if advantage == "gae" and draw.random() < 0.3 else 0,
        advantage=advantage,  # type: ignore[arg-type]
        whiten=draw.random() < 0.3,
        kl=kl,
        entropy_weight=draw.choice([0.0, 0.02]),
        score_clip=draw.choice([5.0, 1.5]),
        truncated=draw.choice(["keep", "penalty", "mask"]),
        gamma=draw.choice([1.0, 0.9]),
        sft_weight=draw.choice([0.0, 0.3]),
        sampling=sampling,
        actor=OptimConfig(
            learning_rate=draw.choice([1e-6, 1e-3, 5e-3]), clip_norm=draw.choice([0.1, 1.0])
        ),
        critic=OptimConfig(learning_rate=1e-3, weight_decay=draw.choice([0.0, 0.1])),
    )
    dtype = draw.choice(["float32", "bfloat16"])
    return draw.choice(PRESET), dtype, config, draw.choice(LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_the_doctor_stops_no_sound_run(seed: int) -> None:
    preset, dtype, config, layout = setting(seed)
    model = dataclasses.replace(tiny(PRESETS[preset]), num_layers=2, compute_dtype=dtype)
    each = config.epochs * config.minibatches
    totals = (config.iterations - config.critic_warmup) * each, config.iterations * each
    optimizers = tuple(
        make_optimizer(x, total)
        for x, total in zip((config.actor, config.critic), totals, strict=True)
    )
    with jax.set_mesh(layout.mesh()):
        iterate, models, _, inputs = small_ppo(
            model, config, (optimizers[0], optimizers[1]), layout
        )
        for run in range(RUNS):
            learners = small_ppo(model, config, (optimizers[0], optimizers[1]), layout).learners
            stop = Setting(config, STOP_IDS, STOP_IDS[0], 1e-4, False, scheduled=True)
            doctor = Doctor(iterate, stop, strict=False)
            for step in range(2):
                learns = step + 1 > config.critic_warmup
                key = jax.random.key(100 * seed + 10 * run + step)
                learners, _, _ = doctor(learners, models, inputs(10 * run + step), key, learns)
            failed = {n: x.seen for n, x in doctor.findings.items() if x.status == "fail"}
            assert not failed, (seed, run, preset, dtype, config, failed)
