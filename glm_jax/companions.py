"""The tokenizer that a model's directory holds, and whether it belongs to the model."""

from collections.abc import Iterable
from pathlib import Path

from glm_jax.checkpoint import Card, card_of, companion_directory
from glm_jax.config import GLMV1Config
from glm_jax.tokenizers import ChatGLMTokenizer, Tokenizer, holds_tokenizer, load_tokenizer
from sharding.errors import UserError


def tokenizer_of(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint or a Hugging Face directory. Raises UserError where it is of another model."""
    tokenizer = load_tokenizer(companion_directory(directory))
    check_tokenizer(card_of(directory), tokenizer, str(directory))
    return tokenizer


def check_companions(directory: Path) -> None:
    """Raise UserError where a directory holds a tokenizer, and that of another model; it may hold none."""
    if holds_tokenizer(companion_directory(directory)):
        tokenizer_of(directory)


def check_tokenizer(card: Card, tokenizer: Tokenizer, where: str) -> None:
    """Raise UserError where the model of `card` cannot have been trained on ids of `tokenizer`.

    Every id must be a row of the embedding table, the tokens that end an answer those of config.json, and the tokens
    from which ChatGLM-6B reads positions those that the tokenizer puts there.
    """
    apart = f"{where}: model and tokenizer do not belong together: "
    ids = {
        "vocab_size - 1": tokenizer.vocab_size - 1,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "stop_ids": max(tokenizer.stop_ids),
        "prefix": max(tokenizer.prefix),
    }
    name, largest = max(ids.items(), key=lambda item: item[1])
    rows = card.config.vocab_size
    if largest >= rows:
        raise UserError(
            f"{apart}the tokenizer makes ids up to {largest} ({name}), the model has {rows} rows"
        )
    ends = card.tokens.eos if isinstance(card.tokens.eos, list) else [card.tokens.eos]
    for end in ends:
        if end not in (None, *tokenizer.stop_ids):
            raise UserError(
                f"{apart}eos_token_id of the model is {end}, the tokenizer ends answers with "
                f"{', '.join(map(str, tokenizer.stop_ids))}"
            )
    first = isinstance(card.config, GLMV1Config)
    if first is not isinstance(tokenizer, ChatGLMTokenizer):
        wanted = "ChatGLM-6B's" if first else "that of a later generation"
        raise UserError(
            f"{apart}the model needs {wanted}, and this is a {type(tokenizer).__name__}"
        )
    if isinstance(card.config, GLMV1Config) and isinstance(tokenizer, ChatGLMTokenizer):
        gmask, sop = tokenizer.prefix
        theirs = {"mask_token_id": tokenizer.mask_id, "gmask_token_id": gmask, "bos_token_id": sop}
        ours = (card.config.mask_id, card.config.gmask_id, card.config.sop_id)
        for (field, other), own in zip(theirs.items(), ours, strict=True):
            if own != other:
                raise UserError(f"{apart}{field} of the model is {own}, of the tokenizer {other}")


def check_same_tokenizer(directory: Path, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Raise UserError where a reward model reads `texts` in other tokens than `tokenizer`, the policy's.

    It scores the policy's ids as they are.
    """
    theirs = tokenizer_of(directory)
    advice = f"; reward_model = {directory} must have the policy's tokenizer"
    for name in ("eos_id", "stop_ids", "prefix", "vocab_size"):
        ours, other = getattr(tokenizer, name), getattr(theirs, name)
        if ours != other:
            raise UserError(
                f"{name} of the reward model's tokenizer is {other}, of the policy's {ours}{advice}"
            )
    for text in texts:
        if theirs.encode(text) != tokenizer.encode(text):
            raise UserError(
                f"the reward model's tokenizer reads {text[:20]!r} in other tokens than the policy's{advice}"
            )
