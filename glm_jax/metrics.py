"""Metrics of a piece of a batch, and how those of all pieces make that of the whole.

What a loss reports of some rows is their share of the whole batch's figure: shares add up. The two figures for which
that is not so have a class of their own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Peak(NamedTuple):
    """The largest value; of all pieces it is the largest one's."""

    largest: jax.Array


class Deviation(NamedTuple):
    """A standard deviation, as the shares of the mean and of the mean square."""

    mean: jax.Array
    square: jax.Array


Metric = jax.Array | Peak | Deviation
Metrics = dict[str, jax.Array]
Shares = Mapping[str, Metric]


def combined(some: Shares, more: Shares) -> Shares:
    """Of two sets of rows."""

    def both(a: Metric, b: Metric) -> Metric:
        if isinstance(a, Peak):
            return jax.tree.map(jnp.maximum, a, b)
        return jax.tree.map(jnp.add, a, b)

    return {name: both(metric, more[name]) for name, metric in some.items()}


def neutral(like: Mapping[str, Any]) -> Shares:
    """Of no rows: what `combined` changes nothing with. `like` gives the shapes."""

    def none(metric: Any) -> Metric:
        value = -jnp.inf if isinstance(metric, Peak) else 0
        return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), metric)

    return {name: none(metric) for name, metric in like.items()}


def finished(shares: Shares) -> Metrics:
    """The figures, once the shares of all rows are together."""

    def figure(metric: Metric) -> jax.Array:
        if isinstance(metric, Peak):
            return metric.largest
        if isinstance(metric, Deviation):
            return jnp.sqrt(jnp.maximum(metric.square - metric.mean**2, 0.0))
        return metric

    return {name: figure(metric) for name, metric in shares.items()}
