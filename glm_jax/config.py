"""Shapes of the ChatGLM family, and their `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharding.errors import UserError
from sharding.layout import Layout


@dataclasses.dataclass(frozen=True)
class GLMConfig:
    """Shape of a ChatGLM2 / ChatGLM3 model."""

    vocab_size: int  # V, rows of the embedding table (the original's padded_vocab_size)
    hidden_size: int  # D
    num_layers: int
    num_heads: int  # N, query heads
    num_kv_groups: int  # K, heads of keys and values
    head_dim: int  # H
    ffn_size: int  # F, width of the gated MLP
    max_length: int = 8192  # longest sequence in tokens (the original's seq_length)
    norm_eps: float = 1e-5
    rope_ratio: float = 1.0  # multiplies the rotary base 10,000 (32k and 128k variants)
    qkv_bias: bool = True
    compute_dtype: str = (
        "float32"  # matrix products run in this; parameters, softmax, norms, losses stay float32
    )

    def __post_init__(self) -> None:
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
        splits = {
            "vocab_size": (self.vocab_size, "vocab"),
            "hidden_size": (self.hidden_size, "embed_weight"),
            "num_layers": (self.num_layers, "stage"),
            "num_heads": (self.num_heads, "heads"),
            "ffn_size": (self.ffn_size, "ffn"),
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


CHATGLM3_6B = GLMConfig(
    vocab_size=65024,
    hidden_size=4096,
    num_layers=28,
    num_heads=32,
    num_kv_groups=2,
    head_dim=128,
    ffn_size=13696,
)

PRESETS: Mapping[str, GLMConfig] = {"chatglm3-6b": CHATGLM3_6B}


def read_config(directory: Path) -> GLMConfig:
    """The config of a Hugging Face ChatGLM3 directory. Raises UserError if it is missing or of another kind."""
    path = directory / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}; expected a Hugging Face ChatGLM directory"
        ) from None
    return from_hf(hf, str(path))


def from_hf(hf: Mapping[str, Any], where: str) -> GLMConfig:
    """A GLMConfig from the fields of a `config.json`; `where` names it in errors."""
    fixed = {
        "model_type": "chatglm",
        "rmsnorm": True,
        "original_rope": True,
        "add_bias_linear": False,
    }
    for field, value in fixed.items():
        if hf.get(field) != value:
            raise UserError(
                f"{where}: {field} = {hf.get(field)!r}, but only {value!r} is supported (ChatGLM3)"
            )
    try:
        return GLMConfig(
            vocab_size=hf["padded_vocab_size"],
            hidden_size=hf["hidden_size"],
            num_layers=hf["num_layers"],
            num_heads=hf["num_attention_heads"],
            num_kv_groups=hf["multi_query_group_num"]
            if hf["multi_query_attention"]
            else hf["num_attention_heads"],
            head_dim=hf["kv_channels"],
            ffn_size=hf["ffn_hidden_size"],
            max_length=hf["seq_length"],
            norm_eps=hf["layernorm_epsilon"],
            rope_ratio=hf.get("rope_ratio", 1.0),
            qkv_bias=hf["add_qkv_bias"],
        )
    except KeyError as error:
        raise UserError(
            f"{where}: field {error} is missing; expected a ChatGLM3 config.json"
        ) from None


def to_hf(config: GLMConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a ChatGLM3 repository, in its field order."""
    cls = "modeling_chatglm.ChatGLMForConditionalGeneration"
    hf: dict[str, Any] = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": cls,
            "AutoModelForCausalLM": cls,
            "AutoModelForSeq2SeqLM": cls,
            "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
        },
        "add_bias_linear": False,
        "add_qkv_bias": config.qkv_bias,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": config.ffn_size,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_kv_groups,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "original_rope": True,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": config.max_length,
        "use_cache": True,
        "torch_dtype": dtype,
        "transformers_version": "4.30.2",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if config.rope_ratio != 1.0:
        hf["rope_ratio"] = config.rope_ratio
    return hf
