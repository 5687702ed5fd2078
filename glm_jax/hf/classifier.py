"""The scalar head in `config.json`: a sequence classifier of one label."""

from collections.abc import Mapping
from typing import Any

from glm_jax.config import Head
from glm_jax.hf.config import Form
from sharding.errors import UserError

CLASSIFIERS: Mapping[Form, str] = {
    Form.CHATGLM2: "ChatGLMForSequenceClassification",
    Form.CHATGLM3: "ChatGLMForSequenceClassification",
    Form.GLM4_REMOTE: "ChatGLMForSequenceClassification",
    Form.GLM: "GlmForSequenceClassification",
    Form.GLM4: "Glm4ForSequenceClassification",
}
LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # as transformers writes one


def read_head(fields: Mapping[str, Any], where: str) -> Head:
    """The head that the fields of a `config.json` name; `where` names the file in errors.

    Raises UserError where they name a classifier of several labels.
    """
    if not set(fields.get("architectures") or ()) & set(CLASSIFIERS.values()):
        return Head.VOCABULARY
    # without either field transformers takes two
    labels = fields.get("num_labels", len(fields.get("id2label") or "01"))
    if labels != 1:
        raise UserError(
            f"{where}: a classifier of {labels} labels: only one of one label, a score, is supported"
        )
    return Head.SCALAR


def classifier_fields(fields: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """The `config.json` of a model with a scalar head, from that of the language model in this form.

    transformers' classes need pad_token_id, for they read the last token that is another one; those of the original
    repositories read the last column.
    """
    changed = {**fields, "architectures": [CLASSIFIERS[form]]}
    if form in (Form.GLM, Form.GLM4):
        return dict(sorted({**changed, **LABELS}.items()))  # transformers sorts them
    # without the language model's classes: they would load the trunk and draw a head
    code = "modeling_chatglm." + CLASSIFIERS[form]
    auto_map = {
        "AutoConfig": fields["auto_map"]["AutoConfig"],
        "AutoModelForSequenceClassification": code,
    }
    return {**changed, "auto_map": auto_map, "classifier_dropout": None, **LABELS}
