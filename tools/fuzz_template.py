"""Random chat templates, messages and tools for tools/fuzz.py."""

from __future__ import annotations

import json
import random
from typing import Any

import fuzz_grammar
from fuzz_text import deep_json, mangle

PLAIN = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>a{% endif %}"
WORDS = "messages message tools x ns loop m none true bos_token add_generation_prompt namespace range dict undefined".split()
FILTERS = "length upper trim tojson join first last list string int float sort reverse unique default('x') replace('a', 'b')".split()
FILTERS += "items dictsort map(attribute='role') selectattr('role') rejectattr('role') indent(4) safe abs capitalize title x".split()
METHODS = "split('a') strip() upper() items() keys() get('role') startswith('u') append(1) replace('a', 'aa') pop() format(1) x()".split()


def _expression(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        atoms = [
            "1",
            "0",
            "-1",
            "'a'",
            '"b"',
            "[]",
            "{}",
            "1.5",
            "''",
            "9223372036854775807",
            "99999999999999999999",
            "1e999",
        ]
        return rng.choice([*WORDS, *atoms])
    a, b, c = (_expression(rng, depth - rng.randrange(1, 3)) for _ in range(3))
    shapes = [
        f"{a} + {b}",
        f"{a} ~ {b}",
        f"{a} * {b}",
        f"{a} % {b}",
        f"{a} // {b}",
        f"{a} / {b}",
        f"{a} - {b}",
        f"not {a}",
    ]
    shapes += [
        f"({a})",
        f"[{a}, {b}]",
        f"{{'k': {a}, {b}: {c}}}",
        f"{a}[{b}]",
        f"{a}[{b}:{c}]",
        f"{a}[::{b}]",
        f"{a}.role",
    ]
    shapes += [
        f"{a} if {b} else {c}",
        f"{a} in {b}",
        f"{a} == {b}",
        f"{a} < {b}",
        f"{a} and {b} or {c}",
        f"-{a}",
        f"range({a}, {b})",
    ]
    shapes += [
        f"{a} is {rng.choice(['defined', 'none', 'string', 'mapping', 'iterable', 'number', 'x', 'divisibleby(0)', 'in [1]'])}"
    ]
    shapes += [
        f"{a} | {rng.choice(FILTERS)}",
        f"{a}.{rng.choice(METHODS)}",
        f"range({a})",
        f"namespace(a={a})",
        f"raise_exception({a})",
    ]
    shapes += [f"{rng.choice(WORDS)}({a}, k={b})", f"strftime_now({a})"]
    return rng.choice(shapes)


def _statement(rng: random.Random, depth: int) -> str:
    e = _expression(rng, rng.randrange(4))
    body = "".join(_statement(rng, depth - 1) for _ in range(rng.randrange(1, 4))) if depth > 0 else "{{ x }}"
    name = rng.choice("xyf")
    shapes = [
        f"{{{{ {e} }}}}",
        "text\n",
        f"{{% set {name} = {e} %}}",
        f"{{%- if {e} -%}}{body}{{% else %}}{body}{{% endif %}}",
    ]
    shapes += [
        f"{{% for m in {e} %}}{body}{{% endfor %}}",
        f"{{% for a, b in {e} %}}{body}{{% endfor %}}",
        "{# c #}",
        "{{ m }}",
    ]
    shapes += [
        f"{{% macro {name}(a, b={e}) %}}{body}{{% endmacro %}}",
        f"{{{{ {name}({e}) }}}}",
        f"{{% set ns.x = {e} %}}",
    ]
    shapes += [
        f"{{% for m in messages if {e} %}}{body}{{% endfor %}}",
        "{% break %}",
        "{% continue %}",
        "{% set ns = namespace() %}",
    ]
    shapes += [f"{{% call {name}({e}) %}}{body}{{% endcall %}}", f"{{% filter upper %}}{body}{{% endfilter %}}"]
    shapes += [
        f"{{% set {name} %}}{body}{{% endset %}}",
        f"{{% generation %}}{body}{{% endgeneration %}}",
        "{% raw %}{{{% endraw %}",
    ]
    return rng.choice(shapes)


def _monster(rng: random.Random) -> str:
    n = rng.choice([150, 400, 2000, 20000, 100000])
    double = "{% set ns = namespace(x='a') %}{% for i in range(N) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
    nest = "".join(f"{{% for v{i} in range(1000) %}}" for i in range(9))
    shapes = [
        "{{ " + "(" * n + "1" + ")" * n + " }}",
        "{{ " + "[" * n + "]" * n + " }}",
        "{{ " + "{'a':" * n + "1" + "}" * n + " }}",
    ]
    shapes += [
        "{{ " + "not " * n + "x }}",
        "{{ " + "-" * n + "1 }}",
        "{{ " + "- " * n + "1 }}",
        "{{ 1" + " + 1" * n + " }}",
        "{{ 'a'" + " ~ 'a'" * n + " }}",
    ]
    shapes += [
        "{{ x" + ".a" * n + " }}",
        "{{ x" + "[0]" * n + " }}",
        "{{ f" + "()" * n + " }}",
        "{{ x" + " | upper" * n + " }}",
    ]
    shapes += [
        "{% if 1 %}" * n + "{% endif %}" * n,
        "{% for i in [1] %}" * n + "{% endfor %}" * n,
        "{% if 0 %}" + "{% elif 1 %}" * n + "{% endif %}",
    ]
    shapes += [
        "{{ " + "1 if 0 else " * n + "1 }}",
        "{{ " + "x and " * n + "x }}",
        "{{ " + "1 == " * n + "1 }}",
        "{{ (" * n,
        "{%" * n,
        "{{" * n,
    ]
    shapes += [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    ]
    shapes += [
        "{% macro f(g) %}{{ g(g) }}{% endmacro %}{{ f(f) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(N) }}",
    ]
    shapes += [
        "{{ range(1000000000) | length }}",
        "{{ range(N) | list | length }}",
        double,
        nest + "x" + "{% endfor %}" * 9,
    ]
    shapes += [
        "{{ 'a' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 'a' | indent(1000000000) }}",
        "{{ range(0, 9, 0) }}",
    ]
    shapes += [
        "{% set x = [] %}{{ x.append(x) }}{{ x }}{{ x | tojson }}",
        "{% set x = {} %}{% set y = x.update({'a': x}) %}{{ x }}",
    ]
    shapes += [
        "{% set x = [] %}{% for i in x %}{{ x.append(1) }}{% endfor %}",
        "{% set x = [1] %}{% for i in x %}{% set y = x.append(1) %}{% endfor %}",
    ]
    shapes += [
        "{% set ns = namespace(x=[]) %}{% for i in range(N) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% macro f() %}" * n + "{% endmacro %}" * n,
    ]
    shapes += [
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ ns.x.x.x | tojson }}",
        "{% filter upper %}" * n + "{% endfilter %}" * n,
    ]
    shapes += [
        "{{ '" + "a" * n * 10,
        "{#" * n,
        "{% raw %}" * n,
        "{% set a = " + "'x' if y else " * n + "'z' %}",
        "{{ a " + "is defined " * n + "}}",
    ]
    return rng.choice(shapes).replace("range(N)", f"range({n})").replace("(N)", f"({n})")


