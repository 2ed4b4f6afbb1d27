"""Rewrites a parsed chat template so that it charges what jinja2 does not let a sandbox see.

The charges are filters, whose names no template can write: `STEP_FILTER` of a number of characters, `VALUE_FILTER` and
`SLICE_FILTER` of a value, which they pass on.
"""
# ruff: noqa: N802, N815 - jinja2's visitor finds its methods by the names of the nodes

from __future__ import annotations

from typing import TypeVar

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

__all__ = ["SLICE_FILTER", "STEP_FILTER", "VALUE_FILTER", "charged_tree"]

STEP_FILTER, VALUE_FILTER, SLICE_FILTER = "charge step", "charge value", "charge slice"

Body = TypeVar("Body", nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


def charged_tree(tree: nodes.Template) -> nodes.Template:
    """The template with charges for turns of loops, bodies of macros and blocks, `~`, literals and slices."""
    _Charging().visit(tree)
    return tree


class _Charging(NodeTransformer):
    """Inserts charges where jinja2 asks nobody: turns of loops, bodies of macros and blocks, `~`, literals, slices."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Each turn is a step, those that the loop's own `if` passes over too."""
        self._count_body(node)
        if node.test is not None:
            node.test = nodes.And(_step(node, 0), node.test).set_lineno(node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        """Its fixed text is output by every call."""
        return self._count_body(node)

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~` makes as much as its parts, so these are charged first."""
        self.generic_visit(node)
        node.nodes = [_charged(part, VALUE_FILTER) for part in node.nodes]
        return node

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        """A literal is charged for all that it refers to; the targets of an assignment make nothing."""
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":
            return node
        return _charged(node, VALUE_FILTER)

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """A slice is a copy."""
        self.generic_visit(node)
        return _charged(node, SLICE_FILTER) if isinstance(node.arg, nodes.Slice) else node

    def _count_body(self, node: Body) -> Body:
        text = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_step(node, text)).set_lineno(node.lineno))
        return node


def _step(node: nodes.Node, text: int) -> nodes.Filter:
    return _filter(nodes.Const(text), STEP_FILTER, node.lineno)


def _charged(node: nodes.Expr, name: str) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter(node, name, node.lineno)


def _filter(node: nodes.Expr, name: str, lineno: int) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    made.set_lineno(lineno)
    return made
