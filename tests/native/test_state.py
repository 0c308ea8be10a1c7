"""Saved states of bounded memories, through llama.h (native/tests/test-state.cpp) and libequip: what is restored goes on to the bit, what
cannot be restored is refused as a whole, and no file is ever half of one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import gguf
import numpy as np
import pytest
from dropin_models import write_hybrid
from models import MODELS, Spec
from native_api import Library, Model, NativeError, Session
from scopes import SCOPES

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ModelFile = Callable[[Spec | str], Path]
Case = list[str]

STATE, UNSUPPORTED, USAGE, BACKEND = -10, -3, -1, -6  # enum equip_status

MORE = {
    "pagedeviction": ",page_size=8",
    "rkv": ",evict_every=4",
    "snapkv": ",evict_every=4",
    "lagkv": ",evict_every=5",
    "external": ",evict_every=2",
}


def cases() -> list[Case]:
    """Every policy, scope, rule of positions and update once; the types, flash attention and the number of sequences take turns."""
    kinds = cycle(
        [("0", "f16", "f16"), ("1", "f16", "f16"), ("0", "q8_0", "f16"), ("1", "q8_0", "q4_0"), ("0", "f32", "f32")]
    )
    rotate, n_seq, res = cycle([1, 4, 8]), cycle([1, 2, 3, 1]), list[Case]()
    for policy, scopes in SCOPES.items():
        for scope in scopes:
            for positions in ("true", "cache", "auto"):
                for update in ("inplace", "gather"):
                    fa, type_k, type_v = next(kinds)
                    text = f"{policy}:budget=64,scope={scope},positions={positions},update={update}"
                    text += "" if policy == "streaming" else ",recent=8"
                    text += "" if positions == "true" else f",rotate_every={next(rotate)}"
                    text += MORE.get(policy, "")
                    res.append([text, f"fa={fa}", f"type_k={type_k}", f"type_v={type_v}", f"n_seq={next(n_seq)}"])
    return res


def joined(some: list[Case]) -> list[str]:
    return [word for case in some for word in (*case, "/")][:-1]


@pytest.fixture(scope="module")
def hybrid_file(upstream_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hybrid(
        tmp_path_factory.mktemp("hybrid") / "lfm2.gguf", upstream_file("models/ggml-vocab-llama-spm.gguf")
    )


def passes(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


# ---- to the bit ------------------------------------------------------------------------------------------------------


def test_a_restored_sequence_goes_on_to_the_bit(run_native: Run, model_file: ModelFile) -> None:
    """After each of 60 steps (windows half full, evictions owed, before the first one, after rewinds): the same logits, kept sets, sums and
    books, in another sequence too; and a run that saves is the run that does not."""
    some = cases()[::19]
    assert {case[0].split(":")[0] for case in some} >= {"streaming", "random", "rkv", "h2o", "snapkv", "pagedeviction"}
    passes(run_native("test-state", model_file("llama-gqa"), "exact", *joined(some)))


def test_a_sequence_restored_around_its_change_to_ranks_goes_on_to_the_bit(
    run_native: Run, model_file: ModelFile
) -> None:
    """Positions `auto`: before and after the step that goes over to ranks, and with a base that grows."""
    short = model_file(replace(MODELS["llama-gqa"], n_ctx_train=90))
    case = ["h2o:budget=64,recent=8,positions=auto,rotate_every=4", "n_seq=2"]
    passes(run_native("test-state", short, "exact", *case, LLAMA_KV_REBASE_AT="40"))
    case[0] = "knorm:budget=64,recent=8,positions=auto,update=gather"
    passes(run_native("test-state", short, "exact", *case))


def test_keys_that_stand_elsewhere_and_scores_of_a_caller_are_restored(run_native: Run, model_file: ModelFile) -> None:
    """Where keys were rotated to, for a formula that reads them without it; scores of tokens that are kept, and to come."""
    some = [
        ["lagkv:budget=64,recent=8,positions=cache,rotate_every=4,evict_every=5", "n_seq=2"],
        ["lagkv:budget=64,recent=8,positions=cache,scope=token,evict_every=3", "type_k=q8_0", "fa=1"],
        ["lagkv:budget=64,recent=8,positions=auto,scope=layer,update=gather,lag=7"],
        ["external:budget=64,recent=8,evict_every=2", "n_seq=2"],
        ["external:budget=64,recent=8,scope=token,positions=cache,unscored=50", "n_seq=3"],
        ["external:budget=64,recent=8,scope=layer,update=gather,positions=true"],
    ]
    short = model_file(replace(MODELS["llama-gqa"], n_ctx_train=90))
    passes(run_native("test-state", model_file("llama-gqa"), "exact", *joined(some)))
    passes(run_native("test-state", short, "exact", *joined(some[2:5]), LLAMA_KV_REBASE_AT="40"))


def test_a_restored_sequence_of_several_caches_goes_on_to_the_bit(run_native: Run, model_file: ModelFile) -> None:
    """The sliding window's cells, with the slot that is written next."""
    passes(run_native("test-state", model_file("gemma3"), "exact", "h2o:budget=64,recent=8,positions=cache", "n_seq=2"))


