"""The submission of a job that started a process: the same after a requeue, another when a user submits again."""

import os
from typing import NamedTuple

from sharding.errors import UserError

VARIABLE = "GLM_JAX_SUBMISSION"


class Submission(NamedTuple):
    """A submission to a cluster.

    Attributes:
        name: what tells it from others; "" where nothing does.
        repeats: whether this process may not be the first that the submission has started.
    """

    name: str
    repeats: bool


def submission() -> Submission:
    """The submission that this process belongs to, by the environment.

    `GLM_JAX_SUBMISSION` names it where it is set; else SLURM does, which counts how often it has requeued a job.
    """
    if own := os.environ.get(VARIABLE):
        return Submission(own, True)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return Submission("", False)
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    # without a requeue it may be a second command of the user's in one allocation
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return Submission(" ".join(filter(None, ("slurm", cluster, job))), requeued)


def require_submission() -> None:
    """Raise UserError in a Kubernetes Job whose submission has no name: its retries start the same command again."""
    if "JOB_COMPLETION_INDEX" in os.environ and not os.environ.get(VARIABLE):
        raise UserError(
            f"--restart would begin the run anew at every retry of this Kubernetes Job: leave it out, or set "
            f"{VARIABLE} to a name that every submission has anew (docs/clusters.md)"
        )
