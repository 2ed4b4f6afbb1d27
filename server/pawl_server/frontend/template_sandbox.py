"""Jinja for templates that come with a model: no attribute of Python is reachable, and time and memory are bounded.

jinja2's sandbox keeps a template from Python; it does not keep it from looping without output, from doubling a string
or from asking for a billion spaces. Here every loop's turn, every call and every value that a template makes is
charged to the `Budget` of its rendering, which also looks at the clock:

- `charged_tree` rewrites the parsed template: it charges turns of loops, bodies of macros and blocks, and what `~`,
  literals and slices make, none of which jinja2 lets a sandbox see;
- operators, calls, filters, tests and output are charged where jinja2 asks the environment for them;
- what makes much of little within one call of C (`*`, `replace`, `join`, formats, widths) is charged before it runs;
  filters that take more than linear time are left out.

A container is charged for all that it contains, as often as it contains it, so that nesting a value in itself does not
hide what printing or comparing it costs. A single operation is thus linear in what was charged before it.
"""

from __future__ import annotations

import json
import re
import string
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from pawl_server.frontend.template_budget import ITEM, STEP, Budget
from pawl_server.frontend.template_charges import SLICE_FILTER, STEP_FILTER, VALUE_FILTER, charged_tree

__all__ = ["TemplateSandbox"]