def test_a_restored_sequence_of_a_hybrid_goes_on_to_the_bit(run_native: Run, hybrid_file: Path) -> None:
    case = ["random:budget=64,recent=8", "n_seq=3"]
    passes(run_native("test-state", hybrid_file, "exact", *case))


@pytest.mark.full
@pytest.mark.parametrize(
    "policy", ["streaming:budget=64", "h2o:budget=64,recent=8,rotate_every=4", "random:budget=64,recent=8"]
)
@pytest.mark.parametrize("fa", ["0", "1"])
def test_restored_originals_in_the_graph_are_the_same(
    run_native: Run, model_file: ModelFile, policy: str, fa: str
) -> None:
    """Sinks as a device has them."""
    case = [policy + ",positions=cache", "n_seq=2", f"fa={fa}"]
    passes(run_native("test-state", model_file("gemma3"), "exact", *case, LLAMA_KV_SINKS="graph"))


@pytest.mark.full
@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("part", range(12))
def test_every_policy_goes_on_to_the_bit(run_native: Run, model_file: ModelFile, model: str, part: int) -> None:
    passes(run_native("test-state", model_file(model), "exact", *joined(cases()[part::12])))


@pytest.mark.full
@pytest.mark.parametrize("model", ["gpt-oss", "smollm3", "gemma2", "qwen2-gqa", "llama-mha"])
def test_every_model_goes_on_to_the_bit(run_native: Run, model_file: ModelFile, model: str) -> None:
    some = [case for i, case in enumerate(cases()) if i % 16 == 3]
    passes(run_native("test-state", model_file(model), "exact", *joined(some)))


@pytest.mark.full
def test_every_policy_of_a_hybrid_goes_on_to_the_bit(run_native: Run, hybrid_file: Path) -> None:
    for text in ("streaming:budget=64", "random:budget=64,recent=8", "knorm:budget=64,recent=8,scope=layer"):
        for update in ("inplace", "gather"):
            for fa in ("0", "1"):
                if "scope=layer" not in text:
                    passes(run_native("test-state", hybrid_file, "exact", f"{text},update={update}", f"fa={fa}"))


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = "h2o:budget=64,recent=8,sinks=4,scope=head,positions=cache,rotate_every=8,update=inplace,score_queries=8,evict_every=1"


def test_a_state_of_something_else_is_refused_by_name(run_native: Run, model_file: ModelFile) -> None:
    """Another model, each setting, type and shape, version, damage, files, devices: one sentence that names it, a status, and a sequence
    that is empty and says so."""
    other = replace(MODELS["llama-gqa"], seed=1234)
    passes(run_native("test-state", model_file("llama-gqa"), "refuse", REFUSED, model_file(other)))


