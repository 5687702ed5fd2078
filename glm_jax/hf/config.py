"""`config.json` of every repository of the family: read into a shape, written with the original's fields in order."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax.config import Config, GLMConfig, GLMV1Config
from sharding.errors import UserError

Fields = Mapping[str, Any]


class Form(enum.Enum):
    """In which form a repository holds a model: the names of its tensors and the fields of its config.json."""

    CHATGLM = "ChatGLM-6B"
    CHATGLM2 = "ChatGLM2"
    CHATGLM3 = "ChatGLM3"
    GLM4_REMOTE = "GLM-4, remote code"
    GLM = "GLM-4, transformers' Glm"
    GLM4 = "GLM-4-0414, transformers' Glm4"


def read_fields(directory: Path) -> dict[str, Any]:
    """The fields of a directory's config.json, in order. Raises UserError if it is missing or no JSON object."""
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}; expected a Hugging Face ChatGLM directory"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds no JSON object; expected a Hugging Face config.json")
    return fields


def read_config(directory: Path) -> Config:
    """The shape of the model in a Hugging Face directory. Raises UserError if it is none of the family."""
    return from_hf(read_fields(directory), str(directory / "config.json"))


def form_of(fields: Fields, where: str) -> Form:
    """Which form `fields` describe; `where` names the file in errors."""
    kind = fields.get("model_type")
    if kind == "glm":
        return Form.GLM
    if kind == "glm4":
        return Form.GLM4
    if kind != "chatglm":
        raise UserError(
            f"{where}: model_type = {kind!r} is not of the ChatGLM family: 'chatglm', 'glm' or 'glm4'"
        )
    if "inner_hidden_size" in fields:
        return Form.CHATGLM
    name = str(fields.get("_name_or_path", "")).lower().replace("-", "")
    if "chatglm2" in name:
        return Form.CHATGLM2
    if "chatglm3" in name:
        return Form.CHATGLM3
    if "glm4" in name or "num_hidden_layers" in fields:
        return Form.GLM4_REMOTE
    if fields.get("rope_ratio", 1) != 1:
        raise UserError(
            f"{where}: rope_ratio divides positions in ChatGLM2 and multiplies the base in ChatGLM3 and GLM-4, "
            f"and nothing says which this is: put chatglm2, chatglm3 or glm4 into _name_or_path"
        )
    return Form.CHATGLM3


def from_hf(fields: Fields, where: str) -> Config:
    """The shape that the fields of a `config.json` describe; `where` names it in errors."""
    form = form_of(fields, where)
    try:
        if form is Form.CHATGLM:
            return _from_v1(fields, where)
        if form in (Form.GLM, Form.GLM4):
            return _from_transformers(fields, form, where)
        return _from_remote(fields, form, where)
    except KeyError as error:
        raise UserError(
            f"{where}: field {error} is missing; expected the config.json of {form.value}"
        ) from None


def _require(fields: Fields, wanted: Fields, where: str) -> None:
    """`wanted` holds the values that the model code here covers; an absent field has the released value."""
    for field, value in wanted.items():
        if fields.get(field, value) != value:
            raise UserError(
                f"{where}: {field} = {fields[field]!r} is not supported: every released model has {value!r}"
            )


def _from_v1(fields: Fields, where: str) -> GLMV1Config:
    _require(
        fields,
        {"position_encoding_2d": True, "tie_word_embeddings": True, "quantization_bit": 0},
        where,
    )
    if fields.get("pre_seq_len") is not None:
        raise UserError(f"{where}: pre_seq_len (P-tuning prefixes) is not supported: merge or drop")
    return GLMV1Config(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        ffn_size=fields["inner_hidden_size"],
        max_length=fields["max_sequence_length"],
        norm_eps=fields["layernorm_epsilon"],
        mask_id=fields["mask_token_id"],
        gmask_id=fields["gmask_token_id"],
        sop_id=fields["bos_token_id"],
    )


def _from_remote(fields: Fields, form: Form, where: str) -> GLMConfig:
    _require(
        fields,
        {
            "rmsnorm": True,
            "original_rope": True,
            "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
            "post_layer_norm": True,
            "tie_word_embeddings": False,
            "quantization_bit": 0,
        },
        where,
    )
    if fields.get("pre_seq_len") is not None:
        raise UserError(f"{where}: pre_seq_len (P-tuning prefixes) is not supported: merge or drop")
    ratio = float(fields.get("rope_ratio", 1.0))
    divides = form is Form.CHATGLM2
    return GLMConfig(
        vocab_size=fields["padded_vocab_size"],
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_groups=fields["multi_query_group_num"]
        if fields["multi_query_attention"]
        else fields["num_attention_heads"],
        head_dim=fields["kv_channels"],
        ffn_size=fields["ffn_hidden_size"],
        max_length=fields["seq_length"],
        norm_eps=fields["layernorm_epsilon"],
        rope_theta=10_000.0 if divides else 10_000.0 * ratio,
        position_scale=ratio if divides else 1.0,
        qkv_bias=fields["add_qkv_bias"],
    )


