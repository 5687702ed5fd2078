"""Checks of answers: what went in, what counts, how they end, what they could have been, and how likely they are."""

import numpy as np

from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding, Rounding, first_failure, within, worst
from rlhf.doctor.sampling import Stream, independence, uniformity, uniforms


def inputs(e: Evidence) -> Finding:
    """Answers follow their prompts, `ppo.samples` each; baselines and keys belong to prompts and iteration."""
    config, prompts = e.setting.config, e.inputs.prompts
    columns, width = prompts.ids.shape[1], e.mask.shape[1]
    if width != columns + config.sampling.max_new_tokens:
        return Finding(
            "fail",
            f"answers have {width - columns} columns, not {config.sampling.max_new_tokens}",
            "ppo.sampling.max_new_tokens is not what rollouts are made with",
        )
    ids, valid, _ = (x[:, :columns] for x in e.answers.sequences)
    wanted = [np.repeat(x, config.samples, axis=0) for x in (prompts.ids, prompts.valid)]
    seen = f"{len(prompts.ids)} prompts, {len(ids)} answers"
    differ = ((ids != wanted[0]) & wanted[1]) | (valid != wanted[1])
    if differ.any():
        row = int(np.flatnonzero(differ.any(axis=1))[0])
        return Finding(
            "fail",
            f"{int(differ.any(axis=1).sum())} answers do not follow their prompt (first: row {row})",
            "answers come back in another order, or ppo.samples answers of a prompt do not stand side by side",
        )
    if not np.array_equal(e.baseline, e.passed_baseline):
        row = int(np.flatnonzero(e.baseline != e.passed_baseline)[0])
        return Finding(
            "fail",
            f"the baseline of answer {row} is {e.passed_baseline[row]:.4g}, of its prompt {e.baseline[row]:.4g}",
            "another prompt's baseline (ppo.reference_baseline)",
        )
    if e.strangers:
        return Finding(
            "fail",
            f"the experience is made with another {' and '.join(e.strangers)} than the run holds",
            "models are mixed up: a reference that is the policy or follows it, a stale policy",
        )
    if e.keys.now in e.keys.before:
        return Finding(
            "fail",
            f"iteration {e.keys.number} has the random key of an earlier one",
            "the key is not folded with the iteration: every iteration samples and shuffles alike",
        )
    if e.keys.expected is not None and e.keys.now != e.keys.expected:
        return Finding(
            "fail",
            f"the random key of iteration {e.keys.number} is not that of the run and the iteration",
            "a resumed run would sample other answers: fold the run's key with the iteration's number",
        )
    return _from_table(e, seen)


def _from_table(e: Evidence, seen: str) -> Finding:
    table, prompts, config = e.setting.table, e.inputs.prompts, e.setting.config
    if table is None:
        return Finding("pass", seen)
    rows = np.asarray(prompts.row)
    other = (table.ids[rows] != prompts.ids) | (table.valid[rows] != prompts.valid)
    if other.any():
        return Finding(
            "fail",
            f"{int(other.any(axis=1).sum())} prompts are not those of their row numbers",
            "row numbers of prompts are off: baselines of other prompts are subtracted",
        )
    if again := _drawn_again(e, rows, len(table.rows)):
        return Finding("fail", again, "an epoch of prompts is a permutation: rows are drawn anew")
    subtracted = config.reference_baseline and config.advantage == "gae"
    wanted = table.baseline[rows] if subtracted else np.zeros(len(rows), np.float32)
    if not np.array_equal(wanted, e.inputs.baseline):
        row = int(np.flatnonzero(wanted != e.inputs.baseline)[0])
        return Finding(
            "fail",
            f"the baseline of prompt {rows[row]} is {e.inputs.baseline[row]:.4g}, its reference answer's score is "
            f"{wanted[row]:.4g}",
            "another prompt's baseline, or one that ppo.reference_baseline does not ask for",
        )
    if not subtracted or e.reference_scores is None or table.answers is None:
        return Finding("pass", f"{seen}, baselines of their rows")
    own = np.clip(e.reference_scores, -config.score_clip, config.score_clip)
    if config.truncated == "penalty":
        lasts = [table.answers[row][-1:] for row in np.repeat(rows, config.samples)]
        cut = np.array([not last or last[0] not in e.setting.stop_ids for last in lasts])
        own = own - config.truncation_penalty * cut
    return within(
        e.baseline - own,
        e.score_rounding,
        "baselines and the reward model's scores of the reference answers",
        "reference answers are scored in another way than rollouts: another closing token, clamp or penalty, or other "
        "answers than those that are stored",
    )


