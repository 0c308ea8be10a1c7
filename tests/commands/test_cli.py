"""The command line from outside: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Equip, runner

from equip_cli.commands import generate
from equip_cli.terminal import output

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and file descriptors")

# one thread: on a busy machine, two wait for each other far longer than a tiny model computes
GENERATE = ("generate", "-t", 1)

GENERATE_KEYS = {
    "text", "n_prompt", "n_gen", "policy", "scope", "positions", "positions_now", "rotate_every", "update", "budget",
    "n_evicted", "n_used", "kv_bytes", "rss_bytes", "graphs_reused", "timings",
}  # fmt: skip
CHOICE_KEYS = {"score_queries", "evict_every", "page_size", "parameters"}  # each where the policy has it
TIMING_KEYS = {"prompt_n", "prompt_ms", "predicted_n", "predicted_ms", "predicted_per_second"}
BENCH_KEYS = {
    "avg_ts", "stddev_ts", "samples_ns", "policy", "scope", "positions", "rotate_every", "update", "budget", "attn_kernel",
    "kv_bytes", "rss_bytes", "graphs_reused", "host_us_per_token", "sample_order", "ratio_vs",
}  # fmt: skip


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def environment(cache_dir: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("LLAMA_KV_POLICY", "NO_COLOR", "FORCE_COLOR")}
    return kept | {"EQUIP_CACHE_DIR": str(cache_dir), "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="session")
def equip(equip_bin: Any, environment: dict[str, str]) -> Equip:
    return runner(equip_bin, environment)


@pytest.fixture
def start(equip_bin: Any, environment: dict[str, str]) -> Any:
    """Popen of a command that a test interrupts."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(*args: object) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [str(equip_bin), *map(str, args)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # communicate() would lose what a buffer holds
            # a background job hands an ignored SIGINT on to its children
            preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) if os.name != "nt" else None,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def sentence(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The one sentence on stderr of a command that failed; stdout is empty."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0].removeprefix("error: ")


# ---- help and version


def test_without_a_command_help_is_shown(equip: Equip) -> None:
    bare, asked = equip(), equip("--help")
    assert (bare.returncode, bare.stderr) == (0, "")
    assert bare.stdout == asked.stdout
    for command in ("chat", "generate", "bench", "eval", "info", "check", "models", "pull"):
        assert re.search(rf"^  {command} ", bare.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "command", ["bench", "chat", "check", "demo", "eval", "generate", "info", "models", "pull", "serve"]
)
def test_every_command_has_help(equip: Equip, command: str) -> None:
    result = equip(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: equip {command} ")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, equip_cli.cli; print([m for m in "
        "('cffi', 'numpy', 'gguf', 'rich', 'ctypes', 'prompt_toolkit', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_help_of_a_command_imports_no_rich() -> None:
    code = "import sys; from equip_cli.cli import main; main(['chat', '--help']); print('rich' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False", result.stderr


SECTIONS = {
    "chat": ["Most used", "Text", "Cache", "Sampling", "Compute", "Output", "Other"],
    "serve": ["Most used", "Server", "Cache", "Compute", "Other"],
    "generate": ["Most used", "Text", "Cache", "Sampling", "Compute", "Output", "Other"],
    "bench": ["Most used", "Measurements", "Cache", "Compute", "Output", "Other"],
    "eval": ["Most used", "Measurements", "Cache", "Compute", "Output", "Other"],
}


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("command", SECTIONS)
def test_help_is_in_groups_with_the_most_used_first(equip: Equip, command: str, columns: int) -> None:
    text = equip(command, "--help", env={"COLUMNS": str(columns)}).stdout
    assert re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE) == SECTIONS[command]
    assert max(map(len, text.splitlines())) <= min(columns, 120)
    sections = dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n|\n(?=  ))*)", text, re.MULTILINE))
    first = re.findall(r"^  (?:(MODEL)|(?:-\w+, )?(--[\w-]+))", sections["Most used"], re.MULTILINE)
    wanted = {
        "chat": ["MODEL", "--policy", "--budget", "--system-prompt", "--continue"],
        "serve": ["MODEL", "--policy", "--budget", "--parallel", "--host", "--port", "--api-key"],
        "generate": ["MODEL", "--prompt", "--predict", "--budget"],
        "bench": ["MODEL", "--shape", "--preset", "--policy", "--budget"],
        "eval": ["MODEL", "--policy", "--budget", "--text"],
    }
    assert ["".join(each) for each in first] == wanted[command]
    # a new option belongs to a group
    assert re.findall(r"--[\w-]+", "".join(re.findall(r"^  -.*", sections["Other"], re.MULTILINE))) == [
        "--verbose", "--help",
    ]  # fmt: skip
    assert text.count("--budget ") == 1