def template(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return _monster(rng)
    if kind < 0.4:
        return mangle(rng, PLAIN, 4)
    text = "".join(_statement(rng, rng.randrange(4)) for _ in range(rng.randrange(1, 6)))
    return mangle(rng, text) if rng.random() < 0.2 else text


def _json_value(rng: random.Random, depth: int) -> Any:
    atoms: list[Any] = [None, True, 0, -1, 1.5, 10**30, "", "a", "<s>", "x" * 1000, [], {}]
    if depth <= 0 or rng.random() < 0.5:
        return rng.choice(atoms)
    if rng.random() < 0.5:
        return [_json_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = ["role", "content", "type", "text", "tool_calls", "function", "name", "arguments", "id", "x"]
    return {rng.choice(keys): _json_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def messages(rng: random.Random) -> str:
    good: list[Any] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "No"},
    ]
    kind = rng.random()
    if kind < 0.5:
        return json.dumps(good)
    if kind < 0.6:
        return deep_json(rng)
    if kind < 0.65:
        return json.dumps(good)[:-2] + ', "extra": ' + deep_json(rng) + "}]"
    good[rng.randrange(3)] = {
        "role": rng.choice(["user", "tool", "system", "", None, 1]),
        "content": _json_value(rng, 3),
    }
    if rng.random() < 0.3:
        good[rng.randrange(3)]["tool_calls"] = _json_value(rng, 4)
    text = json.dumps(good if rng.random() < 0.8 else _json_value(rng, 4))
    return mangle(rng, text) if rng.random() < 0.3 else text


def tools(rng: random.Random) -> str | None:
    kind = rng.random()
    if kind < 0.6:
        return None
    schema: Any = json.loads(fuzz_grammar.schema_text(rng, deep=False))
    text = json.dumps([{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}])
    if kind < 0.7:
        return text.replace('"d"', deep_json(rng))
    return mangle(rng, text) if rng.random() < 0.3 else text
