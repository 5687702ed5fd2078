"""Mutants of a Python module: small changes of its source, each of which some test should notice.

Left out are annotations, decorators, docstrings, assertions, error messages, defaults of settings, and where arrays
live (specs and `out_sharding`): a wrong spec fails while tracing, or moves data without changing a number.
"""

import ast
import dataclasses
import itertools
from collections.abc import Iterator

from tests.mutation.tables import (
    BINARY,
    COMPARISONS,
    DEFAULTS,
    LEFT_CALLS,
    LEFT_KEYWORDS,
    LIBRARIES,
    SWAPPED,
    SYMBOLS,
    UNWRAPPED,
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change; `before` and `after` are the source lines that differ, without indentation."""

    function: str  # qualified name, "" at module level
    line: int
    last: int  # of the statement, which counts as covered if any of its lines ran
    before: str
    after: str
    source: bytes = dataclasses.field(repr=False)
    at_import: bool  # evaluated while the module is imported, as defaults are

    @property
    def name(self) -> str:
        """Identifier that holds as long as the mutated line stays."""
        return f"{self.function} | {self.before} | {self.after}"


def mutants(source: bytes) -> list[Mutant]:
    """All mutants of a module, in the order of its lines, each once."""
    visitor = _Visitor(source)
    visitor.visit(ast.parse(source))
    found: dict[str, Mutant] = {}
    for mutant in visitor.found:
        found.setdefault(mutant.name, mutant)
    return sorted(found.values(), key=lambda m: m.line)


class _Visitor(ast.NodeVisitor):
    def __init__(self, source: bytes) -> None:
        self.found: list[Mutant] = []
        self._source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self._parameters: set[str] = set()
        self._statement: ast.AST | None = None
        self._at_import = True

    # places in the source

    def _start(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr) -> str:
        return self._source[self._start(node) : self._end(node)].decode()

    def _emit(self, start: int, end: int, replacement: str) -> None:
        """A mutant with other text from `start` to `end`; all other lines keep their numbers."""
        old = self._source[start:end]
        text = replacement.encode()
        mutated = self._source[:start] + text + b"\n" * (old.count(b"\n") - text.count(b"\n"))
        mutated += self._source[end:]
        first = self._source.count(b"\n", 0, start)
        number = old.count(b"\n") + 1
        before, after = (
            " ".join(b"\n".join(s.split(b"\n")[first : first + number]).decode().split())
            for s in (self._source, mutated)
        )
        statement = self._statement
        assert isinstance(statement, ast.expr | ast.stmt)
        last = statement.end_lineno or statement.lineno
        self.found.append(
            Mutant(".".join(self._scope), first + 1, last, before, after, mutated, self._at_import)
        )

    def _replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        self._emit(self._start(node), self._end(node), text)

    def _operator(self, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Another operator between two operands, in the text that separates them."""
        start, end = self._end(left), self._start(right)
        at = self._source.find(old.encode(), start, end)
        if at >= 0:
            self._emit(at, at + len(old), new)

    # statements

    def visit(self, node: ast.AST) -> None:
        """Remember the innermost statement, or the header of one that holds others."""
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        outer, self._statement = self._statement, node
        super().visit(node)
        self._statement = outer

    def _header(self, node: ast.expr) -> None:
        outer, self._statement = self._statement, node
        self.visit(node)
        self._statement = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Defaults, then the body."""
        self._scope.append(node.name)
        for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
            self._header(default)
        outer = self._at_import, self._parameters
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self._at_import, self._parameters = False, {a.arg for a in arguments}
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()
        self._at_import, self._parameters = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Fields and methods."""
        self._scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Without the annotation; the defaults of settings are choices, and left alone."""
        if node.value is not None and not self._at_import:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Also without it, where the name had a value before."""
        names = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        if any("spec" in name for name in names):
            return
        # at module level a subscript or a union is a type
        types = ast.Subscript | ast.BitOr
        if not self._scope and any(isinstance(n, types) for n in ast.walk(node.value)):
            return
        used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        if isinstance(node.targets[0], ast.Name) and names & (used | self._parameters):
            self._replace(node, "pass")
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """The operator, and without it."""
        self._replace(node, "pass")
        if type(node.op) in BINARY:
            self._operator(
                node.target, node.value, SYMBOLS[type(node.op)] + "=", BINARY[type(node.op)] + "="
            )
        self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Without a call that is made for its effect."""
        if isinstance(node.value, ast.Call):
            self._replace(node, "pass")
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Without the error; what it says is left alone."""
        self._replace(node, "pass")

    def visit_Continue(self, node: ast.Continue) -> None:
        """Without it."""
        self._replace(node, "pass")

    def visit_Assert(self, node: ast.Assert) -> None:
        """Left alone."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Left alone."""

    def visit_If(self, node: ast.If) -> None:
        """The other branch."""
        self._condition(node.test)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def _condition(self, test: ast.expr) -> None:
        outer, self._statement = self._statement, test
        if isinstance(test, ast.Name | ast.Call | ast.Attribute | ast.BoolOp):
            self._replace(test, f"not ({self._text(test)})")
        self.visit(test)
        self._statement = outer

    def visit_For(self, node: ast.For) -> None:
        """The iterable is part of the header."""
        self._header(node.iter)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_With(self, node: ast.With) -> None:
        """The contexts are the header."""
        for item in node.items:
            self._header(item.context_expr)
        for statement in node.body:
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Without its conditions."""
        for condition in node.ifs:
            self._replace(condition, "True")
        self.generic_visit(node)

    # expressions

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Another operator."""
        kind = type(node.op)
        if kind in BINARY:
            self._operator(node.left, node.right, SYMBOLS[kind], BINARY[kind])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """And for or."""
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._operator(left, right, old, new)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """The boundary, and the other direction."""
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            old, *others = COMPARISONS[type(operator)]
            for new in others:
                self._operator(left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Without the sign or the negation."""
        self._replace(node, self._text(node.operand))
        self.visit(node.operand)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """Always the one, always the other."""
        for choice in (node.body, node.orelse):
            self._replace(node, f"({self._text(choice)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """A neighbouring number."""
        value = node.value
        if isinstance(value, bool):
            self._replace(node, str(not value))
        elif isinstance(value, int):
            self._replace(node, str(value + 1))
            if value == 1:
                self._replace(node, "0")
        elif isinstance(value, float):
            self._replace(node, str(2 * value if value else 1.0))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """Not the number of a dimension: another shape fails while tracing, another spec moves data."""
        self.visit(node.value)
        if isinstance(node.value, ast.Attribute) and node.value.attr in ("shape", "spec"):
            return
        elements = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for element in elements:
            if isinstance(element, ast.Constant) and isinstance(element.value, int):
                # one less, since JAX brings an index beyond the end back to the last
                self._replace(element, str(element.value - 1 if element.value else 1))
            else:
                self.visit(element)

    def visit_Slice(self, node: ast.Slice) -> None:
        """Without an end."""
        for end in (node.lower, node.upper):
            if end is not None and not isinstance(end, ast.Constant):
                self._replace(end, "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Another function, its argument alone, arguments exchanged, a keyword left out."""
        name = _last_name(node.func)
        if name in LEFT_CALLS:
            return
        if name in SWAPPED:
            end = self._end(node.func)
            self._emit(end - len(name), end, SWAPPED[name])
        if name in UNWRAPPED and node.args:
            self._replace(node, f"({self._text(node.args[0])})")
        if name == "astype" and isinstance(node.func, ast.Attribute):
            self._replace(node, self._text(node.func.value))
        if name == "where" and len(node.args) == 3:
            for choice in node.args[1:]:
                self._replace(node, f"({self._text(choice)})")
        # exchanged arguments of a library function fail while tracing
        if _root(node.func) not in LIBRARIES | {"isinstance", "zip"}:
            for left, right in _exchangeable(node.args):
                one, other = self._text(left), self._text(right)
                if one != other:
                    self._emit(self._start(left), self._end(right), f"{other}, {one}")
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in LEFT_KEYWORDS:
                if (keyword.arg, name) not in DEFAULTS:
                    self._drop(keyword)
                self.visit(keyword.value)
        if isinstance(node.func, ast.Attribute):
            self.visit(node.func.value)

    def _drop(self, keyword: ast.keyword) -> None:
        """A call without this keyword and the comma before it, or behind it where it comes first."""
        start, end = self._start(keyword), self._end(keyword)
        comma = self._source.rfind(b",", 0, start)
        if comma >= 0 and not self._source[comma + 1 : start].strip():
            start = comma
        elif self._source[end : end + 1] == b",":
            end += 1
        self._emit(start, end, "")


def _root(function: ast.expr) -> str:
    while isinstance(function, ast.Attribute):
        function = function.value
    return function.id if isinstance(function, ast.Name) else ""


def _last_name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _exchangeable(arguments: list[ast.expr]) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Neighbouring arguments that could stand for each other."""
    kinds = ast.Name | ast.Attribute | ast.Subscript
    for left, right in itertools.pairwise(arguments):
        if isinstance(left, kinds) and isinstance(right, kinds):
            yield left, right
