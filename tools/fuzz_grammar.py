"""Random GBNF grammars and JSON schemas for tools/fuzz.py."""

from __future__ import annotations

import json
import random
from typing import Any

from fuzz_text import deep_json, mangle

GRAMMARS = [
    'root ::= "a" | "b" root\n',
    "root ::= [a-z]+ ws [0-9]{2,5}\nws ::= [ \\t\\n]*\n",
    'root ::= item ("," item)*\nitem ::= "[" root? "]" | [^\\x00-\\x1F"\\\\]{0,20}\n',
    'root ::= "x"{3} | (("y" | "z")+ "w"?)*\n# note\n',
    "root ::= <[1]> | !<[2]> root | .\n",
]


def _rule(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        return rng.choice(
            [
                '"a"',
                "[a-z]",
                "[^a]",
                ".",
                "root",
                "r1",
                "r2",
                '""',
                '"\\n"',
                '"\\U0001F600"',
                "[]",
                "[^]",
                "<[5]>",
                "!<[6]>",
                '"\\x"',
            ]
        )
    a, b = _rule(rng, depth - 1), _rule(rng, depth - 1)
    repeat = rng.choice(
        [
            "{2}",
            "{0,}",
            "{,3}",
            "{3,1}",
            "{2000}",
            "{2001}",
            "{0}",
            "{99999999999}",
            "{1000,1000}",
            "*",
            "+",
            "?",
            "**",
            "??",
        ]
    )
    return rng.choice(
        [f"{a} {b}", f"{a} | {b}", f"({a})", f"({a}){repeat}", a + repeat, f"({a} | )", f"(({a}){repeat}){repeat}"]
    )


def grammar(rng: random.Random) -> str:
    kind = rng.random()
    n = rng.choice([100, 150, 300, 3000, 100000])
    if kind < 0.25:
        chain = "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "a"\n'
        shapes = [
            "root ::= " + "(" * n + '"a"' + ")" * n,
            "root ::= " + "(" * n,
            'root ::= "' + "a" * n,
            "root ::= root",
            "root ::= r\nr ::= root",
        ]
        shapes += [
            "root ::= r0\n" + chain,
            "root ::= " + '("a"' * n + ")*" * n,
            "root ::= " + "(" * n + '"a"' + "){2}" * n,
            "root ::= (" * n,
        ]
        shapes += [
            "root ::= " + '"a"? ' * n,
            "root ::= " + '"a" | ' * n + '"b"',
            "root ::= (" + '"a"* ' * (n // 10) + ")*",
            "#" * n,
            "root ::= [" + "a" * n + "]",
        ]
        shapes += [
            'root ::= "a"' + "*" * n,
            "root ::= " + "((" * 20 + '"a"' + "){9}){9}" * 20,
            "root ::= r0? r0?\n" + chain,
            "root ::= " + "r0 " * n + '\nr0 ::= ""',
        ]
        shapes += [
            'root ::= "(" * ' + "(" * n,
            'root ::= "\\' + '"((((' * n,
            "root ::= " + "[(]" * n,
            'root ::= "a"\n' * n,
            "root ::= a | a\na ::= b b\nb ::= " + '"" ' * n,
        ]
        return rng.choice(shapes)
    if kind < 0.5:
        return mangle(rng, rng.choice(GRAMMARS), 4)
    names = ["root", "r1", "r2"][: rng.randrange(1, 4)]
    text = "".join(f"{name} ::= {_rule(rng, rng.randrange(5))}\n" for name in names)
    return mangle(rng, text) if rng.random() < 0.2 else text


def _schema(rng: random.Random, depth: int) -> Any:
    numbers = [0, 1, -1, 5, 100, 2**31, 2**63, -(2**63), 10**30, 1.5, "1", None]
    atoms: list[Any] = [{"type": t} for t in ("string", "integer", "number", "boolean", "null", "array", "object", "x")]
    atoms += [
        {"enum": [1, "a", None]},
        {"const": {"a": 1}},
        {},
        True,
        False,
        {"$ref": "#/$defs/a"},
        {"$ref": "#"},
        {"$ref": "http://x/y"},
    ]
    atoms += [{"type": "string", "minLength": rng.choice(numbers), "maxLength": rng.choice(numbers)}]
    atoms += [
        {
            "type": "integer",
            "minimum": rng.choice(numbers),
            "maximum": rng.choice(numbers),
            "exclusiveMinimum": rng.choice(numbers),
        }
    ]
    atoms += [
        {
            "type": "string",
            "pattern": rng.choice(
                [
                    "^a$",
                    "^(a|b)*$",
                    "a",
                    "^" + "(" * 3000,
                    "^a{1,100000}$",
                    "^[a-$",
                    "^(?=a)$",
                    "^\\d+$",
                    "^((a{9}){9}){9}$",
                ]
            ),
        }
    ]
    atoms += [{"type": "string", "format": rng.choice(["date", "uuid", "time", "x"])}]
    if depth <= 0:
        return rng.choice(atoms)
    parts = [_schema(rng, depth - 1) for _ in range(rng.randrange(4))]
    shapes: list[Any] = [
        {
            "type": "array",
            "items": parts[0] if parts else {},
            "minItems": rng.choice(numbers),
            "maxItems": rng.choice(numbers),
        }
    ]
    shapes += [
        {
            "type": "object",
            "properties": {f"p{i}": p for i, p in enumerate(parts)},
            "required": ["p0"],
            "additionalProperties": rng.choice([True, False, {}]),
        }
    ]
    shapes += [
        {rng.choice(["anyOf", "oneOf", "allOf"]): parts},
        {"type": ["string", "null"]},
        {"prefixItems": parts},
        {"not": parts},
    ]
    shapes += [
        {"$defs": {"a": parts[0] if parts else {}}, "$ref": "#/$defs/a"},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ]
    return rng.choice(shapes)


def schema_text(rng: random.Random, deep: bool = True) -> str:
    if deep and rng.random() < 0.2:
        n = rng.choice([50, 150, 1000, 100000])
        shapes = ['{"type":"array","items":' * n + "{}" + "}" * n, '{"anyOf":[' * n + "{}" + "]}" * n, deep_json(rng)]
        shapes += ['{"type":"object","properties":{"a":' * n + "{}" + "}}" * n, json.dumps({"enum": list(range(n))})]
        shapes += [
            json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(min(n, 300))}}),
            '{"const":' + deep_json(rng) + "}",
        ]
        shapes += [
            json.dumps({"type": "string", "pattern": "^" + "(" * n + "a" + ")" * n + "$"}),
            json.dumps({"type": "string", "maxLength": n}),
        ]
        return rng.choice(shapes)
    text = json.dumps(_schema(rng, rng.randrange(4)))
    return mangle(rng, text) if deep and rng.random() < 0.15 else text
