"""All checks by name: each recomputes something by other means, and says what differs, where, and likely causes."""

from collections.abc import Callable, Mapping

from rlhf.doctor.advantages import advantages, values
from rlhf.doctor.answers import (
    figures,
    inputs,
    logprobs,
    padding,
    response_mask,
    rollout_logprobs,
    sampled,
    stop_token,
    streams,
    support,
)
from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding
from rlhf.doctor.minibatches import minibatches
from rlhf.doctor.optimizer import optimizer
from rlhf.doctor.rewards import (
    kl_at_the_start,
    kl_estimators,
    reward_scale,
    scores,
    shaped_rewards,
)
from rlhf.doctor.updates import (
    Learnt,
    clips,
    frozen,
    gradient,
    kl_coefficient,
    learning,
    loss_normalisation,
    ratio,
)

OF_ROLLOUT: Mapping[str, Callable[[Evidence], Finding]] = {
    "inputs": inputs,
    "response mask": response_mask,
    "stop token": stop_token,
    "rollout log-probabilities": rollout_logprobs,
    "log-probabilities": logprobs,
    "support": support,
    "sampling": sampled,
    "random streams": streams,
    "KL at the start": kl_at_the_start,
    "KL estimators": kl_estimators,
    "scores": scores,
    "shaped rewards": shaped_rewards,
    "values": values,
    "advantages": advantages,
    "padding": padding,
    "figures": figures,
    "reward scale": reward_scale,
}
OF_UPDATE: Mapping[str, Callable[[Evidence, Learnt], Finding]] = {
    "ratio": ratio,
    "loss normalisation": loss_normalisation,
    "clips": clips,
    "gradient": gradient,
    "minibatches": minibatches,
    "optimizer": optimizer,
    "KL coefficient": kl_coefficient,
    "frozen models": frozen,
    "learning": learning,
}
