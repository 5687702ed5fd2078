"""What a model asks of matrix products, whatever a program makes of it: the numerator of MFU.

MFU, model FLOPs utilisation (Chowdhery et al. 2022, appendix B), divides these by what the devices could do in the
time. What is computed again, for padding, or in a pipeline's bubble does not count. Where that paper lets every token
see the whole row, here a token sees what the mask lets it see, which is half of that.
"""

from glm_jax.config import Config, GLMV1Config

BACKWARD = 2  # a gradient takes two products for each of the forward pass: by the weights, by the activations


def forward_flops(config: Config, rows: int, length: int, logits: int) -> int:
    """FLOPs of a forward pass over `rows` sequences of `length` tokens, with the logits of `logits` tokens of each.

    Of generation too: token by token, with keys and values kept, it takes the same products.
    """
    D, heads = config.hidden_size, config.num_heads * config.head_dim
    projections = D * (2 * heads + 2 * config.num_kv_groups * config.head_dim)
    mlp = (2 if isinstance(config, GLMV1Config) else 3) * D * config.ffn_size
    seen = length * (length + 1) // 2  # pairs of a token and one that it sees
    layer = 2 * length * (projections + mlp) + 2 * 2 * seen * heads  # with keys, then with values
    return rows * (config.num_layers * layer + 2 * logits * D * config.vocab_size)


def training_flops(config: Config, rows: int, length: int, logits: int) -> int:
    """FLOPs of a forward pass and its gradient."""
    return (1 + BACKWARD) * forward_flops(config, rows, length, logits)
