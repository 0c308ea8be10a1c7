"""equip check: it agrees with itself on a sound library, and says so when a row is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equip_cli import BackendError, Model, Session, UnsupportedModelError
from equip_cli.checking import measure
from equip_cli.checking import rows as criteria
from equip_cli.checking.rows import CACHES, Row, Settings
from equip_cli.cli import main
from equip_cli.core.session import Session as RealSession

ARGS = ("-t", "1", "--budget", "64", "-n", "48")
RECORD_KEYS = {
    "equip", "llama_cpp", "backends", "model", "arch", "n_params", "policy", "scope", "positions", "budget", "type_k", "type_v",
    "flash_attn", "update", "device", "reference", "n_threads", "n_ubatch", "n_evictions", "kept_as_prescribed", "difference",
    "rms_difference", "difference_from", "rms_error", "rms_before_evictions", "rms_limit", "amplified_limit", "tokens_per_second",
    "graphs_reused", "passed", "faults", "remark",
}  # fmt: skip
Check = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def checked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """The exit code and the records of `equip check --json`, in this process, so that a test can falsify a part."""
    monkeypatch.delenv("LLAMA_KV_POLICY", raising=False)

    def run(path: Path | None, *args: str) -> tuple[int, list[dict[str, Any]]]:
        code = main(["check", *([str(path)] if path else []), *ARGS, *args, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def path(model_file: Callable[[str], Path]) -> Path:
    return model_file("llama-gqa")


def failed(records: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {(r["type_k"], r["update"], r["positions"]) for r in records if r["passed"] is False}


def cpu_only(records: list[dict[str, Any]]) -> bool:
    return {record["device"] for record in records} == {"CPU"}


# ---- on a sound library


def test_the_updates_agree_in_every_cache(checked: Check, path: Path) -> None:
    code, records = checked(path)
    assert code == 0, records
    rows = [("inplace", "cache"), ("shift", "cache"), ("gather", "cache"), ("inplace", "true")]
    scored = [("f32", "h2o", "head", update, "cache") for update in ("inplace", "gather")]
    if cpu_only(records):
        assert [(r["type_k"], r["policy"], r["scope"], r["update"], r["positions"]) for r in records] == [
            *(("f32", "streaming", "token", *row) for row in rows), *scored,
            *((c.kind, "streaming", "token", *row) for c in CACHES[1:] for row in rows),
        ]  # fmt: skip
    for record in records:
        assert set(record) == RECORD_KEYS | ({"score_queries", "evict_every"} if record["policy"] == "h2o" else set())
        assert record["passed"] is True, record
        assert record["kept_as_prescribed"]
        assert record["n_evictions"] == 48 + 16  # a chunk in their midst
        assert record["tokens_per_second"] > 0
        assert 0 < record["rms_before_evictions"] < 1e-2 or record["type_k"] == "f32"
    exact = [record for record in records if record["difference"] is not None]
    assert {(r["update"], r["difference_from"]) for r in exact} == {
        ("inplace", "gather"), ("shift", "inplace"), ("gather", "inplace"),
    }  # fmt: skip
    assert max(record["difference"] for record in exact) <= criteria.TOLERANCE
    references = [record for record in records if record["reference"]]
    assert [(record["policy"], record["positions"]) for record in references] == [
        ("streaming", "cache"), ("streaming", "true"), ("h2o", "cache"),
    ]  # fmt: skip
    for record in references:
        assert (record["type_k"], record["flash_attn"], record["rms_error"]) == ("f32", "off", 0.0)


def test_the_baselines_are_not_the_update_they_are_compared_with(checked: Check, path: Path) -> None:
    """Rows that agree bit by bit would be one row three times."""
    _, records = checked(path)
    differences = [record["difference"] for record in records if record["difference"] is not None]
    assert len(differences) == 5 and min(differences) > 0, differences


def test_the_embedded_model_passes(checked: Check, capsys: pytest.CaptureFixture[str]) -> None:
    code, records = checked(None)
    assert code == 0, records
    ran = [record for record in records if record["passed"] is not None]
    assert len(ran) >= len(records) - 1  # llama.cpp cannot shift 8-bit keys of this head_dim
    assert main(["check", *ARGS]) == 0
    shown = capsys.readouterr().out
    about = " ".join(shown.partition("| cache ")[0].split())
    assert re.match(r"equip \S+, llama.cpp [0-9a-f]{9} \| backends .*CPU.* \| threads 1 \|", about)
    assert "budget 64, 64 evictions" in about and "f32: fa off | f16: fa on | q8_0: fa on" in about
    assert re.search(r"streaming: scope token \| h2o: scope head, score queries all, evict every \d+", about)
    assert re.search(r"^\| f32 +\| +streaming \| +inplace \|.* 0 \(ref\) \|", shown, re.MULTILINE)
    assert re.search(r"^\| f32 +\| +h2o \| +gather \|", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.endswith(f"All {len(ran)} rows agree.\n")


def test_true_positions_have_no_shift(checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = Model.info.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Model,
        "info",
        property(lambda self: info(self) | {"supports": info(self)["supports"] | {"positions": ["true"]}}),
    )
    code, records = checked(path)
    assert code == 0, records
    assert {record["positions"] for record in records} == {"true"}
    for record in records:
        assert record["passed"] is (None if record["update"] == "shift" else True)
        assert ("must stay true" in (record["remark"] or "")) == (record["update"] == "shift")


def test_a_second_device_is_compared_with_the_cpu(path: Path) -> None:
    settings = Settings(64, n_evictions=32, n_threads=1, updates=("gather",))
    done: list[float] = []
    with Model(path) as model, Model(path, n_gpu_layers=0) as cpu_model:
        tokens = list(range(1, 250)) * 4
        rows = measure.run(model, cpu_model, "GPU0", settings, tokens, done.append)
    places = [("inplace", "cache", "GPU0"), ("gather", "cache", "GPU0"), ("inplace", "true", "GPU0")]
    on_cpu = [("inplace", "cache", "CPU"), ("inplace", "true", "CPU")]
    expected = [*places, *on_cpu, *places, on_cpu[0], *places, on_cpu[0]]
    assert [(row.update, row.positions, row.device) for row in rows] == expected
    assert [i for i, row in enumerate(rows) if row.is_reference] == [3, 4]
    assert all(row.passed for row in rows), [row.faults for row in rows]
    assert sum(done) == pytest.approx(len(CACHES))


def test_rows_that_read_attention_weights_are_measured(path: Path) -> None:
    settings = Settings(64, n_evictions=32, n_threads=1, updates=("gather",), scored=True)
    with Model(path) as model, Model(path, n_gpu_layers=0) as cpu_model:
        rows = measure.run(model, cpu_model, "GPU0", settings, list(range(1, 250)) * 4)
    scored = [row for row in rows if row.policy == "h2o"]
    assert [(row.update, row.scope, row.device, row.is_reference) for row in scored] == [
        ("inplace", "head", "GPU0", False), ("gather", "head", "GPU0", False), ("inplace", "head", "CPU", True),
    ]  # fmt: skip
    assert all(row.passed for row in rows), [row.faults for row in rows]
    assert [row.peer for row in scored] == ["gather", "inplace", None]
    assert all(row.rms_limit is None for row in scored)


def test_a_head_that_keeps_too_little_is_found(checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(session: Session, real: Any) -> Any:
        """One lane lost a token."""
        found = real()
        if session.stats()["n_evicted"]:
            found[max(found) - 1] -= 0.125
        return found

    falsify(monkeypatch, "gather", "f32", shares=shares)
    code, records = checked(path)
    assert code == 1
    (record,) = [record for record in records if record["passed"] is False]
    assert (record["policy"], record["update"]) == ("h2o", "gather")
    assert record["faults"] == ["it keeps other tokens than the policy prescribes"]


def test_a_model_without_heads_of_its_own_has_fewer_rows(
    checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Model.session

    def session(self: Model, policy: Any, **options: Any) -> Session:
        if policy.name == "h2o":
            raise UnsupportedModelError("this model has ALiBi distances")
        return real(self, policy, **options)

    monkeypatch.setattr(Model, "session", session)
    code, records = checked(path)
    assert code == 0
    scored = [record for record in records if record["policy"] == "h2o"]
    assert [record["remark"] for record in scored] == ["this model has ALiBi distances"] * 2
    assert {record["passed"] for record in scored} == {None}
    assert {record["passed"] for record in records if record["policy"] == "streaming"} == {True}


def test_the_time_decides_on_the_evictions(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for seconds in (1e-9, 1e9):
        monkeypatch.setattr(measure, "_SECONDS", seconds)
        settings = Settings(64, n_threads=1, updates=())
        with Model(path) as model:
            rows = measure.run(model, model, "CPU", settings, list(range(250)) * 3)
        counts.append({row.n_evictions for row in rows})
    assert counts == [{64 + 16}, {384 + 16}]


# ---- what it is for


def falsify(monkeypatch: pytest.MonkeyPatch, update: str, kind: str, positions: str = "cache", **methods: Any) -> None:
    """Replace methods of the session with this update, cache type and rule of positions: `method(session, real)`."""
    for name, method in methods.items():
        real = getattr(RealSession, name)

        def wrong(self: Session, *args: Any, method: Any = method, real: Any = real) -> Any:
            stats = self.stats()
            if (self.policy.update, stats["type_k"], stats["positions"]) == (update, kind, positions):
                return method(self, lambda: real(self, *args))
            return real(self, *args)

        monkeypatch.setattr(Session, name, wrong)


def shaken(share: float) -> Any:
    """Logits that are off by `share` of their range, once a token has been evicted."""
    rng = np.random.default_rng(0)

    def logits(session: Session, real: Any) -> Any:
        values = real()
        if session.stats()["n_evicted"]:
            values += (share * np.ptp(values) * rng.normal(size=values.size)).astype(np.float32)
        return values

    return logits


@pytest.mark.parametrize(
    ("update", "kind", "share", "found"),
    [
        ("inplace", "f32", 1e-3, {"inplace", "shift", "gather"}),  # the one that the others are compared with
        ("shift", "f32", 1e-3, {"shift"}),
        ("gather", "f32", 1e-3, {"inplace", "gather"}),
        ("inplace", "f16", 5e-3, {"inplace"}),
        ("gather", "f16", 5e-3, {"gather"}),
        ("inplace", "q8_0", 5e-2, {"inplace"}),
        ("gather", "q8_0", 5e-2, {"gather"}),
    ],
)
def test_wrong_logits_are_found(
    checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch, update: str, kind: str, share: float, found: set[str]
) -> None:
    falsify(monkeypatch, update, kind, logits=shaken(share))
    code, records = checked(path)
    assert code == 1
    if kind == "f32" and update == "inplace":
        # the reference itself: rows of other caches show it too
        assert failed(records) >= {(kind, each, "cache") for each in found}
    else:
        assert failed(records) == {(kind, each, "cache") for each in found}


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", ["llama-gqa", "embedded"])
def test_keys_at_wrong_positions_are_found(
    checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """The sinks stay where they were written, as if the rotation were forgotten: the right tokens in the right slots."""
    real = Model.session

    def session(self: Model, policy: Any, **options: Any) -> Session:
        if (policy.update, options["type_k"]) == ("gather", kind):
            policy = replace(policy, positions="true")
        return real(self, policy, **options)

    monkeypatch.setattr(Model, "session", session)
    code, records = checked(None if name == "embedded" else path)
    assert code == 1
    assert failed(records) == {
        (kind, each, "cache") for each in (["inplace", "gather"] if kind == "f32" else ["gather"])
    }


def test_a_wrong_twin_excuses_nothing(checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for positions in ("cache", "true"):
        falsify(monkeypatch, "inplace", "q8_0", positions, logits=shaken(0.3))
    code, records = checked(path)
    assert code == 1
    assert failed(records) == {("q8_0", "inplace", "cache"), ("q8_0", "inplace", "true")}


@pytest.mark.parametrize("update", ["inplace", "shift", "gather"])
def test_wrong_tokens_are_found(checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch, update: str) -> None:
    def kept(session: Session, real: Any) -> Any:
        """The oldest of the recent ones stays, and the one after it goes."""
        found = real()
        if session.stats()["n_evicted"]:
            position, slot = found[criteria.SINKS]
            found[criteria.SINKS] = (position - 1, slot)
        return found

    falsify(monkeypatch, update, "f16", kept=kept)
    code, records = checked(path)
    assert code == 1
    for record in records:
        wrong = (record["update"], record["type_k"], record["positions"]) == (update, "f16", "cache")
        assert record["kept_as_prescribed"] is not wrong
        assert record["passed"] is not wrong
        assert record["faults"] == (["it keeps other tokens than the policy prescribes"] if wrong else [])


def test_a_slot_with_two_tokens_is_found(checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    falsify(monkeypatch, "inplace", "q8_0", kept=lambda _, real: [(position, 0) for position, _ in real()])
    code, records = checked(path)
    assert code == 1
    assert failed(records) == {("q8_0", "inplace", "cache")}


@pytest.mark.parametrize("update", ["shift", "inplace"])
def test_logits_that_are_no_numbers_are_found(
    checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch, update: str
) -> None:
    falsify(monkeypatch, update, "f16", logits=lambda _, real: real() * np.float32("nan"))
    code, records = checked(path)
    assert code == 1
    (record,) = [record for record in records if record["passed"] is False]
    assert record["faults"] == ["its logits are not finite"]
    assert record["rms_error"] is None


def test_a_failed_row_is_a_finding_and_the_rest_goes_on(
    checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: Session, real: Any) -> Any:
        if session.stats()["n_past"] > 100:
            raise BackendError("out of luck")
        return real()

    falsify(monkeypatch, "gather", "q8_0", eval=fail)
    code, records = checked(path)
    assert code == 1
    assert failed(records) == {("q8_0", "gather", "cache")}
    assert [record["remark"] for record in records if record["remark"]] == ["out of luck"]


def test_what_the_model_rules_out_is_said_and_no_failure(
    checked: Check, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Model.session

    def session(self: Model, policy: Any, **options: Any) -> Session:
        if policy.update == "shift":
            raise UnsupportedModelError("the angles of this model are scaled")
        return real(self, policy, **options)

    monkeypatch.setattr(Model, "session", session)
    code, records = checked(path)
    assert code == 0
    assert {record["passed"] for record in records if record["update"] == "shift"} == {None}
    assert {record["passed"] for record in records if record["update"] != "shift"} == {True}
    assert main(["check", str(path), *ARGS]) == 0
    assert "- f16, fa on, streaming, token, shift, cache, " in (shown := capsys.readouterr().out)
    assert "the angles of this model are scaled" in " ".join(shown.split())


# ---- the criteria by themselves


def row(update: str, error: float, before: float = 1e-3, kind: int = 2, positions: str = "cache", **more: Any) -> Row:
    return Row(CACHES[kind], update, positions, "GPU0", False, rms_before=before, rms_error=error, ran=True, **more)


def twin(error: float, before: float = 1e-3, kind: int = 2) -> Row:
    return row("inplace", error, before, kind, "true")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("inplace", 1.9e-3), twin(1e-3)], [True, True]),
        ([row("inplace", 2.1e-3), twin(1e-3)], [False, True]),
        # slots out of order may cost much under flash attention, and then they do in the twin too
        ([row("inplace", 9e-3), row("gather", 1e-3), twin(8e-3)], [True, True, True]),
        ([row("inplace", 1e-3), row("gather", 2.1e-3), twin(1e-3)], [True, False, True]),
        # a baseline that drifts is no yardstick, and is not blamed
        ([row("inplace", 2.1e-3), row("shift", 1e-1), twin(1e-3)], [False, True, True]),
        # a twin that is wrong is no yardstick either
        ([row("inplace", 3.3e-2), twin(3.3e-2)], [False, False]),
        ([row("inplace", 3.1e-2), row("gather", 3.3e-2)], [True, False]),
        ([row("inplace", 0.9e-4, 0.0), twin(0.0, 0.0)], [True, True]),
        ([row("shift", 1e-2, kind=0), twin(1e-3, kind=0)], [False, True]),  # nothing to round, so nothing to drift
        ([row("inplace", math.nan)], [False]),
        ([row("inplace", 1e-3), twin(math.nan)], [True, False]),
    ],
)
def test_noise_is_judged_by_noise(rows: list[Row], expected: list[bool]) -> None:
    criteria.judge(rows, rounded_weights=False)
    assert [each.passed for each in rows] == expected


@pytest.mark.parametrize(
    ("difference", "rms", "rounded", "passes"),
    [
        (0.9e-4, 1e-5, False, True),
        (1.1e-4, 1e-5, False, False),
        (1.1e-4, 1e-5, True, True),
        (1e-2, 1.9e-3, True, True),
        (1e-2, 2.1e-3, True, False),
        (math.nan, math.nan, True, False),
    ],
)
def test_exact_caches_are_compared_logit_by_logit(difference: float, rms: float, rounded: bool, passes: bool) -> None:
    exact = row("gather", 0.0, 0.0, kind=0, peer="inplace", difference=difference, rms_difference=rms)
    criteria.judge([exact, row("inplace", 1e-3, kind=1)], rounded_weights=rounded)
    assert exact.passed is passes


def test_the_prescribed_tokens_are_sinks_and_the_newest() -> None:
    assert criteria.prescribed(8, 8) == list(range(8))
    assert criteria.prescribed(11, 8) == [0, 1, 2, 3, 7, 8, 9, 10]


# ---- refusals


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--update", "sideways"], 2, "there is no update 'sideways'"),
        (["--budget", "100000"], 2, "a budget of 100000 is more than the trained context"),
        (["--budget", "4"], 2, "budget"),
        (["-n", "0"], 2, "-n is 0: give a whole number from 1"),
    ],
)
def test_what_is_refused_is_one_sentence(
    path: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, words: str
) -> None:
    assert main(["check", str(path), *args]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err and shown.err.startswith("error: ")


def test_a_model_without_a_policy_is_refused(
    model_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(model_file("bert"))]) == 1
    assert "embedding model" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The command switches the native log; other tests of this process start from silence."""
    yield
    from equip_cli.core import native

    native.load().set_verbosity(0)
