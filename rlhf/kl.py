"""KL(pi || pi_0) of the policy from its reference: estimated from samples, and the coefficient that weights it.

The exact one, a sum over the vocabulary, is `glm_jax.loss.token_kl`. All arrays are aligned to the token they speak of
(see glm_jax.loss); a log-ratio is log pi - log pi_0 of a token drawn from pi.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from sharding.errors import UserError

# Nats of a log-ratio from which its exponential grows linearly: e^20 = 4.9e8 is far from float32's 3.4e38 at 88, and
# where others clip (verl 2024).
BOUND = 20.0


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """How the policy is held near its reference; the paper has the term (section 3.2), not its numbers."""

    coef: float = 0.005  # beta, per token; with a target, where it starts. Not in the paper
    # "reward": k1 at every token, as in the paper; "loss": k3 in the actor's loss, as in GRPO. Not in the paper
    place: Literal["reward", "loss"] = "reward"
    # nats/token that the coefficient adapts to while the actor learns; None: fixed. Not in the paper
    target: float | None = None
    horizon: int = 10_000  # answers over which it adapts; not in the paper
    # log-ratios in the reward are clamped to +- this; None: not. Not in the paper (0.5 in its later code)
    log_ratio_clip: float | None = None

    def __post_init__(self) -> None:
        for name, fits in (
            ("coef", self.coef >= 0.0),
            ("target", self.target is None or self.target > 0.0),
            ("horizon", self.horizon >= 1),
            ("log_ratio_clip", self.log_ratio_clip is None or self.log_ratio_clip > 0.0),
        ):
            if not fits:
                raise UserError(f"kl.{name} = {getattr(self, name)} is out of range")
        if self.target is not None and self.place == "loss":
            raise UserError(
                "kl.target adapts the coefficient of the reward: leave it out, or set kl.place to reward"
            )
        if self.target is not None and self.coef == 0.0:
            raise UserError("kl.target scales kl.coef, and 0 stays 0: start from a coefficient > 0")


def k1(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log pi - log pi_0: unbiased, of either sign (Schulman 2020, "Approximating KL divergence")."""
    return log_ratio


def k2(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(log pi - log pi_0)^2 / 2: biased, >= 0, its gradient is that of the KL (Schulman 2020)."""
    return 0.5 * log_ratio**2


def k3(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """pi_0 / pi - 1 - log(pi_0 / pi): unbiased and >= 0 (Schulman 2020).

    From e^`BOUND` on pi_0 / pi is continued along its tangent, as in `bounded_exp`.
    """
    below = jnp.minimum(-log_ratio, BOUND)
    return jnp.expm1(below) + jnp.exp(below) * (-log_ratio - below) + log_ratio


def bounded_exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """e^x, from `BOUND` nats on continued along its tangent: value and gradient are finite up to x = 7e29.

    Clipping x there would make the gradient 0 where it matters most.
    """
    below = jnp.minimum(x, BOUND)
    return jnp.exp(below) * (1.0 + (x - below))


def adapted(coef: float, kl: float, config: KLConfig, num_answers: int) -> float:
    """The coefficient after `num_answers` answers whose mean KL was `kl` nats/token; the same without a target.

    beta' = beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) (Ziegler et al. 2019, section 2.2); of more answers
    than the horizon the horizon counts.
    """
    if config.target is None:
        return coef
    error = min(max(kl / config.target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * min(1.0, num_answers / config.horizon))
