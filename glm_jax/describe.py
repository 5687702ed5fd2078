"""What a model directory holds, told from headers alone."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from glm_jax.checkpoint import card_of, is_checkpoint, stored_shapes
from glm_jax.companions import check_companions
from glm_jax.config import Config, Head
from glm_jax.hf.config import Form
from glm_jax.hf.tables import (
    BUFFERS,
    Row,
    num_parameters,
    tensor_names,
    tensor_shape,
)
from sharding import checkpoint
from sharding.disk.find import find_tensors
from sharding.errors import UserError

# tensors that do not belong to a model of the family, by what their name holds
FOREIGN = (
    (r"lora_|\.adapter", "a LoRA adapter: merge it into the weights first"),
    (r"prefix_encoder", "a P-tuning prefix, which is not supported"),
    (r"weight_scale|qweight|qzeros|\.scales", "of a quantised model: use the unquantised one"),
    (
        r"classifier_head|^score\.",
        "a sequence classification head, but config.json's architectures name no such class",
    ),
    (r"v_head|value_head|summary\.", "the scalar head of a reward or value model"),
    (r"vision|\.image", "the vision part of a multimodal model"),
    (r"^module\.|^base_model\.", "a wrapper's prefix: save the model without it"),
)
ROLES: Mapping[str, str] = {
    "embedding": "the embedding table",
    "w_head": "the language-model head",
    "w_scalar": "the scalar head",
    "final_norm": "the final norm's scale",
    "final_norm_bias": "the final norm's bias",
    "attn_norm": "the norm before attention",
    "attn_norm_bias": "the bias of the norm before attention",
    "attn_out_norm": "the norm after attention",
    "mlp_norm": "the norm before the MLP",
    "mlp_norm_bias": "the bias of the norm before the MLP",
    "mlp_out_norm": "the norm after the MLP",
    "w_q": "queries, keys and values",
    "w_k": "keys",
    "w_v": "values",
    "b_q": "biases of queries, keys and values",
    "b_k": "biases of keys",
    "b_v": "biases of values",
    "w_o": "attention's output",
    "b_o": "the bias of attention's output",
    "w_gate": "the MLP's gate and input",
    "w_in": "the MLP's input",
    "b_in": "the bias of the MLP's input",
    "w_down": "the MLP's output",
    "w_out": "the MLP's output",
    "b_out": "the bias of the MLP's output",
}


@dataclasses.dataclass(frozen=True)
class Description:
    """A model directory."""

    kind: str  # "Hugging Face directory" or "checkpoint"
    form: Form
    config: Config
    head: Head
    parameters: int
    dtypes: Mapping[str, int]  # dtype -> tensors
    files: Mapping[str, int]  # name -> bytes of weights
    num_tensors: int
    buffers: list[str]
    problems: list[tuple[str, str]]  # tensor, what is the matter with it

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(self.files.values())


def describe(directory: Path) -> Description:
    """Describe a Hugging Face directory or a checkpoint without loading weights. Raises UserError."""
    found = _checkpoint(directory) if is_checkpoint(directory) else _hugging_face(directory)
    try:
        check_companions(directory)
    except UserError as error:
        return dataclasses.replace(found, problems=[*found.problems, ("tokenizer:", str(error))])
    return found


def _checkpoint(directory: Path) -> Description:
    card = card_of(directory)
    found = checkpoint.shapes(directory / "weights")
    wanted = stored_shapes(card)
    problems = [(".".join(keys), "is missing") for keys in wanted if keys not in found]
    problems += [(".".join(keys), "is unknown") for keys in found if keys not in wanted]
    problems += [
        (".".join(keys), f"has shape {leaf.shape}, model.json wants {wanted[keys]}")
        for keys, leaf in found.items()
        if keys in wanted and leaf.shape != wanted[keys]
    ]
    return Description(
        kind="checkpoint",
        form=card.form,
        config=card.config,
        head=card.head,
        parameters=num_parameters(card.config, card.head),
        dtypes=Counter(leaf.dtype.name for leaf in found.values()),
        files={
            ".".join(keys): math.prod(leaf.shape) * leaf.dtype.itemsize
            for keys, leaf in found.items()
        },
        num_tensors=len(found),
        buffers=[],
        problems=problems,
    )


def _hugging_face(directory: Path) -> Description:
    card = card_of(directory)
    tensors = find_tensors(directory)
    names = {name: (row, i) for name, row, i in tensor_names(card.config, card.form, card.head)}
    problems = [
        (name, f"is missing: {_role(row, i)}")
        for name, (row, i) in names.items()
        if name not in tensors and not row.copy
    ]
    buffers = [name for name in tensors if BUFFERS.fullmatch(name)]
    for name, stored in tensors.items():
        if name in names:
            wanted = tensor_shape(names[name][0], card.config, card.head)
            if stored.shape != wanted:
                problems.append((name, f"has shape {stored.shape}, config.json wants {wanted}"))
        elif name not in buffers:
            problems.append((name, f"is unknown: {_foreign(name, card.config)}"))
    files: Counter[str] = Counter()
    for stored in tensors.values():
        files[stored.path.name] += stored.nbytes
    return Description(
        kind="Hugging Face directory",
        form=card.form,
        config=card.config,
        head=card.head,
        parameters=num_parameters(card.config, card.head),
        dtypes=Counter(stored.dtype.name for stored in tensors.values()),
        files=files,
        num_tensors=len(tensors),
        buffers=buffers,
        problems=problems,
    )


def _role(row: Row, layer: int) -> str:
    role = ("the bias of " if row.bias else "") + ROLES[row.pieces[0].path.rpartition(".")[2]]
    return f"{role} of layer {layer}" if row.per_layer else role


def _foreign(name: str, config: Config) -> str:
    for pattern, meaning in FOREIGN:
        if re.search(pattern, name):
            return meaning
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_layers:
        return f"of layer {layer[1]}, but config.json says {config.num_layers} layers"
    return "no tensor of this generation has such a name"
