"""Operators and names that a mutation exchanges, and those it leaves alone."""

import ast

BINARY = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
SYMBOLS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.BitAnd: "&",
    ast.BitOr: "|",
}
COMPARISONS = {  # the boundary, then the other direction
    ast.Lt: ("<", "<=", ">"),
    ast.LtE: ("<=", "<", ">="),
    ast.Gt: (">", ">=", "<"),
    ast.GtE: (">=", ">", "<="),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_PAIRS = (
    ("maximum", "minimum"),
    ("max", "min"),
    ("sum", "mean"),
    ("any", "all"),
    ("argmax", "argmin"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("log_softmax", "softmax"),
    ("isfinite", "isnan"),
    ("cos", "sin"),
    ("cummax", "cummin"),
    ("normal", "uniform"),
    ("append", "remove"),
)
SWAPPED = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
UNWRAPPED = frozenset(  # f(x, ...) -> x
    {"abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "sign", "clip", "cumsum"}
    | {"sigmoid", "log_sigmoid", "silu", "gelu", "stop_gradient", "fold_in", "sorted", "reversed"}
)
LIBRARIES = frozenset(("jax", "jnp", "np", "math", "nnx", "optax", "dataclasses"))
LEFT_CALLS = frozenset(("spec", "PartitionSpec", "NamedSharding", "TypeVar", "ParamSpec"))
LEFT_KEYWORDS = frozenset(
    {"out_sharding", "in_specs", "out_specs", "check_vma", "spmd_axis_name", "prevent_cse"}
    | {"donate_argnums", "static_argnums", "static_argnames", "compiler_options", "strict"}
)
# (keyword, function) whose usual value here is the one it has when left out
DEFAULTS = {("axis", "softmax"), ("axis", "log_softmax"), ("approximate", "gelu")}