_MAX_OPERAND = 1 << 16  # of `*` and `**` in a template: enough for arithmetic, too little to fill memory
_MAX_WIDTH = 4096  # of what a template may ask to pad, indent, round or part to
_MAX_INDENT = 16  # of `tojson`, whose indent counts once per line and level
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[#0 +-]*(\*|\d{5}|\d*\.(\*|\d{5}))")
_WIDE_FIELD = re.compile(r"\{|\d{5}")
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap")  # worse than linear, or of much from little
_WIDTHS = frozenset({"batch", "center", "indent", "ljust", "rjust", "round", "slice", "zfill"})
_UNSAFE_OF_TEXT = frozenset({"encode", "expandtabs", "maketrans", "translate"})
_UNSAFE_OF_NUMBER = frozenset({"from_bytes", "to_bytes"})


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates are rendered within a budget, on the thread that asks.

    One unit is about a byte: a character, or an eighth of an item; a step costs 64.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self._rendering = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self._charged,
        )
        for name in _LEFT_OUT:
            del self.filters[name]
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = self._metered(name, function)
        for name, test in self.tests.items():
            self.tests[name] = self._stepping(test)
        self.filters[VALUE_FILTER] = self._charged  # names that a template cannot write
        self.filters[SLICE_FILTER] = self._charged_shallow
        self.filters[STEP_FILTER] = self._step

    def compile_bounded(self, source: str, budget: Budget) -> jinja2.Template:
        """A template that charges what it does.

        Raises:
            jinja2.TemplateError: the template is not valid, or is nested too deeply to be compiled.
        """
        self._rendering.budget = budget  # constants are worked out while compiling
        try:
            return self.from_string(charged_tree(self.parse(source)))
        except (RecursionError, MemoryError, SyntaxError) as error:
            raise jinja2.TemplateError("it is nested too deeply") from error

    def start(self, budget: Budget) -> None:
        """Charge what this thread renders from now on to a budget."""
        self._rendering.budget = budget

    @property
    def _budget(self) -> Budget:
        budget: Budget = self._rendering.budget
        return budget

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ANN401 - signature of the base class
        """Refuse also what makes much of little, and bytes."""
        if attr in (_UNSAFE_OF_TEXT if isinstance(obj, str) else _UNSAFE_OF_NUMBER if isinstance(obj, int) else ()):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401 - signature of the base class
        """Charge the result of an operator, before it is made where it may be large."""
        if operator in ("*", "**"):
            for operand in (left, right):
                size = abs(operand) if isinstance(operand, int | float) else len(operand)
                if size > (_MAX_OPERAND if operator == "*" else 64):
                    raise SecurityError(f"an operand of {operator} is too large")
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    self._budget.charge_value(sequence, max(times, 0))
        elif operator == "%" and isinstance(left, str):
            self._charge_format(left, _WIDE_PERCENT.search(left) is not None, left.count("%"), right)
        return self._charged(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, N805 - signature of the base class
        """Charge a call and what it returns."""
        __self._budget.charge(STEP)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            if __obj.__name__ == "join" and args:
                args = (__self._joined(args[0], __obj.__self__),)
            __self._before(__obj.__name__, (__obj.__self__, *args), kwargs)
        return __self._charged(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: ANN401 - signature of the base class
        """Charge `str.format`, which the base class replaces by one that reaches no attributes."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        text: str = value.__self__

        def charged(*args: object, **kwargs: object) -> str:
            fields = list(string.Formatter().parse(text))
            wide = any(spec and _WIDE_FIELD.search(spec) for _, _, spec, _ in fields)
            self._charge_format(text, wide, len(fields), (args, kwargs))
            return formatted(*args, **kwargs)

        return charged

    def _charged(self, value: Any) -> Any:  # noqa: ANN401 - as in the template
        self._budget.charge_value(value)
        return value

    def _charged_shallow(self, value: Any) -> Any:  # noqa: ANN401 - as in the template
        """A slice repeats nothing: what it refers to was charged when it was made."""
        self._budget.charge(ITEM * len(value))
        return value

    @pass_context  # so that it is never worked out as a constant
    def _step(self, _context: Context, text: int) -> bool:
        self._budget.charge(STEP + text)
        return True

    def _charge_format(self, text: str, wide: bool, fields: int, values: object) -> None:
        if wide:
            raise SecurityError(
                f"a width or precision of the format {text[:40]!r} is 5 digits or more, or not written out"
            )
        self._budget.charge_value(values, fields)

    def _before(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Charge filters and methods of text that make much of little; `args` begin with what they apply to."""
        if name in _WIDTHS:
            for number in (*args[1:], *kwargs.values()):
                if isinstance(number, int) and abs(number) > _MAX_WIDTH:
                    raise SecurityError(f"{name} of {number} is more than {_MAX_WIDTH}")
        if name == "replace":
            old, new = (str(_argument(args, kwargs, place, part, "")) for place, part in ((1, "old"), (2, "new")))
            self._budget.charge(str(args[0]).count(old) * len(new))
        elif name == "indent":
            width = _argument(args, kwargs, 1, "width", 4)
            lines = len(str(args[0]).splitlines()) + 1
            self._budget.charge(lines * (len(width) if isinstance(width, str) else int(width)))
        elif name == "format":
            text = str(args[0])
            self._charge_format(text, _WIDE_PERCENT.search(text) is not None, text.count("%"), (args[1:], kwargs))
        elif name == "sum" and not isinstance(_argument(args, kwargs, 2, "start", 0), int | float):
            raise SecurityError("sum adds numbers alone")

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with its costs; jinja2's mark of a filter that wants the context or the environment is kept."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any filter's
            self._budget.charge(STEP)
            head, values = args[:skip], args[skip:]
            if name == "join":
                values = (self._joined(values[0], _argument(values, kwargs, 1, "d", "")), *values[1:])
            self._before(name, values, kwargs)
            return self._charged(function(*head, *values, **kwargs))

        return metered

    def _joined(self, values: Iterable[Any], between: object) -> list[Any]:
        """What is to be joined, charged with what goes between."""
        items = list(values)
        self._budget.charge_value(items)
        self._budget.charge(len(items) * len(str(between)))
        return items

    def _stepping(self, function: Any) -> Callable[..., Any]:  # noqa: ANN401 - jinja2 types its tests as functions
        @wraps(function)
        def stepping(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any test's
            self._budget.charge(STEP)
            return function(*args, **kwargs)

        return stepping


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which training uses to mark turns; here its body alone counts."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Replace the tag by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Prints without its values, which may be other namespaces and so much more than was charged."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face has it: for the model's eyes, so nothing is escaped for HTML."""
    for space in (indent, *(separators or ())):
        if (len(space) if isinstance(space, str) else space or 0) > _MAX_INDENT:
            raise SecurityError(f"tojson: an indent or separator is longer than {_MAX_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: object) -> Any:  # noqa: ANN401 - as in the template
    return args[place] if len(args) > place else kwargs.get(name, default)
