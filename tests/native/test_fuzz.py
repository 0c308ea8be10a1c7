"""Damaged and absurd input ends in one sentence: never in a signal, a hang or all of the memory.

tools/fuzz.py draws such input; what it found once stands here with its exact values. Each case runs in a child, so that a
signal is a failed test and not the end of the run.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import Spec, write
from native_api import Library, Model, NativeError, Session
from places import REPOSITORY

fuzz: Any = pytest.importorskip("fuzz") if hasattr(os, "fork") else None
fuzz_gguf: Any = pytest.importorskip("fuzz_gguf") if hasattr(os, "fork") else None
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the cases run in forked children")

SMALL: dict[str, Any] = {"n_embd": 64, "head_dim": 32, "n_ff": 64, "n_ctx_train": 256}
DEEP = 100_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny models by name, as fuzz_gguf reads them."""
    return dict(fuzz_gguf.bases(tmp_path_factory.mktemp("bases")))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(Spec(tokenizer="bytes", n_vocab=320, **SMALL), tmp_path_factory.mktemp("text") / "text.gguf")


# ---- model files -----------------------------------------------------------------------------------------------------


def run_file(library: Library, path: Path) -> Any:
    def body() -> None:
        model = Model(library, path)
        with Session(model, policy="none", n_ctx=64) as session:
            session.eval(list(range(1, 41)))
        with Session(model, policy="streaming", budget=16) as session:
            session.eval(list(range(1, 41)))

    return fuzz.in_child(body)


def changed(file: Any, keys: dict[str, Any], path: Path) -> Path:
    """The file with other values for some keys; None takes a key away; "." stands for the architecture."""
    file = fuzz_gguf.File(dict(file.keys), list(file.tensors))
    for name, value in keys.items():
        key = file.arch + name if name[0] == "." else name
        if value is None:
            del file.keys[key]
        elif isinstance(value, list):
            file.keys[key] = fuzz_gguf.Value(fuzz_gguf.ARRAY, value, 4)
        else:
            file.keys[key] = fuzz_gguf.Value(6 if isinstance(value, float) else 4, value)
    path.write_bytes(file.pack())
    return path


@pytest.mark.parametrize(
    "name", ["llama", "llama-text", "llama-q8_0", "qwen2", "gemma3", "gemma2", "smollm3", "gpt-oss", "lfm2"]
)
def test_the_models_that_are_mutated_run(library: Library, files: dict[str, Any], tmp_path: Path, name: str) -> None:
    assert run_file(library, changed(files[name], {}, tmp_path / "x.gguf")).kind == "ran"


