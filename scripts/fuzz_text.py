"""Random texts for scripts/fuzz.py: policies, session options, chat templates, grammars, JSON schemas."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = ["0", "1", "2", "-1", "4", "16", "31", "32", "64", "100", "255", "256", "257", "511", "512", "1000", "4096", "65536"]
NUMBERS += ["1048576", "1073741823", "1073741824", "1073741825", "2147483647", "2147483648", "4294967040", "4294967295"]
NUMBERS += ["9223372036854775807", "9223372036854775808", "999999999999999999", "-9223372036854775808", "1e3", "0x10", "1.5", ""]
NUMBERS += [" 4", "4 ", "+4", "nan", "inf", "a", "\u0664"]

KEYS = {
    "budget": NUMBERS,
    "sinks": NUMBERS,
    "recent": NUMBERS,
    "scope": ["token", "layer", "head", "Token", ""],
    "positions": ["true", "cache", "auto", "false", ""],
    "update": ["inplace", "shift", "gather", "x"],
    "rotate_every": NUMBERS,
    "score_queries": [*NUMBERS, "all"],
    "evict_every": NUMBERS,
    "page_size": NUMBERS,
    "cpu_attn": ["0", "1", "2", "x"],
    "nonsense": ["1"],
}
POLICIES = "none streaming h2o random tova snapkv knorm keydiff rkv caote vatp a2sf pagedeviction NONE x".split()

SESSION = {
    "n_ctx": NUMBERS,
    "n_batch": NUMBERS,
    "n_ubatch": NUMBERS,
    "n_threads": ["1", "2", "0", "-1", "513"],
    "flash_attn": ["auto", "on", "off", "x"],
    "type_k": ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q2_K", ""],
    "type_v": ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "i8"],
    "offload_kv": ["0", "1", "2"],
    "n_outputs": NUMBERS,
    "context_shift": ["0", "1", "-1"],
    "rope_upstream": ["0", "1"],
}


def mangle(rng: random.Random, text: str, n: int = 3) -> str:
    """A few characters lost, doubled, exchanged or put in."""
    for _ in range(rng.randrange(1, n + 1)):
        at, new = rng.randrange(len(text) + 1), rng.choice(",:=;|-+*?[](){}\"'\\/#%<>$ \n\t\u00e9\u4e00\U0001f600a0")
        cut = rng.randrange(4)
        text = text[:at] + rng.choice(["", new, text[at : at + 1] * 2]) + text[at + (cut > 0) :]
    return text


def _items(rng: random.Random, keys: dict[str, list[str]], n_max: int) -> list[str]:
    chosen = rng.sample(sorted(keys), rng.randrange(min(n_max, len(keys)) + 1))
    if chosen and rng.random() < 0.05:
        chosen.append(chosen[0])
    return [f"{key}={rng.choice(keys[key])}" for key in chosen]


def policy(rng: random.Random) -> str:
    if rng.random() < 0.02:
        return rng.choice(["", ":", ",", "=", "x" * 100000, "h2o:" + "budget=64," * 20000, "\x01", "streaming:budget=" + "9" * 5000])
    # half of them with numbers that can work
    mild = ["4", "8", "16", "32", "48", "64", "96", "128", "200", "300"]
    keys = {k: mild if v is NUMBERS and rng.random() < 0.5 else v for k, v in KEYS.items() if k != "nonsense" or rng.random() < 0.1}
    items = _items(rng, keys, 6)
    text = rng.choice(POLICIES) + (":" if items or rng.random() < 0.1 else "") + ",".join(items)
    return mangle(rng, text) if rng.random() < 0.15 else text


def options(rng: random.Random) -> str:
    """Of equip_session_create; a policy as options in most of them."""
    items = _items(rng, SESSION, 4)
    if rng.random() < 0.7:
        name, _, rest = policy(rng).partition(":")
        items += [f"policy={name}", *[item for item in rest.split(",") if item]]
    text = ",".join(items)
    return mangle(rng, text) if rng.random() < 0.1 else text


# ---- templates -------------------------------------------------------------------------------------------------------

PLAIN = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>a{% endif %}"
WORDS = "messages message tools x ns loop m none true bos_token add_generation_prompt namespace range dict undefined".split()
FILTERS = "length upper trim tojson join first last list string int float sort reverse unique default('x') replace('a', 'b')".split()
FILTERS += "items dictsort map(attribute='role') selectattr('role') rejectattr('role') indent(4) safe abs capitalize title x".split()
METHODS = "split('a') strip() upper() items() keys() get('role') startswith('u') append(1) replace('a', 'aa') pop() format(1) x()".split()


def _expression(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        atoms = ["1", "0", "-1", "'a'", '"b"', "[]", "{}", "1.5", "''", "9223372036854775807", "99999999999999999999", "1e999"]
        return rng.choice([*WORDS, *atoms])
    a, b, c = (_expression(rng, depth - rng.randrange(1, 3)) for _ in range(3))
    shapes = [f"{a} + {b}", f"{a} ~ {b}", f"{a} * {b}", f"{a} % {b}", f"{a} // {b}", f"{a} / {b}", f"{a} - {b}", f"not {a}"]
    shapes += [f"({a})", f"[{a}, {b}]", f"{{'k': {a}, {b}: {c}}}", f"{a}[{b}]", f"{a}[{b}:{c}]", f"{a}[::{b}]", f"{a}.role"]
    shapes += [f"{a} if {b} else {c}", f"{a} in {b}", f"{a} == {b}", f"{a} < {b}", f"{a} and {b} or {c}", f"-{a}", f"range({a}, {b})"]
    shapes += [f"{a} is {rng.choice(['defined', 'none', 'string', 'mapping', 'iterable', 'number', 'x', 'divisibleby(0)', 'in [1]'])}"]
    shapes += [f"{a} | {rng.choice(FILTERS)}", f"{a}.{rng.choice(METHODS)}", f"range({a})", f"namespace(a={a})", f"raise_exception({a})"]
    shapes += [f"{rng.choice(WORDS)}({a}, k={b})", f"strftime_now({a})"]
    return rng.choice(shapes)


def _statement(rng: random.Random, depth: int) -> str:
    e = _expression(rng, rng.randrange(4))
    body = "".join(_statement(rng, depth - 1) for _ in range(rng.randrange(1, 4))) if depth > 0 else "{{ x }}"
    name = rng.choice("xyf")
    shapes = [f"{{{{ {e} }}}}", "text\n", f"{{% set {name} = {e} %}}", f"{{%- if {e} -%}}{body}{{% else %}}{body}{{% endif %}}"]
    shapes += [f"{{% for m in {e} %}}{body}{{% endfor %}}", f"{{% for a, b in {e} %}}{body}{{% endfor %}}", "{# c #}", "{{ m }}"]
    shapes += [f"{{% macro {name}(a, b={e}) %}}{body}{{% endmacro %}}", f"{{{{ {name}({e}) }}}}", f"{{% set ns.x = {e} %}}"]
    shapes += [f"{{% for m in messages if {e} %}}{body}{{% endfor %}}", "{% break %}", "{% continue %}", "{% set ns = namespace() %}"]
    shapes += [f"{{% call {name}({e}) %}}{body}{{% endcall %}}", f"{{% filter upper %}}{body}{{% endfilter %}}"]
    shapes += [f"{{% set {name} %}}{body}{{% endset %}}", f"{{% generation %}}{body}{{% endgeneration %}}", "{% raw %}{{{% endraw %}"]
    return rng.choice(shapes)


def _monster(rng: random.Random) -> str:
    n = rng.choice([150, 400, 2000, 20000, 100000])
    double = "{% set ns = namespace(x='a') %}{% for i in range(N) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
    nest = "".join(f"{{% for v{i} in range(1000) %}}" for i in range(9))
    shapes = ["{{ " + "(" * n + "1" + ")" * n + " }}", "{{ " + "[" * n + "]" * n + " }}", "{{ " + "{'a':" * n + "1" + "}" * n + " }}"]
    shapes += ["{{ " + "not " * n + "x }}", "{{ " + "-" * n + "1 }}", "{{ " + "- " * n + "1 }}", "{{ 1" + " + 1" * n + " }}", "{{ 'a'" + " ~ 'a'" * n + " }}"]
    shapes += ["{{ x" + ".a" * n + " }}", "{{ x" + "[0]" * n + " }}", "{{ f" + "()" * n + " }}", "{{ x" + " | upper" * n + " }}"]
    shapes += ["{% if 1 %}" * n + "{% endif %}" * n, "{% for i in [1] %}" * n + "{% endfor %}" * n, "{% if 0 %}" + "{% elif 1 %}" * n + "{% endif %}"]
    shapes += ["{{ " + "1 if 0 else " * n + "1 }}", "{{ " + "x and " * n + "x }}", "{{ " + "1 == " * n + "1 }}", "{{ (" * n, "{%" * n, "{{" * n]
    shapes += ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}"]
    shapes += ["{% macro f(g) %}{{ g(g) }}{% endmacro %}{{ f(f) }}", "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(N) }}"]
    shapes += ["{{ range(1000000000) | length }}", "{{ range(N) | list | length }}", double, nest + "x" + "{% endfor %}" * 9]
    shapes += ["{{ 'a' * 1000000000 }}", "{{ [1] * 1000000000 }}", "{{ 'a' | indent(1000000000) }}", "{{ range(0, 9, 0) }}"]
    shapes += ["{% set x = [] %}{{ x.append(x) }}{{ x }}{{ x | tojson }}", "{% set x = {} %}{% set y = x.update({'a': x}) %}{{ x }}"]
    shapes += ["{% set x = [] %}{% for i in x %}{{ x.append(1) }}{% endfor %}", "{% set x = [1] %}{% for i in x %}{% set y = x.append(1) %}{% endfor %}"]
    shapes += ["{% set ns = namespace(x=[]) %}{% for i in range(N) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}", "{% macro f() %}" * n + "{% endmacro %}" * n]
    shapes += ["{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ ns.x.x.x | tojson }}", "{% filter upper %}" * n + "{% endfilter %}" * n]
    shapes += ["{{ '" + "a" * n * 10, "{#" * n, "{% raw %}" * n, "{% set a = " + "'x' if y else " * n + "'z' %}", "{{ a " + "is defined " * n + "}}"]
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


def deep_json(rng: random.Random) -> str:
    n = rng.choice([150, 300, 3000, 100000, 1000000])
    return rng.choice(["[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, "[" * n, '[{"a":' * n, "[[]," * n + "1" + "]" * n])


def messages(rng: random.Random) -> str:
    good: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "No"}]
    kind = rng.random()
    if kind < 0.5:
        return json.dumps(good)
    if kind < 0.6:
        return deep_json(rng)
    if kind < 0.65:
        return json.dumps(good)[:-2] + ', "extra": ' + deep_json(rng) + "}]"
    good[rng.randrange(3)] = {"role": rng.choice(["user", "tool", "system", "", None, 1]), "content": _json_value(rng, 3)}
    if rng.random() < 0.3:
        good[rng.randrange(3)]["tool_calls"] = _json_value(rng, 4)
    text = json.dumps(good if rng.random() < 0.8 else _json_value(rng, 4))
    return mangle(rng, text) if rng.random() < 0.3 else text


def tools(rng: random.Random) -> str | None:
    kind = rng.random()
    if kind < 0.6:
        return None
    schema: Any = json.loads(schema_text(rng, deep=False))
    text = json.dumps([{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}])
    if kind < 0.7:
        return text.replace('"d"', deep_json(rng))
    return mangle(rng, text) if rng.random() < 0.3 else text


# ---- grammars --------------------------------------------------------------------------------------------------------

GRAMMARS = [
    'root ::= "a" | "b" root\n',
    "root ::= [a-z]+ ws [0-9]{2,5}\nws ::= [ \\t\\n]*\n",
    'root ::= item ("," item)*\nitem ::= "[" root? "]" | [^\\x00-\\x1F"\\\\]{0,20}\n',
    'root ::= "x"{3} | (("y" | "z")+ "w"?)*\n# note\n',
    "root ::= <[1]> | !<[2]> root | .\n",
]


def _rule(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        return rng.choice(['"a"', "[a-z]", "[^a]", ".", "root", "r1", "r2", '""', '"\\n"', '"\\U0001F600"', "[]", "[^]", "<[5]>", "!<[6]>", '"\\x"'])
    a, b = _rule(rng, depth - 1), _rule(rng, depth - 1)
    repeat = rng.choice(["{2}", "{0,}", "{,3}", "{3,1}", "{2000}", "{2001}", "{0}", "{99999999999}", "{1000,1000}", "*", "+", "?", "**", "??"])
    return rng.choice([f"{a} {b}", f"{a} | {b}", f"({a})", f"({a}){repeat}", a + repeat, f"({a} | )", f"(({a}){repeat}){repeat}"])


def grammar(rng: random.Random) -> str:
    kind = rng.random()
    n = rng.choice([100, 150, 300, 3000, 100000])
    if kind < 0.25:
        chain = "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "a"\n'
        shapes = ["root ::= " + "(" * n + '"a"' + ")" * n, "root ::= " + "(" * n, 'root ::= "' + "a" * n, "root ::= root", "root ::= r\nr ::= root"]
        shapes += ["root ::= r0\n" + chain, "root ::= " + '("a"' * n + ")*" * n, "root ::= " + "(" * n + '"a"' + "){2}" * n, "root ::= (" * n]
        shapes += ["root ::= " + '"a"? ' * n, "root ::= " + '"a" | ' * n + '"b"', "root ::= (" + '"a"* ' * (n // 10) + ")*", "#" * n, "root ::= [" + "a" * n + "]"]
        shapes += ['root ::= "a"' + "*" * n, "root ::= " + "((" * 20 + '"a"' + "){9}){9}" * 20, "root ::= r0? r0?\n" + chain, "root ::= " + "r0 " * n + '\nr0 ::= ""']
        shapes += ['root ::= "(" * ' + "(" * n, 'root ::= "\\' + '"((((' * n, "root ::= " + "[(]" * n, 'root ::= "a"\n' * n, "root ::= a | a\na ::= b b\nb ::= " + '"" ' * n]
        return rng.choice(shapes)
    if kind < 0.5:
        return mangle(rng, rng.choice(GRAMMARS), 4)
    names = ["root", "r1", "r2"][: rng.randrange(1, 4)]
    text = "".join(f"{name} ::= {_rule(rng, rng.randrange(5))}\n" for name in names)
    return mangle(rng, text) if rng.random() < 0.2 else text


def _schema(rng: random.Random, depth: int) -> Any:
    numbers = [0, 1, -1, 5, 100, 2**31, 2**63, -(2**63), 10**30, 1.5, "1", None]
    atoms: list[Any] = [{"type": t} for t in ("string", "integer", "number", "boolean", "null", "array", "object", "x")]
    atoms += [{"enum": [1, "a", None]}, {"const": {"a": 1}}, {}, True, False, {"$ref": "#/$defs/a"}, {"$ref": "#"}, {"$ref": "http://x/y"}]
    atoms += [{"type": "string", "minLength": rng.choice(numbers), "maxLength": rng.choice(numbers)}]
    atoms += [{"type": "integer", "minimum": rng.choice(numbers), "maximum": rng.choice(numbers), "exclusiveMinimum": rng.choice(numbers)}]
    atoms += [{"type": "string", "pattern": rng.choice(["^a$", "^(a|b)*$", "a", "^" + "(" * 3000, "^a{1,100000}$", "^[a-$", "^(?=a)$", "^\\d+$", "^((a{9}){9}){9}$"])}]
    atoms += [{"type": "string", "format": rng.choice(["date", "uuid", "time", "x"])}]
    if depth <= 0:
        return rng.choice(atoms)
    parts = [_schema(rng, depth - 1) for _ in range(rng.randrange(4))]
    shapes: list[Any] = [{"type": "array", "items": parts[0] if parts else {}, "minItems": rng.choice(numbers), "maxItems": rng.choice(numbers)}]
    shapes += [{"type": "object", "properties": {f"p{i}": p for i, p in enumerate(parts)}, "required": ["p0"], "additionalProperties": rng.choice([True, False, {}])}]
    shapes += [{rng.choice(["anyOf", "oneOf", "allOf"]): parts}, {"type": ["string", "null"]}, {"prefixItems": parts}, {"not": parts}]
    shapes += [{"$defs": {"a": parts[0] if parts else {}}, "$ref": "#/$defs/a"}, {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}]
    return rng.choice(shapes)


def schema_text(rng: random.Random, deep: bool = True) -> str:
    if deep and rng.random() < 0.2:
        n = rng.choice([50, 150, 1000, 100000])
        shapes = ['{"type":"array","items":' * n + "{}" + "}" * n, '{"anyOf":[' * n + "{}" + "]}" * n, deep_json(rng)]
        shapes += ['{"type":"object","properties":{"a":' * n + "{}" + "}}" * n, json.dumps({"enum": list(range(n))})]
        shapes += [json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(min(n, 300))}}), '{"const":' + deep_json(rng) + "}"]
        shapes += [json.dumps({"type": "string", "pattern": "^" + "(" * n + "a" + ")" * n + "$"}), json.dumps({"type": "string", "maxLength": n})]
        return rng.choice(shapes)
    text = json.dumps(_schema(rng, rng.randrange(4)))
    return mangle(rng, text) if deep and rng.random() < 0.15 else text
