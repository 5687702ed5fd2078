"""All checks by name: each recomputes something by other means, and says what is wrong and which field to change."""

from collections.abc import Callable, Mapping

from rlhf.doctor.advantages import advantages, values
from rlhf.doctor.answers import padding, response_mask, rollout_logprobs, stop_token, support
from rlhf.doctor.evidence import Evidence, Learnt
from rlhf.doctor.finding import Finding
from rlhf.doctor.rewards import (
    kl_at_the_start,
    kl_estimators,
    reward_scale,
    scores,
    shaped_rewards,
)
from rlhf.doctor.updates import frozen, learning, loss_normalisation, ratio

OF_ROLLOUT: Mapping[str, Callable[[Evidence], Finding]] = {
    "response mask": response_mask,
    "stop token": stop_token,
    "rollout log-probabilities": rollout_logprobs,
    "support": support,
    "KL at the start": kl_at_the_start,
    "KL estimators": kl_estimators,
    "scores": scores,
    "shaped rewards": shaped_rewards,
    "values": values,
    "advantages": advantages,
    "padding": padding,
    "reward scale": reward_scale,
}
OF_UPDATE: Mapping[str, Callable[[Evidence, Learnt], Finding]] = {
    "ratio": ratio,
    "loss normalisation": loss_normalisation,
    "frozen models": frozen,
    "learning": learning,
}