def _drawn_again(e: Evidence, rows: np.ndarray, count: int) -> str:
    """Prompts that come twice in one epoch of `count` prompts; empty where none does."""
    first = (e.keys.number - 1) * len(rows)
    if first // count != (first + len(rows) - 1) // count:
        return ""  # the batch has the end of one epoch and the beginning of the next
    if len(np.unique(rows)) < len(rows):
        return f"{len(rows) - len(np.unique(rows))} prompts stand twice in one batch"
    before = e.keys.rows_before
    if before is not None and (first - 1) // count == first // count:
        again = np.intersect1d(rows, before)
        if len(again) and first - len(rows) >= first // count * count:
            return f"{len(again)} prompts are those of the iteration before"
    return ""


def response_mask(e: Evidence) -> Finding:
    """Exactly the answer's tokens count: from the first column after the prompt to its first stop token."""
    sequences, start = e.answers.sequences, e.inputs.prompts.ids.shape[1]
    stops = np.isin(sequences.ids[:, start:], e.setting.stop_ids)
    width = stops.shape[1]
    first = np.where(stops.any(axis=1), stops.argmax(axis=1), width - 1)
    expected = np.zeros_like(sequences.target)
    expected[:, start:] = np.arange(width) <= first[:, None]
    wrong = np.flatnonzero((expected != sequences.target).any(axis=1))
    mode = e.setting.config.truncated
    counts = expected & (e.answers.ended[:, None] | (mode != "mask"))
    uncounted = np.flatnonzero((counts != e.experience.counts).any(axis=1))
    if not len(wrong) and not len(uncounted):
        return Finding("pass", f"{int(expected.sum())} tokens of {len(expected)} answers count")
    if len(wrong):
        return Finding(
            "fail",
            f"{len(wrong)} answers have tokens that count and should not, or the reverse (first: row {wrong[0]})",
            "the response mask is off: it must cover the answer and its first stop token, and nothing of the prompt",
        )
    return Finding(
        "fail",
        f"{len(uncounted)} answers are learnt from, or left out, against ppo.truncated = {mode}",
        "the mask of what is learnt from does not follow ppo.truncated",
    )


def stop_token(e: Evidence) -> Finding:
    """An answer has ended where its last token is a stop token; some answers do."""
    ids, _, target = e.answers.sequences
    last = ids[np.arange(len(ids)), target.shape[1] - 1 - np.argmax(target[:, ::-1], axis=1)]
    stopped = np.isin(last, e.setting.stop_ids)
    wrong = np.flatnonzero(stopped != e.answers.ended)
    if len(wrong):
        return Finding(
            "fail",
            f"{len(wrong)} answers are said to have ended, or not, against their last token (first: row {wrong[0]})",
            "the stop tokens of sampling are not those of the tokenizer",
        )
    share = float(e.answers.ended.mean())
    seen = f"{share:.0%} of {len(ids)} answers end by themselves"
    if share == 0.0 and e.setting.trained:
        advice = (
            "no answer stops: the SFT data teaches no stop token, or ppo.sampling.max_new_tokens is too small; "
            "with ppo.truncated = mask nothing would be learnt"
        )
        return Finding("fail" if e.setting.config.truncated == "mask" else "warn", seen, advice)
    if share < 0.5 and e.setting.trained:
        advice = "most answers are cut off: raise ppo.sampling.max_new_tokens, or set ppo.truncated"
        return Finding("warn", seen, advice)
    return Finding("pass", seen)


