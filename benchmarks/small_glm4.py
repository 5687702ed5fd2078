"""A GLM-4 of 32.5 million random weights for both sides of a comparison, ours and transformers'."""

import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_groups": 2,
    "head_dim": 64,
    "ffn_size": 1536,
}
FILE = "start.npz"


def require_torch() -> None:
    """End the script where the other side cannot run."""
    if not (find_spec("torch") and find_spec("transformers")):
        sys.exit("compared with PyTorch: pip install torch==2.13.0 transformers==4.57.1")


def our_model(shared: Path) -> tuple[Any, Any]:
    """Shape and weights on the current mesh of one device; leaves the weights in `shared`, exported by `glm_jax.hf`."""
    import jax

    from glm_jax.config import GLMConfig, Head
    from glm_jax.hf.config import Form
    from glm_jax.hf.tensors import Source, to_tensors
    from glm_jax.model import init_model
    from glm_jax.weights import host_weights
    from sharding.layout import Layout

    layout, config = Layout(), GLMConfig(**SHAPE)
    model = jax.jit(partial(init_model, config, layout))(jax.random.key(0))
    names = Source(config, Form.GLM, Head.VOCABULARY, {})
    np.savez(shared / FILE, **to_tensors(names, host_weights(model, layout)))
    return config, model


def torch_model(shared: Path) -> Any:
    """transformers' GlmForCausalLM with sdpa attention on all cores, from the weights in `shared`."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    config = GlmConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_groups"],
        head_dim=SHAPE["head_dim"],
        intermediate_size=SHAPE["ffn_size"],
        rms_norm_eps=1e-5,
        attention_bias=True,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    model = GlmForCausalLM(config)
    with np.load(shared / FILE) as start:
        model.load_state_dict({name: torch.from_numpy(start[name]) for name in start.files})
    return model
