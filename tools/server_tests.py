"""Run upstream's own tests of llama-server on the unpatched one and on ours, and compare what passes and fails:

    python tools/server_tests.py              all variants (VARIANTS), two minutes on two cores after the builds
    python tools/server_tests.py stock none   some of them
    python tools/server_tests.py --out DIR    keep the records (JUnit XML) and logs

The tests are taken from the pinned release, and run with the versions of pytest, openai and requests that they ask for,
in an environment in the cache folder. The embedded model takes the place of the models that they download
(server_tests_plugin.py); what upstream's models would write is therefore not looked at, and tests that count their tokens
fail, on both servers alike.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "native" / "cmake"))

from upstream import cache_dir, fetch, load_pin, pip_environment, tarball_files, tree_files, write_files  # noqa: E402
from upstream_tests import build, locked  # noqa: E402

TESTS = "tools/server/tests"
PACKAGES = ("filelock", "openai", "pytest", "requests")  # of upstream's requirements.txt, in its versions
SECONDS_PER_TEST = 120

BUDGET = 64  # a quarter of what a lane has in most tests
# name: LLAMA_KV_POLICY of our llama-server; None is the unpatched one
VARIANTS: dict[str, str | None] = {
    "stock": None,
    "none": "none",
    "streaming": f"streaming:budget={BUDGET}",
    "h2o": f"h2o:budget={BUDGET},recent=32,positions=true",  # drafts longer than `recent` are not made
}

_PROGRAMS = "starts other programs, which neither build can do"
_DOWNLOAD = "downloads a model"
_VISION = "needs a model that sees, or a picture from the web"

# file, or file::test -> why it is not run; tests that upstream marks as slow download real models, and are not run either
LEFT_OUT = {
    "test_mcp_servers": _PROGRAMS,
    "test_router": _PROGRAMS,
    "test_stream": f"asks a router, which {_PROGRAMS}",
    "test_tools_builtin": _PROGRAMS,
    "test_security::test_cors_origins_defaults_to_localhost_with_tools_enabled": _PROGRAMS,
    "test_basic::test_load_split_model": _DOWNLOAD,
    "test_proxy::test_mcp_proxy": "asks a server of the web",
    "test_vision_api": _VISION,
    "test_compat_anthropic::test_anthropic_vision_base64_with_multimodal_model": _VISION,
    "test_security::test_local_media_file": _VISION,
    "test_slot_save::test_slot_save_restore_with_image": _VISION,
    "test_slot_save::test_slot_save_restore_with_two_images": _VISION,
    "test_slot_save::test_slot_save_restore_with_image_across_restart": _VISION,
    "test_slot_save::test_slot_save_restore_image_payload_larger_than_context": _VISION,
    "test_slot_save::test_slot_restore_media_file_without_mmproj": _VISION,
}

_UNIFIED = "--kv-unified shares one cache among all lanes, which cannot be bounded: the server does not start"
_LENGTH = "no request is too long where positions are ranks, and a lane says so, whatever its part of -c"
_TIMINGS = "an answer of Anthropic's API says what its lane keeps, and upstream's has no timings"
_HEAD = "the model has no head that scores documents: under a policy the server does not start"
_NUMBERS = "takes every timing for a number, and a lane's timings name its policy"
_DRAFT = "a draft's cache is not bounded and a bounded one cannot be shifted: a lane ends at the draft's context"

_BOUNDED = {
    "test_compat_anthropic::test_anthropic_messages_basic": _TIMINGS,
    "test_completion::test_completion_unified": _UNIFIED,
    "test_kv_keep_only_active::test_clear_and_restore": _UNIFIED,
    "test_kv_keep_only_active::test_disabled_with_flag": _UNIFIED,
    "test_metrics::test_metrics_timings_are_finite": _NUMBERS,
    "test_metrics::test_metrics_timings_on_prompt_progress": _NUMBERS,
    "test_rerank::test_invalid_rerank_req": _HEAD,
    "test_rerank::test_rerank_tei_top_n": _HEAD,
    "test_rerank::test_rerank_top_n": _HEAD,
    "test_speculative::test_with_ctx_shift": _DRAFT,
}

# variant -> file::test -> why it passes on one server and fails on the other
EXPLAINED: dict[str, dict[str, str]] = {
    "none": {},
    "streaming": _BOUNDED
    | {
        "test_basic::test_server_props": _LENGTH,
        "test_basic::test_server_slots": _LENGTH,
        "test_chat_completion::test_context_size_exceeded": _LENGTH,
        "test_chat_completion::test_context_size_exceeded_stream": _LENGTH,
        "test_completion::test_nocache_long_input_prompt": _LENGTH,
    },
    "h2o": _BOUNDED,
}


class ServerTestsError(RuntimeError):
    """One sentence: what is wrong and what to do."""


@dataclass(frozen=True)
class Result:
    outcome: str  # passed, failed, error or skipped
    message: str  # why it failed, without what differs from run to run
    n_evicted: int  # the most that an answer told


Results = Mapping[str, Result]  # by file::test[parameters]


# ---- what the tests need ---------------------------------------------------------------------------------------------


def take_tests(folder: Path) -> Path:
    """Upstream's tests, and the templates that they name, as in the pinned release; returns the folder for pytest.

    Raises ServerTestsError where LEFT_OUT names what is not there.
    """
    given = Path(os.environ.get("EQUIP_LLAMA_CPP_SOURCE", "none"))
    if given.is_dir():
        files = tree_files(given)
    else:
        pin = load_pin()
        files = tarball_files(given if given.is_file() else fetch(pin), pin.folder)
    write_files((file for file in files if file[0].startswith((f"{TESTS}/", "models/templates/"))), folder)
    tests = folder / TESTS
    (tests / "tmp").mkdir(exist_ok=True)
    for name in LEFT_OUT:
        file, _, test = name.partition("::")
        path = tests / "unit" / f"{file}.py"
        if not path.is_file() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
            raise ServerTestsError(f"Upstream has no test {name}; take it out of LEFT_OUT in {Path(__file__).name}.")
    return tests


def python_with_packages(tests: Path) -> Path:
    """An interpreter that has what the tests import, set up once. Raises ServerTestsError."""
    wanted = [
        line.strip()
        for line in (tests / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if re.split(r"[^\w-]", line)[0] in PACKAGES
    ]
    folder = cache_dir() / f"server-tests-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "done"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not done.is_file() or done.read_text() != str(wanted):
            venv.create(folder, with_pip=True, clear=True)
            command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *wanted, "pytest-timeout"]
            result = subprocess.run(command, env=pip_environment(), capture_output=True, text=True)
            if result.returncode != 0:
                why = (result.stderr.strip().splitlines() or ["no message"])[-1]
                raise ServerTestsError(
                    f"pip could not install what upstream's tests import ({why}); connect to a package index."
                )
            done.write_text(str(wanted))
    return python


def write_infill_model(source: Path, target: Path) -> None:
    """The model with three of its tokens named as those around a gap, without which there is no /infill."""
    import gguf
    from gguf_copy import copy_metadata, finish

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), "llama")
    copy_metadata(reader, writer)
    for token, name in enumerate(("pre", "suf", "mid"), start=7):
        writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", token)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)


def write_adapter(source: Path, target: Path) -> None:
    """A LoRA adapter for the model: one random update of rank 4."""
    import gguf
    import numpy as np
    from gguf_copy import finish

    n_embd = int(gguf.GGUFReader(source).fields["llama.embedding_length"].contents())
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    for part, shape in (("a", (4, n_embd)), ("b", (n_embd, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{part}", random.normal(0, 0.1, shape).astype(np.float32))
    finish(writer)


def programs(variants: Sequence[str]) -> dict[str, Path]:
    """The llama-server of each variant; the unpatched one is built if it is not there. Raises ServerTestsError."""
    from equip_cli.core.errors import BackendError
    from equip_cli.serving import program

    try:
        return {variant: program.find() if VARIANTS[variant] else build("stock") / program.NAME for variant in variants}
    except BackendError as error:
        raise ServerTestsError(str(error)) from error


# ---- a run -----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(variant: str, program: Path, python: Path, tests: Path, models: Path, out: Path) -> Results:
    """The results of one variant; its record and log stay in `out`. Raises ServerTestsError."""
    record, log = out / f"{variant}.xml", out / f"{variant}.log"
    left_out = []
    for name in LEFT_OUT:
        file, _, test = name.partition("::")
        left_out.append(f"--deselect=unit/{file}.py::{test}" if test else f"--ignore=unit/{file}.py")
    command = [str(python), "-m", "pytest", "unit", "-q", "--tb=short", "-m", "not slow", *left_out]
    command += ["-p", "server_tests_plugin", "-p", "no:cacheprovider", f"--timeout={SECONDS_PER_TEST}"]
    command += [f"--junitxml={record}", "-o", "junit_family=xunit1"]  # xunit2 has no properties
    dropped = ("LLAMA_", "GGML_", "EQUIP_", "PYTEST_", "PYTHON", "SLOW_TESTS", "DEBUG")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(tests)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LLAMA_SERVER_BIN_PATH": str(program),
        "LLAMA_CACHE": str(tests / "tmp"),
        "LLAMA_KV_POLICY": VARIANTS[variant] or "",
        "PORT": str(free_port()),
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_WAIT_POLICY": "passive",
        "SERVER_TESTS_MODEL": str(models / "model.gguf"),
        "SERVER_TESTS_INFILL": str(models / "infill.gguf"),
        "SERVER_TESTS_LORA": str(models / "lora.gguf"),
    }
    with log.open("w", encoding="utf-8") as output:
        result = subprocess.run(command, cwd=tests, env=env, stdout=output, stderr=subprocess.STDOUT, timeout=1800)
    if result.returncode not in (0, 1):  # 1: some tests fail
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise ServerTestsError(f"pytest ended with code {result.returncode} ({variant}); its log ends with:\n{tail}")
    return read(record)


def read(record: Path) -> Results:
    """A record of pytest's, by file::test."""
    results: dict[str, Result] = {}
    for case in xml.parse(record).getroot().iter("testcase"):
        outcome, message = "passed", ""
        for tag, word in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            found = case.find(tag)
            if found is not None:
                outcome, message = word, found.get("message") or ""
        evicted = [int(p.get("value", 0)) for p in case.iter("property") if p.get("name") == "n_evicted"]
        name = f"{case.get('classname', '').removeprefix('unit.')}::{case.get('name')}"
        results[name] = Result(outcome, stable(message), max(evicted, default=0))
    return results


