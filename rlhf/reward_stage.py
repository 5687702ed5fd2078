"""The stage of a run that trains a reward model on judged pairs and grades it on held-out ones."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from glm_jax.batch import Judged
from glm_jax.scalar import ScalarModel, scalar_model
from glm_jax.tokenizers import Tokenizer
from glm_jax.trunk import Trunk
from rlhf.base_run import BaseRun
from rlhf.card.card import Card, grade
from rlhf.data.accounts import Accounts, Unfit
from rlhf.data.batches import in_order, shuffled
from rlhf.data.filter_config import Debiasing
from rlhf.data.pair_rows import TokenPair, debiased_pairs, judged_rows, packed_rows, token_pairs
from rlhf.data.pairs import length_in
from rlhf.data.records import Preference, Split
from rlhf.reward import Batch, Heldout, RewardConfig, train_reward
from rlhf.scoring import scored
from rlhf.stage_keeper import Training


class JudgedData(NamedTuple):
    """Pairs to learn from and pairs to be graded on, as token arrays on the host."""

    train: Batch
    heldout: Judged
    records: Sequence[Preference]  # what the held-out rows are from
    pairs: Sequence[TokenPair]


def judged_data(
    split: Split,
    tokenizer: Tokenizer,
    length: int,
    config: RewardConfig,
    debiasing: Debiasing | None = None,
    accounts: Accounts | None = None,
    unfit: Unfit = "skip",
) -> JudgedData:
    """Both sides of the preferences, in answers of at most `length` tokens with their prompts.

    `debiasing` balances and weighs the training pairs that fit, and weighs those held out; None: they weigh what they
    do. Raises UserError where no pair is left, and where one does not fit that `unfit` refuses.
    """
    accounts = accounts or Accounts()
    sides: list[tuple[list[Preference], list[TokenPair]]] = []
    for side in Split._fields:
        records, account = list(getattr(split, side)), accounts.of("preferences", side)
        pack_length = config.pack_length if side == "train" else None
        pairs = token_pairs(records, tokenizer, length, account, unfit, pack_length)
        if debiasing is not None:
            filters, directory = debiasing
            if side == "heldout":
                filters = dataclasses.replace(filters, balance=False)
            count = length_in(directory) if directory else None
            records, pairs = debiased_pairs(records, pairs, filters, count, account)
        sides.append((records, pairs))
    train, heldout = sides
    if config.pack_length is None:
        rows: Batch = judged_rows(*train, length)
    else:
        rows = packed_rows(*train, config.pack_length)
    return JudgedData(rows, judged_rows(*heldout, length), *heldout)


def reward_stage(
    run: BaseRun, trunk: Trunk, config: RewardConfig, data: JudgedData
) -> tuple[ScalarModel, Card]:
    """The trained model, also kept as the checkpoint `reward`, and its report card on the held-out pairs."""
    layout, seed = run.layout, run.recipe.seed
    batches = shuffled(data.train, config.batch_size, seed)
    heldout = Heldout(in_order(data.heldout, config.batch_size), layout)
    history: list[dict[str, Any]] = list(run.progress.history("reward"))
    every, best = run.recipe.saving.every, "heldout_accuracy"
    training = Training("reward", {"batches": batches}, every, best=best)
    if run.recipe.saving.keep_best and not config.eval_every:
        run.log.note(
            "reward: saving.keep_best has nothing to go by before the last update: set reward.eval_every"
        )
    with run.train(training, config.steps) as (stage, keeper):

        def told(step: int, metrics: Mapping[str, float], tokens: int) -> None:
            history.append({"step": step, **metrics})
            stage.step(step, metrics, tokens)

        start = scalar_model(trunk, layout, run.key("reward"))
        model = train_reward(start, config, batches, layout, told, heldout, keeper)
        card = grade(scored(model, heldout, data.records, data.pairs), history, seed)
        run.save("reward", model)
    return model, card


def summary_of(card: Card) -> dict[str, Any]:
    """What a run's summary says of its reward model."""
    accuracy = card.accuracy
    return {
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "length_only_accuracy": card.length.ruler.value,
        "num_pairs": accuracy.count,
        "num_dialogues": accuracy.dialogues,
        "grade": card.verdict.grade,
    }