def test_a_fine_tune_of_one_layer_is_another_model(model_file: ModelFile, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.gguf"
    shutil.copyfile(model_file("llama-gqa"), tuned)
    for tensor in gguf.GGUFReader(str(tuned), "r+").tensors:
        if tensor.name == "blk.1.attn_v.weight":
            tensor.data[...] = (tensor.data * np.float32(1.01)).astype(tensor.data.dtype)
    library, text = Library(), [t % 200 for t in range(3, 203)]
    for policy in ("streaming:budget=64", "none"):
        models = [Model(library, path) for path in (model_file("llama-gqa"), tuned)]
        sessions = [Session(model, policy=policy, n_ctx=512) for model in models]
        sessions[0].eval(text)
        data = sessions[0].save()
        with pytest.raises(NativeError, match="another model") as error:
            sessions[1].load(data)
        assert error.value.status == STATE


# ---- faults ----------------------------------------------------------------------------------------------------------

MUTATED = [
    ("llama-gqa", ["h2o:budget=64,recent=8,positions=cache,rotate_every=4"], []),
    ("llama-gqa", ["snapkv:budget=64,recent=8,scope=layer,evict_every=4"], ["fa=1"]),
    ("llama-gqa", ["rkv:budget=64,recent=8,evict_every=4,positions=auto"], []),
    ("llama-gqa", ["pagedeviction:budget=64,recent=8,page_size=8"], ["fa=1"]),
    ("llama-gqa", ["external:budget=64,recent=8,evict_every=2"], []),
    ("llama-gqa", ["lagkv:budget=64,recent=8,positions=cache,rotate_every=4"], []),
    ("llama-gqa", ["random:budget=64,recent=8,scope=token,update=gather"], []),
    ("llama-gqa", ["streaming:budget=64,update=gather"], []),
    ("llama-gqa", ["tova:budget=64,recent=8,scope=head,update=gather,positions=cache"], []),
    ("gemma3", ["streaming:budget=64"], []),
    ("gemma3", ["h2o:budget=64,recent=8,positions=auto,scope=token"], ["fa=1"]),
    ("hybrid", ["random:budget=64,recent=8"], []),
]


def mutate(run_native: Run, model: Path, policy: str, n: int, seed: int, file: Path, options: list[str]) -> None:
    result = run_native("test-state", model, "mutate", policy, n, seed, file, *options)
    assert result.returncode >= 0, f"ended by signal {-result.returncode}: {policy}, seed {seed}"
    print(passes(result))


def test_a_mutated_state_is_refused_or_one_of_its_own(run_native: Run, model_file: ModelFile, tmp_path: Path) -> None:
    """Half of them with a corrected checksum; with a wrong one nothing is accepted but the original."""
    mutate(run_native, model_file("llama-gqa"), MUTATED[0][1][0], 100, 3, tmp_path / "state", [])


@pytest.mark.full
@pytest.mark.parametrize(("model", "policy", "options"), MUTATED)
def test_each_of_2000_mutated_states_is_refused_or_one_of_its_own(
    run_native: Run, model_file: ModelFile, hybrid_file: Path, tmp_path: Path, model: str, policy: Case, options: Case
) -> None:
    path = hybrid_file if model == "hybrid" else model_file(model)
    for seed in (11, 12, 13, 14):
        mutate(run_native, path, policy[0], 50, seed, tmp_path / "state", options)


def killed_saves(
    native_program: Callable[[str], tuple[Path, Path]], model: Path, folder: Path, n: int
) -> Iterator[int]:
    """The number of tokens that the file holds after each of n kills at a random moment of a save."""
    program, library = native_program("test-state")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "GGML_"))}
    env |= {"LD_LIBRARY_PATH": str(library), "DYLD_LIBRARY_PATH": str(library), "EQUIP_TEST_LIB_DIR": str(library)}
    file, delays = folder / "state", random.Random(7)
    for _ in range(n):
        command = [str(program), str(model), "loop", "h2o:budget=64,recent=8", str(file)]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as saver:
            assert saver.stdout is not None and saver.stdout.readline() == "ready\n"
            time.sleep(delays.uniform(0.0, 0.02))
            saver.kill()
            assert saver.wait() == -signal.SIGKILL
        command = [str(program), str(model), "verify", "h2o:budget=64,recent=8", str(file)]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        yield int(passes(result).splitlines()[0])


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("n", [4, pytest.param(100, marks=pytest.mark.full)])
def test_a_save_that_is_killed_leaves_a_whole_file(
    native_program: Callable[[str], tuple[Path, Path]], model_file: ModelFile, tmp_path: Path, n: int
) -> None:
    found = list(killed_saves(native_program, model_file("llama-gqa"), tmp_path, n))
    assert set(found) <= {96, 160} and (n < 50 or set(found) == {96, 160})


# ---- libequip --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(model_file: ModelFile) -> Model:
    return Model(Library(), model_file("llama-gqa"))


TEXT = [t * 31 % 200 for t in range(3, 403)]

SESSIONS = [
    "streaming:budget=64",
    "h2o:budget=64,recent=8",
    "snapkv:budget=64,recent=8,scope=token",
    "random:budget=64,recent=8,update=gather",
    "none",
]


@pytest.mark.parametrize("policy", SESSIONS)
def test_a_loaded_session_goes_on_to_the_bit(model: Model, policy: str) -> None:
    options = {"policy": policy, "n_ctx": 512, "n_ubatch": 64}
    with Session(model, **options) as a, Session(model, **options) as b:
        a.eval(TEXT[:200])
        b.eval(TEXT[300:])  # what is there goes
        b.load(data := a.save())
        assert b.save() == data
        for t in TEXT[200:230]:
            assert np.array_equal(a.eval([t]), b.eval([t]))
        assert a.kept() == b.kept() and a.stats()["n_evicted"] == b.stats()["n_evicted"]
        assert a.stats()["n_past"] == b.stats()["n_past"] == 230