@pytest.mark.parametrize(
    "name, keys",
    [
        ("llama", {".attention.head_count_kv": 3}),
        ("llama", {".attention.head_count_kv": 5}),
        ("llama", {".attention.head_count_kv": [3, 2]}),
        ("qwen2", {".rope.dimension_count": 31}),
        ("qwen2", {".rope.dimension_count": 64}),
        ("qwen2", {".rope.dimension_count": 1 << 31}),
        ("qwen2", {".attention.key_length": 0}),
        ("qwen2", {".attention.value_length": 0}),
        ("llama", {".context_length": 4294967040}),
        ("llama", {".context_length": (1 << 30) + 1}),
        ("llama", {".embedding_length": 0}),
        ("llama", {".block_count": 0}),
        ("llama", {".block_count": 513}),
        ("llama", {".vocab_size": 4294967295}),
        ("gemma3", {".attention.sliding_window": 4294967295}),
        ("llama", {".rope.freq_base": -1.0}),
        ("llama", {".rope.freq_base": math.nan}),
        ("llama", {".rope.freq_base": math.inf}),
        ("llama", {".rope.scaling.factor": math.nan}),
        ("llama", {".attention.layer_norm_rms_epsilon": -1.0}),
        ("llama", {".attention.layer_norm_rms_epsilon": math.nan}),
        ("gemma2", {".final_logit_softcapping": math.inf}),
        ("gpt-oss", {".expert_used_count": 4}),
        ("gpt-oss", {".expert_count": 1025}),
        ("mamba", {".ssm.time_step_rank": 0}),
    ],
)
def test_a_number_that_upstream_cannot_take_is_named(
    library: Library, files: dict[str, Any], tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    found = run_file(library, changed(files[name], keys, tmp_path / "x.gguf"))
    assert found.kind == "refused", found
    assert "makes no sense" in found.said and next(iter(keys)).split(".")[1] in found.said, found


@pytest.mark.parametrize(
    "name, keys",
    [
        ("qwen2", {".rope.dimension_count": 0}),
        ("qwen2", {".rope.dimension_count": 16}),
        ("smollm3", {".rope.dimension_count": 16}),  # upstream asserts that it is the size of a head
        ("smollm3", {".rope.dimension_count": 0}),
        ("gemma3", {".attention.sliding_window": 0}),
        ("gemma3", {".attention.sliding_window": 1 << 30}),
        ("llama", {".context_length": 0}),
        ("llama", {".rope.freq_base": 0.0}),
        ("llama", {".expert_count": 4, ".expert_used_count": 2}),
        ("lfm2", {".attention.head_count_kv": [1, 1, 1]}),
        ("lfm2", {".attention.head_count_kv": [0, 0, 0]}),
        ("lfm2", {".shortconv.l_cache": 0}),
        ("mamba", {".ssm.state_size": 0}),
        ("llama-text", {"tokenizer.ggml.bos_token_id": 320}),
        ("llama-text", {"tokenizer.ggml.eos_token_id": 4294967295}),
        ("llama-text", {"tokenizer.ggml.token_type": [1, 1]}),
        ("llama-text", {"tokenizer.ggml.scores": None}),
    ],
)
def test_an_odd_number_is_no_signal(
    library: Library, files: dict[str, Any], tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    found = run_file(library, changed(files[name], keys, tmp_path / "x.gguf"))
    assert not found.is_fault, found


@pytest.mark.parametrize(
    "tensor", ["blk.0.attn_norm.weight", "blk.0.attn_q.bias", "blk.0.attn_q.weight", "token_embd.weight"]
)
@pytest.mark.parametrize("kind", [1, 24, 26, 27, 28])  # f16, i8, i32, i64, f64
def test_a_tensor_of_a_type_that_nothing_computes_with_is_refused(
    library: Library, files: dict[str, Any], tmp_path: Path, tensor: str, kind: int
) -> None:
    old = files["qwen2"]
    file, offset = fuzz_gguf.File(dict(old.keys)), 0
    size = {1: 2, 24: 1, 26: 4, 27: 8, 28: 8}[kind]
    for t in old.tensors:
        data = bytes(math.prod(t.dims) * size) if t.name == tensor else t.data
        file.tensors.append(fuzz_gguf.Tensor(t.name, t.dims, kind if t.name == tensor else t.type, offset, data))
        offset += len(data) + -len(data) % 32
    (tmp_path / "x.gguf").write_bytes(file.pack())
    found = run_file(library, tmp_path / "x.gguf")
    if kind == 1 and tensor.endswith(("q.weight", "embd.weight")):
        assert found.kind == "ran", found  # f16 weights are what many files hold
    else:
        assert found.kind == "refused" and f"its tensor {tensor} has the type" in found.said, found


def test_a_failed_assertion_of_upstream_is_a_sentence(library: Library, files: dict[str, Any], tmp_path: Path) -> None:
    # while the context's graphs are built; no check of ours foresees it
    found = run_file(library, changed(files["smollm3"], {".rope.dimension_count": 16}, tmp_path / "x.gguf"))
    assert found.kind == "refused" and "GGML_ASSERT" in found.said and "/" not in found.said.split("GGML_ASSERT")[1], (
        found
    )


@pytest.mark.parametrize("type_k, kind", [("q8_0", "refused"), ("f16", "ran")])
def test_a_context_shift_of_quantised_keys_without_a_rotation_is_refused(
    library: Library, text_model: Path, type_k: str, kind: str
) -> None:
    # upstream multiplies by a rotation that is only there for heads of a multiple of 64 values
    def body() -> None:
        with Session(Model(library, text_model), policy="none", context_shift=1, type_k=type_k, n_ctx=64) as session:
            session.eval([i * 7 % 300 for i in range(200)])

    assert fuzz.in_child(body).kind == kind


# ---- grammars --------------------------------------------------------------------------------------------------------


def sample(library: Library, path: Path, grammar: str, schema: str) -> Any:
    def body() -> None:
        ffi, c = library.ffi, library.c
        with Session(Model(library, path), policy="none", n_ctx=64) as session:
            given = [ffi.new("char[]", t.encode()) if t else ffi.NULL for t in (grammar, schema)]
            library.check(c.equip_session_set_sampler(session.handle, b"seed=1", *given))
            session.eval([5, 6, 7])
            out, n_out, stop = ffi.new("int32_t[]", 4), ffi.new("int32_t *"), ffi.new("int *")
            library.check(c.equip_session_generate(session.handle, 4, out, n_out, stop))

    return fuzz.in_child(body)


@pytest.mark.parametrize(
    "grammar, says",
    [
        ("root ::= " + "(" * DEEP + '"a"' + ")" * DEEP, "nests brackets"),
        ("root ::= " + "(" * DEEP, "nests brackets"),
        ("root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(DEEP)) + f'r{DEEP} ::= "a"\n', "rules"),
        ('root ::= "a"' + "*" * DEEP, "rules"),
        ('root ::= "a"{3,1}', "{3,1}"),
        ('root ::= "a"{99999999999}', "above 2000"),
        ("root ::= " + '"a"? ' * 3000, "too many ways"),
        ("root ::= " + '"x" ' + '"a"? ' * 3000, "too many ways"),
        ("root ::= " + '"a" | ' * DEEP + '"b"', "too many ways"),
        ("root ::= b root " + '"z" | "x"\nb ::= c c\nc ::= "" | "y"\n', "left recursion"),
        ("root ::= r0 r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1} |\n" for i in range(60)) + 'r60 ::= "a" |\n', "too many ways"),
        ('root ::= "' + "a" * 1000 + '"{2000}', "written out"),
    ],
)  # fmt: skip
def test_a_grammar_without_bounds_is_refused(library: Library, text_model: Path, grammar: str, says: str) -> None:
    found = sample(library, text_model, grammar, "")
    assert found.kind == "refused" and says in found.said, found


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 99 + '"a"' + ")" * 99,
        'root ::= "(" ' + '"((((" ' * 500 + " [((((]",  # no brackets, but characters
        "root ::= " + '"a" | ' * 2000 + '"b"',
        "root ::= " + '"a"? ' * 100,
        'root ::= [a-z]{0,2000} "x"{2000}',
        'root ::= value\nvalue ::= "[" (value ("," value)*)? "]" | [0-9]+ ws\nws ::= [ \\t\\n]* # ((((\n',
        'root ::= (ws "a" ws)* ws\nws ::= [ ]*\n',
    ],
)
def test_a_grammar_within_bounds_is_taken(library: Library, text_model: Path, grammar: str) -> None:
    assert sample(library, text_model, grammar, "").kind == "ran"


