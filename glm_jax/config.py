"""Shapes of the ChatGLM family."""

import dataclasses
import enum
from collections.abc import Mapping

from sharding.errors import UserError
from sharding.layout import Layout
from sharding.ranges import NonNegative, Positive, check_ranges


class Head(enum.Enum):
    """What stands on a model's trunk."""

    VOCABULARY = "vocabulary"  # logits of the next token: a language model
    SCALAR = "scalar"  # one value: a reward model or critic


@dataclasses.dataclass(frozen=True)
class GLMConfig:
    """Shape of a ChatGLM2, ChatGLM3, GLM-4 or GLM-4-0414 model."""

    vocab_size: Positive  # V, rows of the embedding table (the original's padded_vocab_size)
    hidden_size: Positive  # D
    num_layers: Positive
    num_heads: Positive  # N, query heads
    num_kv_groups: Positive  # K, heads of keys and values
    head_dim: Positive  # H
    ffn_size: Positive  # F, width of the gated MLP
    max_length: Positive = 8192  # longest sequence in tokens (the original's seq_length)
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # rotary base: 10,000 * rope_ratio from ChatGLM3 on
    position_scale: float = 1.0  # positions are divided by it: rope_ratio of ChatGLM2-6B-32k
    qkv_bias: bool = True
    sandwich_norms: bool = False  # GLM-4-0414: a norm on what each branch adds to the residual
    compute_dtype: str = (
        "float32"  # matrix products run in this; parameters, softmax, norms, losses stay float32
    )

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        if self.num_heads % self.num_kv_groups:
            raise UserError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_groups = {self.num_kv_groups}"
            )
        if self.head_dim % 4:
            raise UserError(
                f"model.head_dim = {self.head_dim}: half rotary in pairs needs a multiple of 4"
            )

    def check(self, layout: Layout) -> None:
        """Raise UserError, naming sizes that would work, where `layout` does not divide the model."""
        _check_splits(self, layout)


@dataclasses.dataclass(frozen=True)
class GLMV1Config:
    """Shape of a ChatGLM-6B model, and the special tokens it reads positions and mask off."""

    vocab_size: Positive  # V
    hidden_size: Positive  # D
    num_layers: Positive
    num_heads: Positive  # N
    ffn_size: Positive  # F, the original's inner_hidden_size
    max_length: Positive = 2048  # longest sequence in tokens (the original's max_sequence_length)
    norm_eps: float = 1e-5
    mask_id: NonNegative = 130000  # [MASK]
    gmask_id: NonNegative = 130001  # [gMASK]
    sop_id: NonNegative = 130004  # <sop>, the original's bos_token_id: ends the context
    compute_dtype: str = "float32"  # as in GLMConfig

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(
                f"model.hidden_size = {self.hidden_size} does not divide into model.num_heads = {self.num_heads} heads "
                f"of a multiple of 4, which two-dimensional rotary positions need"
            )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads

    @property
    def num_kv_groups(self) -> int:
        """K: every head has keys and values of its own."""
        return self.num_heads

    def check(self, layout: Layout) -> None:
        """Raise UserError, naming sizes that would work, where `layout` does not divide the model."""
        _check_splits(self, layout)


Config = GLMConfig | GLMV1Config


def _check_splits(config: Config, layout: Layout) -> None:
    splits = {
        "hidden_size": (config.hidden_size, "embed_weight"),
        "num_heads": (config.num_heads, "heads"),
        "ffn_size": (config.ffn_size, "ffn"),
    }
    for name, (size, logical) in splits.items():
        ways = layout.ways(logical)
        if size % ways:
            axes = " x ".join(f"{axis} {layout.sizes[axis]}" for axis in layout.axes(logical))
            fits = [n for n in range(1, ways + 1) if size % n == 0]
            raise UserError(
                f"model.{name} = {size} does not divide over {axes}: sizes that would work are "
                f"{', '.join(map(str, fits))}; change --layout or the model"
            )


def check_context(shape: Config, name: str, tokens: int) -> None:
    """Raise UserError where sequences of `tokens` tokens do not fit the model's context."""
    if tokens > shape.max_length:
        raise UserError(
            f"{name} = {tokens} tokens exceed the context of model.max_length = {shape.max_length}: "
            f"shorten them or raise it"
        )


CHATGLM_6B = GLMV1Config(
    vocab_size=130528, hidden_size=4096, num_layers=28, num_heads=32, ffn_size=16384
)
CHATGLM3_6B = GLMConfig(
    vocab_size=65024,
    hidden_size=4096,
    num_layers=28,
    num_heads=32,
    num_kv_groups=2,
    head_dim=128,
    ffn_size=13696,
)
GLM4_9B = dataclasses.replace(CHATGLM3_6B, vocab_size=151552, num_layers=40, norm_eps=1.5625e-07)
GLM4_9B_0414 = dataclasses.replace(GLM4_9B, max_length=32768, norm_eps=1e-5, sandwich_norms=True)

PRESETS: Mapping[str, Config] = {
    "chatglm-6b": CHATGLM_6B,
    "chatglm2-6b": dataclasses.replace(CHATGLM3_6B, max_length=32768),
    "chatglm2-6b-32k": dataclasses.replace(CHATGLM3_6B, max_length=32768, position_scale=50.0),
    "chatglm3-6b": CHATGLM3_6B,
    "chatglm3-6b-32k": dataclasses.replace(CHATGLM3_6B, max_length=32768, rope_theta=500_000.0),
    "chatglm3-6b-128k": dataclasses.replace(CHATGLM3_6B, max_length=131072, rope_theta=5e6),
    "glm-4-9b": GLM4_9B,
    "glm-4-9b-chat": dataclasses.replace(GLM4_9B, max_length=131072, rope_theta=5e6),
    "glm-4-9b-chat-1m": dataclasses.replace(
        GLM4_9B, max_length=1048576, rope_theta=1e8, num_kv_groups=4
    ),
    "glm-4-9b-chat-hf": dataclasses.replace(GLM4_9B, max_length=131072, rope_theta=5e6),
    "glm-4-9b-0414": GLM4_9B_0414,
    "glm-4-32b-0414": dataclasses.replace(
        GLM4_9B_0414, hidden_size=6144, num_layers=61, num_heads=48, ffn_size=23040, qkv_bias=False
    ),
}