def stable(message: str) -> str:
    """The line that says why, without addresses, and without answers, which hold times and names."""
    line = re.sub(r"0x[0-9a-f]+", "0x", message.partition("\n")[0])
    return re.sub(r"\{[^{}]*\}", "{}", line)


def run_all(variants: Sequence[str], out: Path, n_jobs: int) -> dict[str, Results]:
    """What each variant gives. Raises ServerTestsError, and BuildError where the unpatched server cannot be built."""
    from equip_cli.models import embedded

    found = programs(variants)
    with tempfile.TemporaryDirectory() as tmp:
        places = {variant: take_tests(Path(tmp) / variant) for variant in variants}
        python = python_with_packages(places[variants[0]])
        shutil.copy(embedded.MODEL, Path(tmp) / "model.gguf")
        write_infill_model(embedded.MODEL, Path(tmp) / "infill.gguf")
        write_adapter(embedded.MODEL, Path(tmp) / "lora.gguf")
        with ThreadPoolExecutor(n_jobs) as pool:
            running = {
                variant: pool.submit(run, variant, found[variant], python, places[variant], Path(tmp), out)
                for variant in variants
            }
            return {variant: each.result() for variant, each in running.items()}


# ---- what they tell --------------------------------------------------------------------------------------------------


def bare(name: str) -> str:
    """file::test without the parameters."""
    return name.partition("[")[0]