@pytest.mark.parametrize(
    "schema",
    [
        '{"type":"array","items":' * DEEP + "{}" + "}" * DEEP,
        '{"anyOf":[' * DEEP + "{}" + "]}" * DEEP,
        '{"const":' + "[" * DEEP + "]" * DEEP + "}",
        "[" * DEEP,
    ],
)
def test_a_schema_nested_too_deeply_is_refused(library: Library, text_model: Path, schema: str) -> None:
    found = sample(library, text_model, "", schema)
    assert found.kind == "refused" and "nested" in found.said, found


def test_schemas_within_bounds_are_taken(library: Library, text_model: Path) -> None:
    optional = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100)}}
    for schema in ({"enum": [f"word {i}" for i in range(2000)]}, optional, {"const": '[[[[{{{{"\\[[['}):
        assert sample(library, text_model, "", json.dumps(schema)).kind == "ran"
    assert sample(library, text_model, "", '{"type":"array","items":' * 30 + "{}" + "}" * 30).kind == "ran"


# ---- templates, messages, tools --------------------------------------------------------------------------------------

USER = '[{"role": "user", "content": "Hi"}]'


@pytest.fixture(scope="module")
def render(library: Library, text_model: Path) -> Callable[..., Any]:
    def run(template: str | None = None, messages: str = USER, tools: str | None = None) -> Any:
        def body() -> None:
            ffi, c = library.ffi, library.c
            model = Model(library, text_model)
            given = [ffi.NULL if t is None else ffi.new("char[]", t.encode()) for t in (messages, tools, template)]
            text = c.equip_chat_render(model.handle, *given, 1)
            said = ffi.string(c.equip_error() if text == ffi.NULL else text).decode()
            raise NativeError(0 if text != ffi.NULL else -1, said)

        return fuzz.in_child(body)

    return run