def _from_transformers(fields: Fields, form: Form, where: str) -> GLMConfig:
    _require(
        fields,
        {
            "hidden_act": "silu",
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "rope_scaling": None,
        },
        where,
    )
    # transformers 5 writes the rotary fields into a dictionary of their own
    rope = {**fields, **(fields.get("rope_parameters") or {})}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{where}: rope_parameters.rope_type = {rope['rope_type']!r} is not supported: only 'default' is"
        )
    _require(rope, {"partial_rotary_factor": 0.5}, where)
    return GLMConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_groups=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        ffn_size=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        norm_eps=fields["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        qkv_bias=fields["attention_bias"],
        sandwich_norms=form is Form.GLM4,
    )


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What config.json says of special tokens: an end (or several), and the padding."""

    eos: int | list[int]
    pad: int


RELEASED_TOKENS = {
    Form.CHATGLM: Tokens(130005, 3),
    Form.CHATGLM2: Tokens(2, 0),
    Form.CHATGLM3: Tokens(2, 0),
    Form.GLM4_REMOTE: Tokens([151329, 151336, 151338], 151329),
    Form.GLM: Tokens([151329, 151336, 151338], 151329),
    Form.GLM4: Tokens([151329, 151336, 151338], 151329),
}


def default_form(config: Config) -> Form:
    """The form in which a model of this shape, trained here from random weights, is written."""
    if isinstance(config, GLMV1Config):
        return Form.CHATGLM
    if config.sandwich_norms:
        return Form.GLM4
    return Form.CHATGLM2 if config.position_scale != 1.0 else Form.CHATGLM3


def to_hf(config: Config, form: Form, dtype: str, tokens: Tokens | None = None) -> dict[str, Any]:
    """The `config.json` of a repository of this form, in its field order; `tokens` defaults to the released ones.

    Raises UserError where the form cannot hold such a model.
    """
    tokens = tokens or RELEASED_TOKENS[form]
    if isinstance(config, GLMV1Config):
        if form is not Form.CHATGLM:
            raise UserError(f"a ChatGLM-6B model cannot be written as {form.value}")
        return _to_v1(config, dtype, tokens)
    scale_fits = config.position_scale == 1.0 or form is Form.CHATGLM2
    theta_fits = config.rope_theta == 10_000.0 or form is not Form.CHATGLM2
    if form is Form.CHATGLM or config.sandwich_norms != (form is Form.GLM4):
        raise UserError(f"a model with this architecture cannot be written as {form.value}")
    if not (scale_fits and theta_fits):
        raise UserError(f"a model with these rotary positions cannot be written as {form.value}")
    if form in (Form.GLM, Form.GLM4):
        return _to_transformers(config, form, dtype, tokens)
    return _to_remote(config, form, dtype, tokens)


def _to_v1(config: GLMV1Config, dtype: str, tokens: Tokens) -> dict[str, Any]:
    cls = "modeling_chatglm.ChatGLMForConditionalGeneration"
    return {
        "_name_or_path": "THUDM/chatglm-6b",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": cls,
            "AutoModelForSeq2SeqLM": cls,
        },
        "bos_token_id": config.sop_id,
        "eos_token_id": tokens.eos,
        "mask_token_id": config.mask_id,
        "gmask_token_id": config.gmask_id,
        "pad_token_id": tokens.pad,
        "hidden_size": config.hidden_size,
        "inner_hidden_size": config.ffn_size,
        "layernorm_epsilon": config.norm_eps,
        "max_sequence_length": config.max_length,
        "model_type": "chatglm",
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "position_encoding_2d": True,
        "torch_dtype": dtype,
        "transformers_version": "4.23.1",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _to_remote(config: GLMConfig, form: Form, dtype: str, tokens: Tokens) -> dict[str, Any]:
    cls = "modeling_chatglm.ChatGLMForConditionalGeneration"
    ratio = config.rope_theta / 10_000.0 * config.position_scale
    later = form is not Form.CHATGLM2
    name = {Form.CHATGLM2: "chatglm2-6b", Form.CHATGLM3: "chatglm3-6b"}.get(form, "glm4-9b-chat")
    hf: dict[str, Any] = {
        "_name_or_path": f"THUDM/{name}",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": cls,
            **({"AutoModelForCausalLM": cls} if later else {}),
            "AutoModelForSeq2SeqLM": cls,
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
        **({"num_hidden_layers": config.num_layers} if form is Form.GLM4_REMOTE else {}),
        "num_layers": config.num_layers,
        **({"rope_ratio": int(ratio) if ratio == int(ratio) else ratio} if ratio != 1.0 else {}),
        "original_rope": True,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": config.max_length,
        "use_cache": True,
        "torch_dtype": dtype,
        "transformers_version": "4.30.2" if later else "4.27.1",
        "tie_word_embeddings": False,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }
    if later:
        classifier = "modeling_chatglm.ChatGLMForSequenceClassification"
        hf["auto_map"]["AutoModelForSequenceClassification"] = classifier
    return hf


def _to_transformers(config: GLMConfig, form: Form, dtype: str, tokens: Tokens) -> dict[str, Any]:
    return {
        "architectures": ["Glm4ForCausalLM" if form is Form.GLM4 else "GlmForCausalLM"],
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "eos_token_id": tokens.eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_length,
        "model_type": "glm4" if form is Form.GLM4 else "glm",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_groups,
        "pad_token_id": tokens.pad,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def form_named(name: str, form: Form) -> Form:
    """The form "remote" (the original repositories' own code) or "hf" (transformers' classes) of a model in `form`.

    Raises UserError where the model has no such form.
    """
    forms = {
        Form.GLM4_REMOTE: {"remote": Form.GLM4_REMOTE, "hf": Form.GLM},
        Form.GLM: {"remote": Form.GLM4_REMOTE, "hf": Form.GLM},
        Form.GLM4: {"hf": Form.GLM4},
    }.get(form, {"remote": form})
    if name not in forms:
        raise UserError(f"--form {name}: {form.value} exists as {' and '.join(forms)} only")
    return forms[name]