def differences(stock: Results, ours: Results) -> dict[str, str]:
    """The tests of which the outcome differs: what it is on both, and why."""
    found = {}
    for name in sorted(stock.keys() | ours.keys()):
        a, b = stock.get(name), ours.get(name)
        if a is None or b is None or a.outcome != b.outcome:
            words = [f"{each.outcome} {each.message}".strip() if each else "not run" for each in (a, b)]
            found[name] = f"{words[0]} -> {words[1]}"
    return found


def other_failures(stock: Results, ours: Results) -> dict[str, str]:
    """The tests that fail on both, but not for the same reason."""
    both = sorted(stock.keys() & ours.keys())
    return {
        name: f"{stock[name].message} -> {ours[name].message}"
        for name in both
        if stock[name].outcome == ours[name].outcome and stock[name].message != ours[name].message
    }


def table(results: Mapping[str, Results]) -> str:
    """Counts of each variant, then each difference with its reason, where EXPLAINED has one."""
    lines = ["variant     passed  failed  skipped  evicting  differences"]
    stock = results.get("stock", {})
    for variant, each in results.items():
        n = Counter(result.outcome for result in each.values())
        n_evicting = sum(result.n_evicted > 0 for result in each.values())
        differ = differences(stock, each) if stock else {}
        lines.append(
            f"{variant:10}{n['passed']:8}{n['failed'] + n['error']:8}{n['skipped']:9}{n_evicting:10}{len(differ):13}"
        )
    for variant, each in results.items():
        for name, what in (differences(stock, each) if stock else {}).items():
            why = EXPLAINED.get(variant, {}).get(bare(name), "NOT EXPLAINED")
            lines += ["", f"{variant}: {name}", f"    {what}", f"    {why}"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run upstream's tests of llama-server on the unpatched one and ours.")
    parser.add_argument("variant", nargs="*", metavar="VARIANT", help=f"{', '.join(VARIANTS)}; default: all of them")
    parser.add_argument("--out", type=Path, help="keep the records and logs in this folder")
    parser.add_argument("--jobs", type=int, default=min(len(VARIANTS), os.cpu_count() or 1), help="variants at once")
    args = parser.parse_args()
    if unknown := [name for name in args.variant if name not in VARIANTS]:
        parser.error(f"there is no variant {unknown[0]}")
    with tempfile.TemporaryDirectory() as tmp:
        out = args.out or Path(tmp)
        out.mkdir(parents=True, exist_ok=True)
        try:
            results = run_all(args.variant or list(VARIANTS), out, args.jobs)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        print(table(results))
    unexplained = [
        name
        for variant, each in results.items()
        for name in differences(results.get("stock", each), each)
        if bare(name) not in EXPLAINED.get(variant, {})
    ]
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