@pytest.mark.parametrize("nested", ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * DEEP])
def test_messages_and_tools_nested_too_deeply_are_refused(render: Callable[..., Any], nested: str) -> None:
    for found in (
        render(messages=nested),
        render(messages=USER[:-2] + ', "x": ' + nested + "}]"),
        render(tools=nested),
    ):
        assert found.kind == "refused" and "nested more than" in found.said, found


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * DEEP + "1" + ")" * DEEP + " }}",
        "{{ " + "[" * DEEP + "]" * DEEP + " }}",
        "{{ 1" + " + 1" * DEEP + " }}",
        "{{ " + "not " * DEEP + "x }}",
        "{{ x" + ".a" * DEEP + " }}",
        "{{ x" + "[0]" * DEEP + " }}",
        "{{ x" + " | upper" * DEEP + " }}",
        "{{ " + "1 if 0 else " * DEEP + "1 }}",
        "{% if 1 %}" * DEEP + "{% endif %}" * DEEP,
        "{% if 0 %}" + "{% elif 1 %}" * DEEP + "{% endif %}",
        "{% macro f() %}" * DEEP + "{% endmacro %}" * DEEP,
        "{% set a %}" * DEEP + "{% endset %}" * DEEP,
    ],
)
def test_a_template_nested_too_deeply_is_refused(render: Callable[..., Any], template: str) -> None:
    found = render(template)
    assert found.kind == "refused" and "nests more than 200 levels" in found.said, found


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too deeply"),
        ("{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too deeply"),
        ("{% set x = [] %}{{ x.append(x) }}{{ x }}", "too deeply"),
        ("{% set x = [] %}{{ x.append(x) }}{{ x | tojson }}", "too deeply"),
        ("{{ range(1000000000) | length }}", "takes too long"),
        ("{{ range(9223372036854775806, 9223372036854775807, 9223372036854775807) }}", ""),
        ("{{ 'a' * 1000000000 }}", "takes too long"),
        ("{{ 'a' | indent(1000000000) }}", "takes too long"),
        pytest.param("{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}", "takes too long", marks=pytest.mark.full),
        pytest.param("{% for a in range(900) %}{% for b in range(900) %}x{% endfor %}{% endfor %}", "takes too long", marks=pytest.mark.full),
        ("{% set ns = namespace(x=[]) %}{% for i in range(20000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}", "too deeply"),
    ],
)  # fmt: skip
def test_a_template_without_an_end_is_refused(render: Callable[..., Any], template: str, says: str) -> None:
    found = render(template)
    assert not found.is_fault and says in found.said, found


def test_templates_within_bounds_are_rendered(render: Callable[..., Any]) -> None:
    countdown = "{% macro f(n) %}{{ n }}{% if n %},{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}"
    for template, text in (
        (countdown, ",".join(str(30 - i) for i in range(31))),
        ("{{ 0" + " + 1" * 150 + " }}", "150"),
        ("{{ '" + "(" * 1000 + "' | length }}", "1000"),
        ("{# " + "{{ (" * 1000 + " #}a", "a"),
        ("{{ [" + "1, " * 2000 + "1] | length }}", "2001"),
    ):
        assert render(template).said == f"0: {text}"
    many = json.dumps([{"role": ("user", "assistant")[i % 2], "content": "word " * 20} for i in range(9999)])
    found = render("{% for m in messages %}{{ m['role'] }}{{ m['content'] | trim | length }}{% endfor %}", many)
    assert found.said.startswith("0: user99assistant99"), found


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind, n", [("gguf", 200), ("policy", 300), ("template", 100), ("grammar", 100)])
def test_nothing_that_the_script_draws_is_a_fault(kind: str, n: int) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "fuzz.py"), kind, "--n", str(n), "--seed", "15"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