def test_help_imports_little(environment: dict[str, str]) -> None:
    """What takes long to import is imported where it is needed."""
    code = "import sys; from equip_cli.cli import main; main(['--help']); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Usage: ")
    heavy = {"cffi", "huggingface_hub", "matplotlib", "numpy", "prompt_toolkit", "rich", "filelock", "httpx"}
    assert heavy & set(done.stderr.split()) == set()


def test_version_names_library_and_backends(equip: Equip) -> None:
    result = equip("--version")
    assert result.returncode == 0, result.stderr
    keys = [line.split()[0] for line in result.stdout.splitlines()]
    assert keys == ["equip", "llama.cpp", "library", "backends"]
    assert "CPU" in result.stdout


# ---- generate


def test_text_on_stdout_the_rest_on_stderr(equip: Equip, tiny_model: Path) -> None:
    args = (*GENERATE, tiny_model, "-p", "Hello", "-n", 24, "--seed", 1, "--budget", 64, "--ignore-eos")
    plain, as_json = equip(*args), equip(*args, "--json")
    assert plain.returncode == as_json.returncode == 0, plain.stderr + as_json.stderr
    record = json.loads(as_json.stdout)
    assert plain.stdout == record["text"] + ("" if record["text"].endswith("\n") else "\n")
    assert re.fullmatch(
        r"budget 64 of \d+ trained, [\d.]+ MB\nkeeps the first 4 tokens and the newest 60; what is older is forgotten\n",
        plain.stderr,
    )
    assert set(record) == GENERATE_KEYS
    assert set(record["timings"]) == TIMING_KEYS
    assert (record["policy"], record["budget"], record["n_gen"]) == ("streaming", 64, 24)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--policy", "none"), "nothing is forgotten; when the cache is full, the text ends"),
        (
            ("--policy", "none", "--update", "context-shift"),
            "when the cache is full, half of it is forgotten, the oldest part",
        ),
        (("--budget", 2048, "--sinks", 0), "keeps the newest 2,048; what is older is forgotten"),
        (
            ("-sys", "You are kind."),
            "keeps the first 4 tokens, the system prompt and the newest; what is older is forgotten",
        ),
        (
            ("-sys", "You are kind.", "--no-pin-system"),
            "keeps the first 4 tokens and the newest 60; what is older is forgotten",
        ),
        (
            ("--policy", "h2o", "--sinks", 1),
            "keeps the first token, the newest 16 and what was looked at most; the rest is forgotten",
        ),
        (
            ("--policy", "keydiff", "-sys", "You are kind."),
            "keeps the first 4 tokens, the system prompt, the newest 16 and what repeats the others least; the rest is forgotten",
        ),
    ],
)
def test_the_announcement_says_what_is_forgotten(equip: Equip, args: tuple[object, ...], sentence: str) -> None:
    args = args if "--budget" in args or "none" in args else (*args, "--budget", 64)
    result = equip("generate", "-t", 1, "-p", "Hello", "-n", 1, *args)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == sentence


def test_memory_is_constant_past_the_budget(equip: Equip, tiny_model: Path) -> None:
    records = [
        json.loads(
            equip(*GENERATE, tiny_model, "-p", "Hello", "-n", n, "--budget", 64, "--ignore-eos", "--json").stdout
        )
        for n in (10, 300)
    ]
    short, long = records
    assert short["kv_bytes"] == long["kv_bytes"]
    assert (long["n_used"], long["n_gen"]) == (64, 300)
    assert long["n_evicted"] == long["n_prompt"] + 300 - 64