def _outside(logp: np.ndarray, full: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Distances of log-probabilities from those that supports within rounding allow."""
    logp = np.asarray(logp, np.float64)
    return np.maximum(np.maximum((full - high) - logp, logp - (full - low)), 0.0)


def rollout_logprobs(e: Evidence) -> Finding:
    """Log-probabilities of decoding are the doctor's, at some support that rounding allows."""
    own, mask = e.own, e.mask
    gaps = _outside(e.answers.logp, own.full, own.smallest, own.largest)
    gaps = np.where(np.isfinite(np.asarray(e.answers.logp, np.float64)), gaps, np.inf)
    return within(
        gaps[mask],
        e.logp_rounding,
        "log-probabilities of rollout and policy",
        "decoding sees another distribution than whole sequences do. Possible causes: another temperature, top_k or "
        "top_p (ppo.sampling) on one side; a KV cache whose columns or positions are off; padding of prompts that "
        "decoding counts or attends to; weights of an earlier iteration in the generation layout (generation_layout)",
    )


def logprobs(e: Evidence) -> Finding:
    """Log-probabilities of policy and reference are those of their own weights, over the recorded support."""
    found = []
    for name, seen, own, rounding in (
        ("the policy", e.experience.logp, e.own.logp, e.logp_rounding),
        ("the reference", e.experience.ref_logp, e.own.ref_logp, e.ref_rounding),
    ):
        found.append(_logprobs(name, seen, own, e.mask, rounding))
    if e.probe is not None:
        x, own = e.probe.experience, e.probe.own
        found.append(_logprobs("another policy", x.logp, own.logp, e.mask, e.logp_rounding.exact))
        found.append(
            _logprobs("another reference", x.ref_logp, own.ref_logp, e.mask, e.ref_rounding.exact)
        )
    return first_failure(found)


def _logprobs(
    name: str, seen: np.ndarray, own: np.ndarray, mask: np.ndarray, rounding: Rounding
) -> Finding:
    return within(
        (np.asarray(seen, np.float64) - own)[mask],
        rounding,
        f"log-probabilities of {name} and of its weights",
        "they are of another model (a reference that is the policy, or follows it), at another temperature "
        "(ppo.sampling), over another support, or of other tokens",
    )


def sampled(e: Evidence) -> Finding:
    """Sampled tokens follow the policy's distribution."""
    numbers = uniforms(e.own.above[e.mask], e.own.tied[e.mask], e.keys.number)
    return uniformity(numbers, e.logp_rounding.of_mean(np.ones(int(e.mask.sum()))))


def streams(e: Evidence) -> Finding:
    """Answers, their tokens and iterations have random numbers of their own."""
    ids = e.answers.sequences.ids
    found = [
        Stream(name, (other == ids)[there], chance[there])
        for (name, (other, there)), chance in zip(e.others.items(), e.own.others, strict=True)
    ]
    return independence(found, e.logp_rounding.largest)


def support(e: Evidence) -> Finding:
    """The support holds what ppo.sampling surely allows, and nothing that it surely does not."""
    sampling = e.setting.config.sampling
    if not e.has_support:
        if sampling.truncates:
            return Finding(
                "fail",
                "the trainer normalises over the whole vocabulary",
                "ppo.sampling.top_k and top_p cut the rollout's distribution and not the trainer's",
            )
        return Finding("skip", "every token can be sampled")
    missing, excess = (int(x[e.mask].sum()) for x in (e.own.missing, e.own.excess))
    tokens = int(e.mask.sum())
    if missing or excess:
        return Finding(
            "fail",
            f"of the supports of {tokens} tokens {missing} entries are missing and {excess} are too many",
            f"ppo.sampling.top_k = {sampling.top_k}, top_p = {sampling.top_p:g} are not what the trainer applies",
        )
    return Finding("pass", f"supports of {tokens} tokens hold what ppo.sampling allows")


def padding(e: Evidence) -> Finding:
    """Log-probabilities, scores and values do not depend on where the padding stands."""
    if e.turned is None:
        return Finding("skip", "no prompt is padded")
    mask, there, own = e.mask, e.turned, e.own
    parts = [
        ("log-probabilities", _outside(there.logp, own.full, own.smallest, own.largest)[mask]),
        (
            "reference log-probabilities",
            _outside(there.ref_logp, own.ref_full, own.ref_smallest, own.ref_largest)[mask],
        ),
        ("scores", np.asarray(there.scores, np.float64) - e.experience.scores),
    ]
    roundings = [e.logp_rounding, e.ref_rounding, e.score_rounding]
    if e.values is not None and there.values is not None:
        parts.append(("values", (np.asarray(there.values, np.float64) - e.values)[mask]))
        roundings.append(e.value_rounding)
    advice = "padding changes what the model sees: positions count it, attention reads it, or the score is read at it"
    return first_failure(
        [
            within(gaps, rounding, f"{name} with padding on the left and on the right", advice)
            for (name, gaps), rounding in zip(parts, roundings, strict=True)
        ]
    )


def figures(e: Evidence) -> Finding:
    """Figures of the iteration are those of its answers."""
    x, mask, m = e.experience, e.mask, e.metrics
    log_ratio = np.where(mask, np.asarray(x.logp, np.float64) - x.ref_logp, 0.0)
    count = max(1, int(mask.sum()))
    expected = {
        "kl": log_ratio.sum() / count,
        "kl_k2": (log_ratio**2).sum() / 2 / count,
        "entropy": -np.where(mask, np.asarray(x.logp, np.float64), 0.0).sum() / count,
        "score": float(np.asarray(x.scores, np.float64).mean()),
        "reward": float((np.asarray(x.scores, np.float64) - e.baseline).mean()),
        "advantage_std": np.sqrt(
            np.where(x.counts, np.asarray(x.advantages, np.float64) ** 2, 0.0).sum()
            / max(1, int(x.counts.sum()))
        ),
        "length": mask.sum(axis=1).mean(),
        "ended": e.answers.ended.mean(),
    }
    known = {name: value for name, value in expected.items() if name in m}
    gaps = {n: abs(m[n] - v) / max(1.0, abs(v)) for n, v in known.items()}
    name = max(gaps, key=lambda n: gaps[n] if np.isfinite(gaps[n]) else np.inf)
    if worst(gaps[name], 0.0) <= 1e-4:
        return Finding("pass", f"{', '.join(known)} are those of the answers")
    return Finding(
        "fail",
        f"{name} is reported as {m[name]:.6g}, the answers give {known[name]:.6g}",
        "a figure is a mean over other tokens or answers than it says",
    )
