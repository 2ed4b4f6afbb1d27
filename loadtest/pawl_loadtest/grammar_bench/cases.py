"""What the libraries are asked: grammars with texts that fit and that do not, and grammars meant to hurt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["FEATURES", "HOSTILE", "SPEED", "Feature", "Grammar"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """One constraint: `kind` is json_schema, regex or grammar; `source` by library where their notations differ."""

    name: str
    kind: str
    source: str
    others: Mapping[str, str] | None = None

    def of(self, library: str) -> str:
        """The text for a library."""
        return (self.others or {}).get(library, self.source)


@dataclass(frozen=True, slots=True)
class Feature:
    """A grammar with texts that it must accept and texts that it must not."""

    grammar: Grammar
    good: Sequence[str]
    bad: Sequence[str]


def _schema(name: str, schema: object) -> Grammar:
    return Grammar(name, "json_schema", json.dumps(schema))


def _feature(name: str, schema: object, good: Sequence[object], bad: Sequence[object]) -> Feature:
    texts = [
        [json.dumps(value, separators=(",", ":"), ensure_ascii=False) for value in values] for values in (good, bad)
    ]
    return Feature(_schema(name, schema), *texts)


_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.com$"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 4},
    },
    "required": ["name", "age", "mail", "tags"],
    "additionalProperties": False,
}
_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
_WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"enum": [f"{i}_{j}" for j in range(8)]} for i in range(60)},
    "required": [f"field_{i}" for i in range(60)],
    "additionalProperties": False,
}
_ARITHMETIC_LARK = 'start: sum\nsum: term (("+" | "-") term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]{1,6}/\n'
_ARITHMETIC_GBNF = 'root ::= sum\nsum ::= term (("+" | "-") term)*\nterm ::= [0-9]{1,6} | "(" sum ")"\n'
_ARITHMETIC = Grammar("arithmetic", "grammar", _ARITHMETIC_LARK, {"xgrammar": _ARITHMETIC_GBNF})

SPEED: Sequence[tuple[Grammar, str]] = (
    (
        _schema("person", _PERSON),
        '{"name":"Ada Lovelace of the long name","age":36,"mail":"ada@analytical.com","tags":["a","math","early"]}',
    ),
    (
        _schema("tree", _TREE),
        '{"value":1.5,"children":[{"value":-2,"children":[]},{"value":3e8,"children":[{"value":0,"children":[]}]}]}',
    ),
    (_schema("wide", _WIDE), json.dumps({f"field_{i}": f"{i}_{i % 8}" for i in range(60)}, separators=(",", ":"))),
    (_schema("any object", {"type": "object"}), '{"a":{"b":"some free text, as long as it likes"},"c":null}'),
    (
        Grammar("date or word", "regex", "([0-9]{4}-[0-9]{2}-[0-9]{2}|[a-z ]{1,60})"),
        "the quick brown fox jumps over it",
    ),
    (_ARITHMETIC, "1+(22-(333+4444))-55555"),
)
"""Grammars with a text that is walked token by token."""

FEATURES: Sequence[Feature] = (
    _feature("type list", {"type": ["integer", "null"]}, [1, None], ["a", True]),
    _feature("enum", {"enum": ["a", 1, None, {"b": [2]}]}, ["a", 1, None, {"b": [2]}], ["b", 2]),
    _feature("const", {"const": {"a": 1}}, [{"a": 1}], [{"a": 2}]),
    _feature("minLength, maxLength", {"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd"]),
    _feature("pattern", {"type": "string", "pattern": "^a+b$"}, ["aab"], ["aa", "xab"]),
    _feature("pattern, not anchored", {"type": "string", "pattern": "b"}, ["abc", "b"], ["ac"]),
    _feature("format date", {"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01", "x"]),
    _feature("format date-time", {"type": "string", "format": "date-time"}, ["2024-02-29T10:00:00Z"], ["x"]),
    _feature("format uuid", {"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["x"]),
    _feature("format email", {"type": "string", "format": "email"}, ["a@b.com"], ["ab"]),
    _feature("integer range", {"type": "integer", "minimum": -3, "maximum": 120}, [-3, 0, 120], [-4, 121]),
    _feature("exclusive range", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0.5, 1], [0, 1.5]),
    _feature("multipleOf", {"type": "integer", "multipleOf": 5}, [0, 10], [3]),
    _feature(
        "items, minItems, maxItems",
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
        [[1], [1, 2]],
        [[], [1, 2, 3], ["a"]],
    ),
    _feature(
        "prefixItems",
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
        [[1, "a"]],
        [["a", 1], [1]],
    ),
    _feature("uniqueItems", {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, [[1, 2]], [[1, 1]]),
    _feature("contains", {"type": "array", "contains": {"const": 1}}, [[2, 1]], [[2]]),
    _feature(
        "optional properties",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["b"],
            "additionalProperties": False,
        },
        [{"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}, {"b": 1, "c": 1}],
    ),
    _feature(
        "additionalProperties",
        {"type": "object", "additionalProperties": {"type": "integer"}},
        [{"x": 1}, {}],
        [{"x": "a"}],
    ),
    _feature(
        "patternProperties",
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        [{"xa": 1}],
        [{"ya": 1}, {"xa": "a"}],
    ),
    _feature("minProperties", {"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    _feature("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a"}}, [{"ab": 1}], [{"b": 1}]),
    _feature("anyOf", {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, [1, "a"], ["ab", None]),
    _feature("oneOf, disjoint", {"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, [1, True], ["a"]),
    _feature("allOf", {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 5}]}, [2, 5], [1, 6]),
    _feature("not", {"type": "integer", "not": {"const": 3}}, [2], [3]),
    _feature(
        "if, then, else",
        {"if": {"type": "integer"}, "then": {"minimum": 2}, "else": {"type": "null"}},
        [2, None],
        [1, "a"],
    ),
    _feature(
        "dependentRequired",
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        [{"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    _feature(
        "$ref, $defs, recursion",
        _TREE,
        [{"value": 1, "children": [{"value": 2, "children": []}]}],
        [{"value": 1}, {"value": 1, "children": [1]}],
    ),
    _feature("escapes in strings", {"type": "string"}, ['a"b\\c\n\u00e9\U0001f600'], [1]),
    Feature(Grammar("regex classes", "regex", r"\d{2}[^a-c]\w+"), ("12d_", "99-x"), ("12a_", "1-x")),
    Feature(Grammar("regex alternation", "regex", "(ab|a|abc)d?"), ("a", "abd", "abcd"), ("b", "abb")),
    Feature(Grammar("regex non-greedy", "regex", "a.*?b"), ("ab", "axb"), ("ax",)),
    Feature(Grammar("regex Unicode class", "regex", r"\p{Greek}+"), ("αβγ",), ("abc",)),
    Feature(Grammar("regex anchors", "regex", "^ab$"), ("ab",), ("^ab$", "xab")),
    Feature(Grammar("regex case flag", "regex", "(?i)ab"), ("AB", "ab"), ("ac",)),
    Feature(Grammar("regex look-ahead", "regex", "(?=a)[ab]c"), ("ac",), ("bc",)),
    Feature(Grammar("regex word border", "regex", r"a\b b"), ("a b",), ("ab",)),
    Feature(Grammar("regex back-reference", "regex", r"(a|b)\1"), ("aa",), ("ab",)),
    Feature(_ARITHMETIC, ("1+2", "(1-(2+3))"), ("1+", "(1")),
)

_DEEP: object = {"type": "integer"}
for _ in range(400):
    _DEEP = {"type": "array", "items": _DEEP, "minItems": 1}
_COMBINED = {"allOf": [{"anyOf": [{"type": "string", "pattern": f"^.{{{i}}}a"}, {"minLength": i}]} for i in range(14)]}

HOSTILE: Sequence[Grammar] = (
    Grammar("nested repetition", "regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"),
    Grammar("(a?){n}a{n}", "regex", "(a?){5000}a{5000}"),
    Grammar("exponential states", "regex", "(a|b)*a(a|b){60}c"),
    Grammar("(a+)+ chain", "regex", "(((a+)+)+)+" * 50 + "b"),
    Grammar("Unicode repetition", "regex", r"(\p{L}{1,500}\d{1,500}){1,500}"),
    Grammar("alternation of 20000", "regex", "|".join(f"{i:05d}x{i * 7919 % 20000}" for i in range(20000))),
    _schema("enum of 20000", {"enum": [f"{i * 7919 % 20000}{'y' * (i % 40)}" for i in range(20000)]}),
    _schema("maxLength 1e8", {"type": "string", "minLength": 90_000_000, "maxLength": 100_000_000}),
    _schema("minItems 1e6", {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}),
    _schema("nesting 400", _DEEP),
    _schema("allOf of anyOf", _COMBINED),
    _schema("5000 optional properties", {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}),
    _schema("endless reference", {"$ref": "#"}),
    Grammar(
        "ambiguous",
        "grammar",
        'start: s\ns: s s s | s s | "a" | ""\n',
        {"xgrammar": 'root ::= s\ns ::= s s s | s s | "a" | ""\n'},
    ),
    Grammar("left recursion only", "grammar", 'start: s\ns: s "a"\n', {"xgrammar": 'root ::= s\ns ::= s "a"\n'}),
    Grammar(
        "20000 rules",
        "grammar",
        "start: r0\n" + "".join(f'r{i}: "a" r{i + 1} | "b"\n' for i in range(20000)) + 'r20000: "c"\n',
        {
            "xgrammar": "root ::= r0\n"
            + "".join(f'r{i} ::= "a" r{i + 1} | "b"\n' for i in range(20000))
            + 'r20000 ::= "c"\n'
        },
    ),
)
"""Each within 1 MiB: what a caller could send."""