def test_a_prompt_from_a_file_or_stdin_is_the_same(equip: Equip, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Grüße", encoding="utf-8")
    tail = ("-n", 8, "--temp", 0, "--budget", 64)
    results = [
        equip(*GENERATE, tiny_model, "-p", "Grüße", *tail),
        equip(*GENERATE, tiny_model, "-f", file, *tail),
        equip(*GENERATE, tiny_model, *tail, input="Grüße"),
    ]
    assert [r.returncode for r in results] == [0, 0, 0], results[0].stderr
    assert len({r.stdout for r in results}) == 1


def test_llama_cpps_spellings_are_understood(equip: Equip, tiny_model: Path) -> None:
    args = "-n 2 -ngl 0 -b 128 -ub 64 -fa on -ctk q8_0 -ctv q8_0 -s 3 --top-k 5 --top-p 0.9 --min-p 0.1".split()
    result = equip(*GENERATE, tiny_model, "-p", "Hello", *args, "--budget", 64, "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    plain = json.loads(equip(*GENERATE, tiny_model, "-p", "Hello", "-n", 2, "-ub", 64, "--budget", 64, "--json").stdout)
    assert record["kv_bytes"] < plain["kv_bytes"]  # -ctk and -ctv arrived, and not as -c


def test_a_context_size_with_a_policy_is_ignored_with_a_warning(equip: Equip, tiny_model: Path) -> None:
    result = equip(*GENERATE, tiny_model, "-p", "Hello", "-n", 2, "--budget", 64, "-c", 128)
    assert result.returncode == 0
    assert "warning: -c is ignored" in result.stderr


def test_policy_none_stops_when_its_cache_is_full(equip: Equip, tiny_model: Path) -> None:
    args = (*GENERATE, tiny_model, "-p", "Hello", "--policy", "none", "-c", 256, "--ignore-eos")
    result = equip(*args)
    assert result.returncode == 1
    assert result.stdout.strip() != ""
    assert re.search(r"^error: .*256.*$", result.stderr, re.MULTILINE)
    record = json.loads(equip(*args, "--json").stdout)
    assert (record["policy"], record["n_used"], record["n_evicted"]) == ("none", 256, 0)


def test_context_shift_goes_on_without_a_policy(equip: Equip, tiny_model: Path) -> None:
    args = ("-p", "Hello", "--policy", "none", "-c", 256, "-n", 300, "--ignore-eos", "--json")
    result = equip(*GENERATE, tiny_model, *args, "--update", "context-shift")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["n_gen"], found["update"], found["policy"]) == (300, "context-shift", "none")
    assert found["n_evicted"] >= 100 and found["n_used"] <= 256
    assert "ignored" not in result.stderr
    assert "context-shift" in sentence(equip(*GENERATE, tiny_model, *args, "--update", "gather"), 2)


def test_a_system_prompt_goes_through_the_template_and_is_pinned(
    equip: Equip, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "system.txt"
    file.write_text("You are brief.", encoding="utf-8")
    tail = ("-p", "Hello", "-n", 100, "--temp", 0, "--budget", 64, "--ignore-eos", "--json")
    plain = json.loads(equip(*GENERATE, tiny_model, *tail).stdout)
    system = json.loads(equip(*GENERATE, tiny_model, "-sys", "You are brief.", *tail).stdout)
    from_file = json.loads(equip(*GENERATE, tiny_model, "-sysf", file, *tail).stdout)
    assert system["n_prompt"] > plain["n_prompt"]
    assert from_file["text"] == system["text"]
    unpinned = json.loads(equip(*GENERATE, tiny_model, "-sys", "You are brief.", "--no-pin-system", *tail).stdout)
    assert unpinned["n_prompt"] == system["n_prompt"]
    assert unpinned["text"] != system["text"]  # random weights see every token, so what is kept shows


def test_a_system_prompt_larger_than_the_budget_is_refused(equip: Equip, tiny_model: Path) -> None:
    result = equip(*GENERATE, tiny_model, "-sys", "be brief " * 100, "-p", "Hello", "--budget", 64)
    assert "pin" in sentence(result, 2)


def test_grammar_and_schema_bind_the_answer(equip: Equip, tiny_model: Path, tmp_path: Path) -> None:
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "yes" | "no"', encoding="utf-8")
    result = equip(*GENERATE, tiny_model, "-p", "Well?", "--budget", 64, "--grammar-file", grammar)
    assert result.stdout.strip() in ("yes", "no"), result.stderr

    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema), encoding="utf-8")
    for argument in (json.dumps(schema), file):
        result = equip(*GENERATE, tiny_model, "-p", "Well?", "--budget", 256, "-n", 200, "--json-schema", argument)
        value = json.loads(result.stdout)
        assert set(value) == {"ok", "n"} and isinstance(value["ok"], bool) and 0 <= value["n"] <= 9


def test_the_environment_bounds_generate_until_an_option_speaks(equip: Equip, tiny_model: Path) -> None:
    env = {"LLAMA_KV_POLICY": "streaming:budget=128,sinks=2"}
    args = (*GENERATE, tiny_model, "-p", "Hello", "-n", 2, "--json")
    assert json.loads(equip(*args, env=env).stdout)["budget"] == 128
    assert json.loads(equip(*args, "--budget", 64, env=env).stdout)["budget"] == 64
    malformed = equip(*args, env={"LLAMA_KV_POLICY": "streaming:budge=1"})
    assert "LLAMA_KV_POLICY" in sentence(malformed, 2)


@pytest.mark.parametrize("rule", ["true", "cache", "auto"])
def test_every_rule_of_positions_runs_and_is_named(equip: Equip, tiny_model: Path, rule: str) -> None:
    args = ("-p", "Hello", "-n", 80, "--budget", 64, "--ignore-eos", "--json", "--positions", rule, "--rotate-every", 3)
    record = json.loads(equip(*GENERATE, tiny_model, *args).stdout)
    assert (record["positions"], record["n_gen"]) == (rule, 80)
    assert record["rotate_every"] == (0 if rule == "true" else 3)
    assert record["positions_now"] == ("cache" if rule == "cache" else "true")