def test_a_file_of_a_session_holds_its_bytes(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "säved"
    with Session(model, policy="h2o:budget=64,recent=8") as a, Session(model, policy="h2o:budget=64,recent=8") as b:
        a.eval(TEXT[:200])
        lib = a.lib.c
        a.lib.check(lib.equip_session_save_file(a.handle, os.fsencode(path)))
        assert path.read_bytes() == a.save() and [p.name for p in tmp_path.iterdir()] == ["säved"]
        a.lib.check(lib.equip_session_load_file(b.handle, os.fsencode(path)))
        assert np.array_equal(a.eval(TEXT[200:201]), b.eval(TEXT[200:201]))

        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)
        link = tmp_path / "link"
        link.symlink_to(path)
        a.lib.check(lib.equip_session_save_file(a.handle, os.fsencode(link)))
        assert link.is_symlink() and path.read_bytes() == a.save() and path.stat().st_mode & 0o777 == 0o600

        # a file that cannot be read, or written, changes nothing
        for call in (lib.equip_session_load_file, lib.equip_session_save_file):
            with pytest.raises(NativeError, match="No such file") as error:
                a.lib.check(call(a.handle, os.fsencode(tmp_path / "nowhere" / "x")))
            assert error.value.status == STATE
        assert np.array_equal(a.eval(TEXT[201:202]), b.eval(TEXT[201:202]))


def test_generation_after_a_load_forgets_no_token(model: Model) -> None:
    """The token that was handed out and is not evaluated yet, and the penalties' tokens, are saved."""
    options = {"policy": "streaming:budget=64", "n_threads": 1}

    def generate(session: Session, n: int) -> list[int]:
        ffi, lib = session.lib.ffi, session.lib.c
        out, n_out, stop = ffi.new("int32_t[]", n), ffi.new("int32_t *"), ffi.new("int *")
        session.lib.check(lib.equip_session_generate(session.handle, n, out, n_out, stop))
        return list(out)[: n_out[0]]

    def sampler(session: Session) -> None:
        text = b"temp=0,repeat_penalty=1.3,repeat_last_n=64,ignore_eos=1"
        session.lib.check(
            session.lib.c.equip_session_set_sampler(session.handle, text, session.lib.ffi.NULL, session.lib.ffi.NULL)
        )

    with Session(model, **options) as a, Session(model, **options) as b:
        for session in (a, b):
            sampler(session)
        a.eval(TEXT[:150])
        generate(a, 20)
        b.load(a.save())
        for session in (a, b):
            session.eval(TEXT[150:153])
        assert generate(a, 30) == generate(b, 30)


def test_a_refused_session_answers_from_nothing(model: Model) -> None:
    with Session(model, policy="streaming:budget=64") as a, Session(model, policy="streaming:budget=96") as b:
        a.eval(TEXT[:200])
        data = a.save()
        corrected = bytearray(data)
        corrected[8] ^= 1  # the model's print
        corrected[-4:] = zlib.crc32(corrected[:-4]).to_bytes(4, "little")
        for bytes_, status, sentence in (
            (data, STATE, "budget=64.*budget=96"),
            (data[:-1], STATE, "checksum"),
            (data[:30], STATE, "checksum"),
            (b"", STATE, "truncated"),
            (b"x" * 100, STATE, "no saved session"),
            (data[:4] + b"\x07" + data[5:], STATE, "version 7"),
            (bytes(corrected), STATE, "another model"),
        ):
            b.reset()
            b.eval(TEXT[:20])
            with pytest.raises(NativeError, match=sentence) as error:
                b.load(bytes_)
            assert error.value.status == status
            assert b.kept() == {} and b.stats()["n_past"] == 0
            with pytest.raises(NativeError, match="reset it") as error:
                b.eval(TEXT[:1])
            assert error.value.status == BACKEND
            with pytest.raises(NativeError, match="cannot be saved") as error:
                b.save()
            assert error.value.status == STATE
        b.reset()
        b.eval(TEXT[:20])


def test_an_unbounded_session_is_refused_under_a_policy_and_back(model: Model) -> None:
    with Session(model, policy="streaming:budget=64") as a, Session(model, policy="none", n_ctx=512) as b:
        a.eval(TEXT[:200])
        b.eval(TEXT[:200])
        for to, data, sentence in ((b, a.save(), "under the policy streaming"), (a, b.save(), "without a policy")):
            with pytest.raises(NativeError, match=sentence) as error:
                to.load(data)
            assert error.value.status == STATE and to.kept() == {}


def test_a_baseline_is_not_saved(model: Model) -> None:
    with Session(model, policy="streaming:budget=64,update=shift") as session:
        session.eval(TEXT[:100])
        with pytest.raises(NativeError, match="update=shift") as error:
            session.save()
        assert error.value.status == UNSUPPORTED


def test_the_size_of_a_state_does_not_grow_with_the_text(model: Model) -> None:
    """It is that of what is kept."""
    with Session(model, policy="h2o:budget=64,recent=8") as session:
        sizes = []
        for i in range(0, 400, 100):
            session.eval(TEXT[i : i + 100])
            session.kept()  # what a chunk owes is carried out
            sizes.append(len(session.save()) - 4 * (i + 100))  # the penalties' tokens
    assert max(sizes) < 1.01 * sizes[0]
