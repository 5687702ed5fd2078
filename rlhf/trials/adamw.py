"""AdamW, its clip, decay mask and learning rate in NumPy and float64: a reference for `glm_jax.optim`."""

import math
from collections.abc import Mapping

import numpy as np

from glm_jax.optim import OptimConfig
from rlhf.doctor.adamw import is_decayed, learning_rate

Arrays = Mapping[str, np.ndarray]


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) after a clip of the global norm.

        g <- g min(1, clip / |g|);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        w <- w - rate (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)

    It remembers moments in float64 and takes the weights from the run, so that rounding does not add up.
    """

    def __init__(self, config: OptimConfig, num_updates: int) -> None:
        self.config = config
        self.num_updates = num_updates
        self.position = 0  # in the schedule
        self.done = 0  # updates that the moments have seen
        self._moments: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def update(self, weights: Arrays, gradients: Arrays) -> dict[str, np.ndarray]:
        """Weights after the next update of `weights` along `gradients`, by path.

        A gradient that is not finite changes nothing but the position in the schedule, as in
        `glm_jax.train.make_update`.
        """
        config = self.config
        exact = {name: np.asarray(g, np.float64) for name, g in gradients.items()}
        self.position += 1
        norm = math.sqrt(sum(float(np.sum(g * g)) for g in exact.values()))
        if not math.isfinite(norm):
            return {name: np.asarray(w, np.float64) for name, w in weights.items()}
        self.done += 1
        clip = min(1.0, config.clip_norm / norm) if norm else 1.0
        rate = learning_rate(config, self.position, self.num_updates)
        after = {}
        for name, g in exact.items():
            w = np.asarray(weights[name], np.float64)
            mean, square = self._moments.get(name, (np.zeros_like(w), np.zeros_like(w)))
            mean = config.beta1 * mean + (1.0 - config.beta1) * clip * g
            square = config.beta2 * square + (1.0 - config.beta2) * (clip * g) ** 2
            self._moments[name] = mean, square
            root = np.sqrt(square / (1.0 - config.beta2**self.done))
            step = mean / (1.0 - config.beta1**self.done) / (root + config.eps)
            after[name] = w - rate * (step + config.weight_decay * w * is_decayed(name))
        return after