def test_random_is_a_policy_with_recent_tokens(equip: Equip, tiny_model: Path) -> None:
    args = ("-p", "Hello", "-n", 100, "--policy", "random", "--budget", 64, "--recent", 20, "--ignore-eos", "--json")
    record = json.loads(equip(*GENERATE, tiny_model, *args).stdout)
    assert (record["policy"], record["positions"], record["n_used"]) == ("random", "auto", 64)
    assert record["rotate_every"] >= 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["h2o", "--score-queries", 8], {"scope": "head", "score_queries": 8, "evict_every": 1}),
        (["h2o", "--scope", "layer", "--evict-every", 4], {"scope": "layer", "score_queries": "all", "evict_every": 4}),
        (["knorm", "--update", "gather"], {"scope": "head", "update": "gather", "evict_every": 1}),
        (["pagedeviction", "--page-size", 8], {"scope": "layer", "page_size": 8}),
        (
            ["tova", "--filter", 0.25, "--filter-layers", 2],
            {
                **{"positions": "true", "score_queries": "all", "evict_every": 1},
                "parameters": "filter=0.25,filter_layers=2,filter_warmup=64",
            },
        ),
    ],
)
def test_the_choice_is_named(equip: Equip, tiny_model: Path, args: list[Any], expected: dict[str, Any]) -> None:
    policy = ("--policy", *args, "--budget", 64, "--recent", 16, "--ignore-eos", "--json")
    result = equip(*GENERATE, tiny_model, "-p", "Hello", "-n", 100, *policy)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert set(record) == GENERATE_KEYS | (set(expected) & CHOICE_KEYS)
    assert record["policy"] == args[0] and expected.items() <= record.items()
    assert 48 <= record["n_used"] <= 64 and record["n_gen"] == 100


