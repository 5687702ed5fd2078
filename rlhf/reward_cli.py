"""The command `glm-jax reward report`: is this reward model any good?"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from rlhf.data.filter_config import FilterConfig
from rlhf.data.mistakes import OnMistake
from rlhf.model_cli import Place
from sharding.disk.paths import absolute

Job = Callable[[], int | None]
LENGTH = 1024  # tokens
# judgements as they are: ties say nothing of a score, all else counts; every prompt the same, as in a run's card
AS_JUDGED = FilterConfig(min_prompt_chars=0, votes="each", cycles="keep", balance=False)


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add `reward` and its command; the docstring is what --help prints."""
    reward = tyro.extras.SubcommandApp()
    app.command(reward, name="reward", help="Reward models: grade one on judged pairs.")

    @reward.command
    def report(
        model: tyro.conf.Positional[Path],
        files: tyro.conf.Positional[tuple[Path, ...]],
        out: Path,
        form: str | None = None,
        length: int | None = None,
        batch_size: int = 16,
        filters: FilterConfig = AS_JUDGED,
        mistakes: OnMistake = OnMistake.skip_all(),
        unfit: Literal["skip", "refuse"] = "skip",
        place: tyro.conf.OmitArgPrefixes[Place] = Place(),
    ) -> Job:
        """Grade a reward model on comparisons that it was not trained on: card.html and card.json.

        Args:
            model: Checkpoint of a reward model (a run's checkpoints/reward), or its Hugging Face directory.
            files: Comparisons of any form that `glm-jax data stats` reads.
            out: Directory to write the card to.
            form: What the files look like; default: told from their fields.
            length: Longest prompt with its answer, in tokens; longer pairs are left out and counted. Default: the
                model's context, at most 1,024.
            batch_size: Pairs that are scored at a time.
            filters: Which pairs count, and for how much; by default all that are no tie, every prompt the same.
            mistakes: What becomes of entries that are not as they should be.
            unfit: What becomes of pairs that are too long, or that the model's chat format has no words for.
            place: Layout, devices and dtype.
        """
        return partial(
            _report, model, files, out, form, length, batch_size, filters, mistakes, unfit, place
        )


def _report(
    model: Path,
    files: tuple[Path, ...],
    out: Path,
    form: str | None,
    length: int | None,
    batch_size: int,
    config: FilterConfig,
    mistakes: OnMistake,
    unfit: Literal["skip", "refuse"],
    place: Place,
) -> None:
    from rich.console import Console

    from glm_jax.checkpoint import card_with, load_scalar
    from glm_jax.companions import tokenizer_of
    from glm_jax.config import Head, check_context
    from rlhf.card.card import grade
    from rlhf.card.page import card_table, write_card
    from rlhf.data.accounts import Account
    from rlhf.data.batches import in_order
    from rlhf.data.filters import kept, select, survey
    from rlhf.data.pair_rows import debiased_pairs, judged_rows, token_pairs
    from rlhf.data.reading import check_form, read_records
    from rlhf.data_cli import tallied
    from rlhf.reward import Heldout
    from rlhf.scoring import scored
    from sharding.disk.directory import new_directory

    check_form(form)
    config_of_model = card_with(model, Head.SCALAR).config
    length = min(LENGTH, config_of_model.max_length) if length is None else length
    check_context(config_of_model, "--length", length)
    tokenizer = tokenizer_of(model)
    with place.open() as layout:
        layout.check_batch(batch_size, "--batch-size")
        scorer = load_scalar(model, layout, place.kind())
        with tallied(mistakes) as tally:
            found = list(read_records(files, tally, form))
        undebiased = dataclasses.replace(config, balance=False, weigh="pair")
        surveyed = survey(found, undebiased, len)
        selection = select(surveyed, undebiased)
        account = Account("preferences", total=len(surveyed.pairs))
        for step in selection.steps:
            account.leave_out(f"by filter {step.name!r}", step.dropped)
        records = [pair for _, pair in kept(found, selection)]
        pairs = token_pairs(records, tokenizer, length, account, unfit)
        records, pairs = debiased_pairs(records, pairs, config, None, account)
        heldout = Heldout(in_order(judged_rows(records, pairs, length), batch_size), layout)
        card = grade(scored(scorer, heldout, records, pairs), _history(model))
    console = Console(soft_wrap=True, highlight=False)
    with new_directory(out) as directory:
        write_card(card, directory)
    if surveyed.others:
        console.print(f"{surveyed.others:,} records left out: no comparisons")
    if line := account.line():
        console.print(line, markup=False)
    console.print(card_table(card))
    console.print(f"report card: {out / 'card.html'}")


def _history(model: Path) -> list[dict[str, Any]]:
    """How its training went, where the checkpoint lies in the directory of its run; else nothing."""
    path = absolute(model).parent.parent / "metrics.jsonl"
    if not path.exists():
        return []
    steps = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [step for step in steps if step["stage"] == "reward"]
