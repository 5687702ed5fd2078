"""Checks of answers: what counts, how they end, what they could have been, and how likely they are."""

import numpy as np

from rlhf.doctor.evidence import Evidence
from rlhf.doctor.finding import Finding, judged, worst


def response_mask(e: Evidence) -> Finding:
    """Exactly the answer's tokens count: from the first column after the prompt to its first stop token."""
    sequences, start = e.answers.sequences, e.prompt_columns
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


def rollout_logprobs(e: Evidence) -> Finding:
    """The log-probabilities that decoding gave are those of the trainer's program."""
    gap = worst(e.experience.logp, e.answers.logp, e.answers.sequences.target)
    return judged(
        gap,
        e.setting.tolerance,
        "log-probabilities of rollout and trainer",
        "the two see different distributions: another temperature, top_k or top_p (ppo.sampling) on one side, other "
        "positions, or weights of an earlier iteration in the generation layout (generation_layout)",
    )


def support(e: Evidence) -> Finding:
    """No more tokens could be drawn than ppo.sampling allows, and those drawn could be."""
    sampling = e.setting.config.sampling
    if e.support_size is None:
        if sampling.truncates:
            return Finding(
                "fail",
                "the trainer normalises over the whole vocabulary",
                "ppo.sampling.top_k and top_p cut the rollout's distribution and not the trainer's",
            )
        return Finding("skip", "every token can be drawn")
    sizes = e.support_size[e.answers.sequences.target]
    seen = f"{sizes.min()} to {sizes.max()} tokens could be drawn"
    if sizes.min() < 1 or (sampling.top_k and sizes.max() > sampling.top_k + 1):
        return Finding("fail", seen, f"ppo.sampling.top_k = {sampling.top_k} is not applied")
    return Finding("pass", seen)


def padding(e: Evidence) -> Finding:
    """Log-probabilities, scores and values do not depend on where the padding stands."""
    if e.turned is None:
        return Finding("skip", "no prompt is padded")
    mask, here, there = e.answers.sequences.target, e.experience, e.turned
    gaps = {
        "log-probabilities": worst(here.logp, there.logp, mask),
        "reference log-probabilities": worst(here.ref_logp, there.ref_logp, mask),
        "scores": worst(here.scores, there.scores),
    }
    if here.values is not None and there.values is not None:
        gaps["values"] = worst(here.values, there.values, mask)
    name = max(gaps, key=lambda key: gaps[key])
    return judged(
        gaps[name],
        e.setting.tolerance,
        f"{name} with padding on the left and on the right",
        "padding changes what the model sees: positions count it, or attention reads it, or the score is read at it",
    )