@pytest.mark.parametrize("update", ["shift", "gather"])
def test_baselines_write_the_same_text(equip: Equip, tiny_model: Path, update: str) -> None:
    args = ("-p", "Hello", "-n", 120, "--budget", 64, "--temp", 0, "--ignore-eos", "--json", "-fa", "off")
    types = ("-ctk", "f32", "-ctv", "f32")
    ours = json.loads(equip(*GENERATE, tiny_model, *args, *types).stdout)
    theirs = json.loads(equip(*GENERATE, tiny_model, *args, *types, "--update", update).stdout)
    assert (ours["update"], theirs["update"]) == ("inplace", update)
    assert theirs["text"] == ours["text"]
    assert theirs["n_evicted"] == ours["n_evicted"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_generating_keeps_no_more_than_the_text(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a list of strings, a text of 4 bytes per token takes 66."""
    held: list[int] = []
    printed: list[int] = []

    class Session:
        def generate(self, tokens: list[int], n: int, per_call: int) -> Iterator[str]:
            before = tracemalloc.get_traced_memory()[0]
            for i in range(n):
                yield f"{i % 1000:03d} "
            held.append(tracemalloc.get_traced_memory()[0] - before)

    monkeypatch.setattr(generate, "_record", lambda session, text, n_prompt: {"text": text.decode()})
    monkeypatch.setattr(output, "result", lambda text: printed.append(0) if as_json else None)
    monkeypatch.setattr(output, "result_json", lambda record: printed.append(len(record["text"])))
    tracemalloc.start()
    try:
        generate._run(Session(), [1], 100_000, as_json)  # type: ignore[arg-type]
    finally:
        tracemalloc.stop()
    assert printed == ([400_000] if as_json else [])
    assert held[0] < (600_000 if as_json else 10_000)


# ---- refusals


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--budget", "-1"], 2, "--budget is -1: give a whole number from 0"),
        (["--budget", "1099511627776"], 2, "--budget is 1099511627776: give"),
        (["--budget", "4"], 2, "budget of 4"),
        (["--budget", "64", "--sinks", "64"], 2, "sinks"),
        (["--budget", "536870912"], 1, "MB"),
        (["--budget", "1073741824"], 2, "too large: beside a chunk of 512 tokens it can be 1073741312"),
        (["--budget", "many"], 2, "budget"),
        (["--recent", "16"], 2, "recent"),
        (["--policy", "oracle"], 2, "oracle.*none, streaming, .*random"),
        (["--positions", "nearest"], 2, "nearest.*cache, true, auto"),
        (["--rotate-every", "0"], 2, "--rotate-every is 0: give a whole number from 1"),
        (["--rotate-every", "-3"], 2, "--rotate-every is -3"),
        (["--rotate-every", "x"], 2, "--rotate-every is 'x': give a whole number"),
        (["--update", "shift", "--positions", "true"], 2, "positions cannot be true: use --positions cache"),
        (["--update", "shift", "--positions", "auto"], 2, "positions cannot be auto: use --positions cache"),
        (["--scope", "galaxy"], 2, "galaxy"),
        (["--scope", "head"], 2, "streaming has no scope 'head': choose one of token"),
        (["--score-queries", "0"], 2, "--score-queries is '0': give all, or a whole number"),
        (["--score-queries", "some"], 2, "--score-queries is 'some': give all"),
        (["--evict-every", "0"], 2, "--evict-every is 0: give a whole number"),
        (["--evict-every", "x"], 2, "--evict-every is 'x': give a whole number"),
        (["--page-size", "-1"], 2, "--page-size is -1: give a whole number"),
        (["--score-queries", "all"], 2, "streaming reads no attention weights: leave --score-queries out"),
        (["--evict-every", "2"], 2, "streaming chooses a fixed number of victims at once: leave --evict-every out"),
        (["--page-size", "16"], 2, "streaming evicts tokens, not pages: leave --page-size out"),
        (
            ["--policy", "pagedeviction", "--budget", "100"],
            2,
            "100 tokens is no multiple of the page size 16: give 96 or 112",
        ),
        (
            ["--policy", "random", "--scope", "head", "--update", "shift"],
            2,
            "scope cannot be head: use --scope token",
        ),
        (["--update", "sideways"], 2, "sideways"),
        (["-fa", "maybe"], 2, "maybe"),
        (["-ctk", "q9_9"], 2, "q9_9.*q8_0"),
        (["-ctv", "q8_0", "-fa", "off"], 2, "flash attention"),
        (["-ngl", "some"], 2, "some"),
        (["--grammar", 'root ::= "a"', "--json-schema", "{}"], 2, "exclude each other"),
        (["--json-schema", "{"], 2, "JSON"),
        (["--json-schema", "missing.json"], 2, "missing.json"),
        (["--top-p", "2"], 2, "--top-p is 2: give a number from 0 to 1"),
        (["--seed", "-7"], 2, "--seed is -7: give a whole number from -1 to 4294967294"),
        (["-f", "missing.txt"], 2, "-p and -f"),
        (["-sys", "a", "-sysf", "b"], 2, "-sys and -sysf"),
        (["--bogus"], 2, "--bogus"),
    ],
)
def test_a_bad_option_is_one_sentence(equip: Equip, tiny_model: Path, args: list[str], code: int, words: str) -> None:
    result = equip(*GENERATE, tiny_model, "-p", "Hello", "-n", 1, *args)
    assert re.search(words, sentence(result, code))


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "no file"),
        (b"", "empty"),
        (b"PK\x03\x04 not a model", "not a GGUF"),
        (b"GGUF\x03\x00\x00\x00", ""),
        ("directory", "directory"),
        ("truncated", ""),
        ("unknown architecture", "llamo"),
    ],
)
def test_a_bad_model_is_one_sentence(
    equip: Equip, tiny_model: Path, tmp_path: Path, contents: bytes | str | None, words: str
) -> None:
    path = tmp_path / "model.gguf"
    if contents == "directory":
        path.mkdir()
    elif contents == "truncated":
        path.write_bytes(tiny_model.read_bytes()[: tiny_model.stat().st_size // 2])
    elif contents == "unknown architecture":
        path.write_bytes(tiny_model.read_bytes().replace(b"llama", b"llamo"))
    elif isinstance(contents, bytes):
        path.write_bytes(contents)
    for command in (["generate", path, "-p", "Hello"], ["info", path]):
        said = sentence(equip(*command), 1)
        assert words in said and "model.gguf" in said


def test_a_prompt_that_is_not_utf8_is_refused(equip: Equip, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("Grüße".encode("latin-1"))
    assert "not UTF-8" in sentence(equip(*GENERATE, tiny_model, "-f", file), 2)
    assert "not UTF-8" in sentence(equip(*GENERATE, tiny_model, "-p", "x", "-sysf", file), 2)
    with file.open("rb") as stdin:
        assert "not UTF-8" in sentence(equip(*GENERATE, tiny_model, stdin=stdin), 2)


@POSIX
def test_closed_standard_streams_are_no_traceback(equip: Equip, equip_bin: Any, tiny_model: Path) -> None:
    result = equip(*GENERATE, tiny_model, stdin=None, preexec_fn=lambda: os.close(0))
    assert "no prompt was given" in sentence(result, 2)
    command = f"'{equip_bin}' generate '{tiny_model}' -p Hello -n 2 -t 1 --budget 64"
    for redirection, code in ((">&-", 1), ("2>&-", 0)):
        shell = subprocess.run(["sh", "-c", f"{command} {redirection}"], capture_output=True, text=True)
        assert shell.returncode == code, shell.stderr
        assert "Traceback" not in shell.stderr


@POSIX
def test_a_reader_that_leaves_is_no_error(start: Any, tiny_model: Path) -> None:
    process = start(*GENERATE, tiny_model, "-p", "Hello", "--budget", 64, "--ignore-eos")
    process.stdout.read(16)
    process.stdout.close()
    assert process.wait(timeout=60) in (0, 1)
    assert re.fullmatch(rb"budget .*\nkeeps .* forgotten\n", process.stderr.read())


# ---- Ctrl-C


@POSIX
def test_an_interrupt_keeps_the_text(start: Any, tiny_model: Path) -> None:
    process = start(*GENERATE, tiny_model, "-p", "Hello", "--budget", 64, "--ignore-eos")
    first = b""
    while len(first) < 16:
        first += process.stdout.read(16 - len(first))
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (first + rest).decode("utf-8")  # no half character
    assert len(first) == 16 and rest.endswith(b"\n")
    assert re.fullmatch(rb"budget .*\nkeeps .* forgotten\n", errors)


@POSIX
def test_an_interrupt_with_json_is_still_one_object(start: Any, tiny_model: Path) -> None:
    process = start(*GENERATE, tiny_model, "-p", "Hello", "--budget", 64, "--ignore-eos", "--json")
    process.stderr.readline()
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert set(json.loads(output)) == GENERATE_KEYS


@POSIX
def test_an_interrupt_ends_the_reading_of_a_prompt(start: Any, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 400_000, encoding="utf-8")
    process = start(*GENERATE, tiny_model, "-f", file, "--budget", 64)
    process.stderr.readline()
    time.sleep(0.2)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == b""
    assert time.monotonic() - begin < 10


# ---- info, bench, demo


def test_info_describes_the_model(equip: Equip, tiny_model: Path) -> None:
    record = json.loads(equip("info", tiny_model, "--json").stdout)
    assert set(record) == {"model", "kv", "supports", "library"}
    assert set(record["model"]) == {
        "arch", "n_layer", "n_head", "n_head_kv", "head_dim", "n_ctx_train", "rope", "file_bytes",
    }  # fmt: skip
    model = record["model"]
    assert model["arch"] == "llama" and model["file_bytes"] == tiny_model.stat().st_size
    assert set(record["kv"]) == {"bytes_per_token"}
    assert record["kv"]["bytes_per_token"] == 2 * 2 * model["n_layer"] * model["n_head_kv"] * model["head_dim"]
    assert set(record["supports"]) == {"policies", "scopes", "positions", "by_policy"}
    assert {"none", "streaming"} <= set(record["supports"]["policies"])
    by_policy = record["supports"]["by_policy"]
    assert list(by_policy) == record["supports"]["policies"]
    assert by_policy["streaming"] == {"scopes": ["token"], "scores": False, "pages": False}
    h2o = by_policy["h2o"]
    assert [row["name"] for row in h2o.pop("parameters")] == ["graph", "graph_near"]
    assert h2o == {"scopes": ["head", "layer", "token"], "scores": True, "pages": False}
    assert by_policy["pagedeviction"]["pages"] is True
    assert {scope for each in by_policy.values() for scope in each["scopes"]} == set(record["supports"]["scopes"])
    assert set(record["library"]) == {"path", "llama_cpp", "backends"}
    text = equip("info", tiny_model)
    assert text.returncode == 0 and text.stderr == ""
    assert re.search(r"^\| budget +\| +slots \| +memory \|", text.stdout, re.MULTILINE)
    assert re.search(r"^\| policy +\| +scopes \| reads attention weights \| evicts by \|", text.stdout, re.MULTILINE)
    assert re.search(r"^\| h2o +\| head, layer, token \| +yes \| +token \|", text.stdout, re.MULTILINE)


def test_bench_takes_turns(equip: Equip, tiny_model: Path) -> None:
    args = ("-t", 1, "--policy", "none,streaming", "--budget", 256, "-n", 4, "-r", 3, "-fa", "on", "-o", "json")
    result = equip("bench", tiny_model, *args)
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    assert [(r["policy"], r["flash_attn"], r["attn_kernel"]) for r in records] == [
        ("none", "on", "upstream-fa"), ("none", "off", "upstream"), ("none", "on", "equip-cpu"), ("streaming", "on", "equip-cpu"),
    ]  # fmt: skip
    for i, record in enumerate(records):
        assert set(record) >= BENCH_KEYS
        assert record["n_depth"] == 256
        assert record["sample_order"] == [i, i + 4, i + 8]
        assert len(record["samples_ns"]) == 3 and min(record["samples_ns"]) > 0
        assert record["avg_ts"] == pytest.approx(sum(4e9 / ns for ns in record["samples_ns"]) / 3)
    unpaired = [r for r in records if r["ratio_vs"] is None]
    assert [r["policy"] for r in unpaired] == ["none", "none"]  # the baseline of each kernel
    for record in records:
        if record["ratio_vs"] is not None:
            ratio = record["ratio_vs"]
            assert set(ratio) == {"baseline", "time_ratio_median", "ci95", "n_pairs"}
            assert ratio["baseline"].startswith("none") and ratio["n_pairs"] == 3
            assert ratio["ci95"][0] <= ratio["time_ratio_median"] <= ratio["ci95"][1]


def test_bench_compares_rules_and_updates(equip: Equip, tiny_model: Path) -> None:
    args = ("-t", 1, "--policy", "streaming", "--budget", 64, "-n", 2, "-r", 2, "-fa", "off", "--rotate-every", "1,8")
    lists = ("--positions", "true,cache", "--update", "inplace,shift")
    result = equip("bench", tiny_model, *args, *lists, "-o", "json")
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    assert [(r["positions"], r["update"], r["rotate_every"]) for r in records] == [
        ("true", "inplace", 0), ("cache", "inplace", 1), ("cache", "inplace", 8), ("cache", "shift", 1),
    ]  # fmt: skip
    assert result.stderr.count("warning: the update shift is left out") == 1
    baselines = [r["ratio_vs"] and r["ratio_vs"]["baseline"] for r in records]
    assert baselines == [None, None, *["streaming, cache, rotate every 1, inplace, fa off"] * 2]
    table = equip("bench", tiny_model, *args, *lists)
    assert re.search(r"^\| positions \| rotate every \| +update \|", table.stdout, re.MULTILINE)
    assert re.search(r"^\| cache +\| +8 \| +inplace \|", table.stdout, re.MULTILINE)


def test_bench_compares_scopes_and_choices(equip: Equip, tiny_model: Path) -> None:
    args = (
        "-t",
        1,
        "--policy",
        "streaming,h2o",
        "--budget",
        64,
        "-n",
        2,
        "-r",
        2,
        "-fa",
        "off",
        "--scope",
        "token,head",
    )
    result = equip("bench", tiny_model, *args, "--evict-every", "1,4", "-o", "json")
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    assert [(r["policy"], r["scope"], r.get("evict_every"), r.get("score_queries")) for r in records] == [
        ("streaming", "token", None, None), ("h2o", "token", 1, "all"), ("h2o", "token", 4, "all"), ("h2o", "head", 1, "all"),
        ("h2o", "head", 4, "all"),
    ]  # fmt: skip
    assert all(BENCH_KEYS <= set(record) for record in records)
    assert [line for line in result.stderr.splitlines() if line.startswith("warning")] == [
        "warning: left out: streaming has no scope head"
    ]
    baselines = [r["ratio_vs"] and r["ratio_vs"]["baseline"] for r in records]
    assert baselines == [
        None, None, "h2o, token, evict every 1, fa off", None, "h2o, head, evict every 1, fa off",
    ]  # fmt: skip
    table = equip("bench", tiny_model, *args).stdout
    assert re.search(r"^\| policy +\| scope \| +t/s \|", table, re.MULTILINE)
    assert re.search(r"^\| h2o +\| +head \|", table, re.MULTILINE)
    assert re.search(r"^\| streaming +\| +token \|", table, re.MULTILINE)
    about = " ".join(table.partition("\n\n")[0].split())
    for words in ("budget 64 | score queries all | evict every 1", "streaming: positions cache | h2o: positions auto"):
        assert words in about


def test_eval_tells_scopes_and_choices_apart(equip: Equip) -> None:
    args = (
        "-t",
        1,
        "--policy",
        "none,streaming,h2o",
        "--budget",
        64,
        "-n",
        100,
        "--dialogues",
        0,
        "--scope",
        "token,head",
        "--no-baselines",
    )
    result = equip("eval", *args, "--json")
    assert result.returncode == 0, result.stderr
    assert [(r["policy"], r["scope"], CHOICE_KEYS & set(r)) for r in json.loads(result.stdout)] == [
        ("none", "token", set()), ("streaming", "token", set()), ("h2o", "token", {"score_queries", "evict_every"}),
        ("h2o", "head", {"score_queries", "evict_every"}),
    ]  # fmt: skip
    assert result.stderr.count("warning: left out: streaming has no scope head\n") == 1
    table = equip("eval", *args, "--evict-every", 2)
    # the first table; differences between the rows follow
    assert [line.split("|")[1].strip() for line in table.stdout.splitlines() if line.startswith("|")][2:6] == [
        "none, 1024", "streaming, 64, token", "h2o, 64, token", "h2o, 64, head",
    ]  # fmt: skip


def test_bench_makes_a_shape_and_prints_its_table(equip: Equip, cache_dir: Path) -> None:
    result = equip("bench", "--shape", "tiny:q8_0", "-t", 1, "--policy", "streaming", "--budget", 64, "-n", 2, "-r", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("model random-tiny | ")
    assert (
        len([line for line in result.stdout.splitlines() if line.startswith("|")]) == 2 + 2
    )  # flash attention on and off
    (made,) = (path.name for path in (cache_dir / "shapes").iterdir() if "q8_0" in path.name)
    assert re.fullmatch(r"tiny-q8_0-\d+\.gguf", made)


def test_bench_names_what_it_refuses(equip: Equip, tiny_model: Path) -> None:
    assert "either a MODEL or --shape" in sentence(equip("bench", tiny_model, "--shape", "tiny"), 2)
    assert "llama-3.2-1b" in sentence(equip("bench", "--shape", "nothing"), 2)
    assert "q4_0" in sentence(equip("bench", "--shape", "tiny:q1"), 2)
    assert "-o" in sentence(equip("bench", tiny_model, "-o", "xml"), 2)
    assert "--budget" in sentence(equip("bench", tiny_model, "--budget", "a,b"), 2)
    assert "oracle" in sentence(equip("bench", tiny_model, "--policy", "oracle"), 2)
    bounded = ("bench", tiny_model, "--policy", "streaming", "--budget", 64)
    assert "sideways" in sentence(equip(*bounded, "--update", "inplace,sideways"), 2)
    assert "nearest" in sentence(equip(*bounded, "--positions", "cache,nearest"), 2)
    assert "use --positions cache" in sentence(equip(*bounded, "--update", "shift", "--positions", "true"), 2)
    assert "--rotate-every is 0" in sentence(equip(*bounded, "--rotate-every", "4,0"), 2)
    assert "--rotate-every is 'x'" in sentence(equip(*bounded, "--rotate-every", "x"), 2)
    assert "no scope 'head'" in sentence(equip(*bounded, "--scope", "head"), 2)
    assert "no scope 'galaxy'" in sentence(equip(*bounded, "--scope", "token,galaxy"), 2)
    assert "--score-queries is 'some'" in sentence(equip(*bounded, "--score-queries", "all,some"), 2)
    assert "--page-size is 'x'" in sentence(equip(*bounded, "--page-size", "x"), 2)
    assert "leave --page-size out" in sentence(equip(*bounded, "--page-size", "16"), 2)


def test_demo_shows_a_fact_that_stays_and_one_that_goes(equip: Equip) -> None:
    result = equip("demo")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if line[:1] == "|"]
    talk = {row[0]: row[1] for row in rows[2:]}
    assert "Rimoka" in talk["What is my dog called?"]
    assert rows[3][:2] == ["What is my cat called?", "Your cat is called Tobelin."]
    assert rows[-1][0] == "What is my cat called?" and "Tobelin" not in rows[-1][1]
    seen, kept, evicted = map(int, rows[-1][2:])
    assert kept == 128 and seen == kept + evicted > 160
    assert "equip chat" in result.stdout


def test_nothing_is_coloured(equip: Equip, tiny_model: Path) -> None:
    for args in (["--help"], ["info", tiny_model], [*GENERATE, tiny_model, "--bogus"]):
        result = equip(*args)
        assert "\x1b" not in result.stdout + result.stderr


def test_an_embedding_model_is_described_and_refused(equip: Equip, model_file: Callable[[str], Path]) -> None:
    path = model_file("bert")
    about = json.loads(equip("info", path, "--json").stdout)
    assert about["model"]["arch"] == "bert" and about["supports"]["policies"] == []
    result = equip(*GENERATE, path, "-p", "Hello", "-n", 2)
    assert (result.returncode, result.stdout) == (1, "")
    assert "embedding model" in result.stderr and result.stderr.count("\n") == 1


# ---- saved sessions


def test_a_session_goes_on_where_it_was(equip: Equip, tiny_model: Path, tmp_path: Path) -> None:
    """Two halves give the text of one run; the second one reads its own prompt alone."""
    options = (*GENERATE, tiny_model, "--policy", "h2o", "--budget", 64, "--temp", 0, "--ignore-eos", "--json")
    saved = tmp_path / "a session"
    first = json.loads(equip(*options, "-n", 80, "-p", "Hello", "--session", saved).stdout)
    assert first["n_evicted"] > 0 and saved.stat().st_mode & 0o777 == 0o600
    begun = saved.read_bytes()
    again = json.loads(equip(*options, "-n", 20, "-p", " world", "--session", saved).stdout)
    assert again["timings"]["prompt_n"] == again["n_prompt"] <= 8
    assert saved.read_bytes() != begun
    saved.write_bytes(begun)
    assert json.loads(equip(*options, "-n", 20, "-p", " world", "--session", saved).stdout)["text"] == again["text"]


@pytest.mark.parametrize("damage", ["policy", "model", "bytes", "system"])
def test_a_session_that_does_not_fit_is_refused_and_left_alone(
    equip: Equip, tiny_model: Path, tmp_path: Path, damage: str
) -> None:
    options: tuple[object, ...] = (*GENERATE, tiny_model, "-n", 4, "--budget", 64)
    saved = tmp_path / "saved"
    equip(*options, "-p", "Hello", "--session", saved)
    more: tuple[object, ...] = ()
    if damage == "policy":
        more, words = ("--policy", "h2o"), "under the policy streaming|another policy|streaming"
    elif damage == "model":
        options, words = ("generate", "-t", "1", "-n", 4, "--budget", 64), "another model"
    elif damage == "system":
        more, words = ("-sys", "Be brief."), "leave -sys out"
    else:
        saved.write_bytes(saved.read_bytes()[:-10])
        words = "damaged|checksum|truncated"
    before = saved.read_bytes()
    error = sentence(equip(*options, *more, "-p", "Hello", "--session", saved), 2 if damage == "system" else 1)
    assert re.search(words, error)
    assert saved.read_bytes() == before
