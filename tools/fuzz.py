"""Feed damaged and absurd input to the library: no signal, no hang, no unbounded memory.

    python tools/fuzz.py gguf|policy|template|grammar|all [--n 1000] [--seed 1] [--jobs 2] [--keep DIR] [--only I]

gguf: model files whose numbers, tensors or bytes are changed; policy: texts for LLAMA_KV_POLICY and for sessions;
template: chat templates, messages and tools; grammar: GBNF and JSON schemas. Case I of a seed is always the same input
(--only I runs it alone and prints what was said). Each case runs in a child process of its own with limits on time and
address space. It is right if it runs, or if it is refused with a status and one sentence. Exit status 1 if any is not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_gguf
import fuzz_grammar
import fuzz_mutate
import fuzz_template
import fuzz_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from models import Spec, write  # noqa: E402
from native_api import Library, Model, NativeError, Session  # noqa: E402

SECONDS = 60.0  # of CPU time for one case
CLOCK = 4.0  # times as many by the clock, for a busy machine: less than a test may take
ADDRESS_SPACE = 6 << 30  # bytes, for one case
RESIDENT = 3 << 30  # bytes: what a case may touch of them
KINDS = ("gguf", "policy", "template", "grammar")


@dataclass(frozen=True)
class Outcome:
    """kind: ran, refused, or one of the faults: signal, hang, memory, sentence."""

    kind: str
    said: str  # the step and the sentence of a refusal; what was seen of a fault

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("ran", "refused")


def one_sentence(message: str) -> bool:
    return bool(message) and "\n" not in message and message != "no error" and not message.endswith(".")


# ---- the cases; each runs in a child ---------------------------------------------------------------------------------


class Cases:
    """What the children start from: the library, the tiny models, and llama.h for programs without libequip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lib = Library()
        self.policies: list[dict[str, Any]] = json.loads(self.lib.ffi.string(self.lib.c.equip_policies()))
        self.bases = fuzz_gguf.bases(folder)
        small: dict[str, Any] = {"n_embd": 64, "head_dim": 32, "n_ff": 64, "n_ctx_train": 256}
        self.text = write(Spec(tokenizer="bytes", n_vocab=320, **small), folder / "text.gguf")
        self.window = write(Spec("gemma3", n_layer=4, **small), folder / "window.gguf")

    def run(self, kind: str, rng: random.Random) -> None:
        """Raises NativeError where the library refuses."""
        step: Callable[[random.Random], None] = getattr(self, kind)
        step(rng)

    def gguf(self, rng: random.Random) -> None:
        base = self.bases[rng.choice(sorted(self.bases))]
        path = self.folder / f"case-{os.getpid()}.gguf"
        path.write_bytes(fuzz_mutate.mutate(rng, base))
        try:
            model = Model(self.lib, path)
        finally:
            path.unlink()
        json.loads(self.lib.ffi.string(self.lib.c.equip_model_info(model.handle)))
        refused: NativeError | None = None
        for options in ({"policy": "none", "n_ctx": rng.choice([0, 64, 512])}, self.random_policy(rng)):
            try:
                with Session(model, **options) as session:
                    self.generate(session, [i * 7 % max(1, model.n_vocab) for i in range(40)], 4)
            except NativeError as err:
                refused = err
        model.close()
        if refused:
            raise refused

    def random_policy(self, rng: random.Random) -> dict[str, object]:
        policy = rng.choice(self.policies)
        options = {"policy": policy["name"], "budget": rng.choice([0, 16, 32, 48]), "sinks": rng.choice([0, 2, 4])}
        for one, several in (("scope", "scopes"), ("positions", "positions"), ("update", "updates")):
            if rng.random() < 0.7 and policy[several]:
                options[one] = rng.choice(policy[several])
        if rng.random() < 0.5:
            options["n_ubatch"] = rng.choice([1, 7, 16, 64])
        if rng.random() < 0.3:
            options["type_k"] = options["type_v"] = rng.choice(["f32", "q8_0", "q4_0"])
        return options

    def generate(self, session: Session, tokens: list[int], n: int) -> None:
        ffi, c = self.lib.ffi, self.lib.c
        session.eval(tokens)
        out, n_out, stop = ffi.new("int32_t[]", n), ffi.new("int32_t *"), ffi.new("int *")
        self.lib.check(c.equip_session_generate(session.handle, n, out, n_out, stop))
        session.kept()
        session.stats()

    def policy(self, rng: random.Random) -> None:
        """Through the environment (libequip, or a program on llama.h), or as a session's options."""
        how, path = rng.randrange(3), rng.choice([self.text, self.window])
        if how == 0:
            model = Model(self.lib, path)
            policy = fuzz_text.policy(rng) if rng.random() < 0.7 else "none"
            with _session(model, policy, fuzz_text.options(rng)) as s:
                self.generate(s, [i * 7 % model.n_vocab for i in range(rng.choice([3, 40, 150, 400]))], 4)
            return
        text = fuzz_text.policy(rng).replace("\0", "")
        os.environ["LLAMA_KV_POLICY"] = text
        if how == 1:
            model = Model(self.lib, path)
            with _session(model, None, "") as s:
                self.generate(s, [i * 7 % model.n_vocab for i in range(rng.choice([3, 40, 150, 400]))], 4)
        else:
            Plain(self.lib.folder).decode(path, text, rng)

    def template(self, rng: random.Random) -> None:
        ffi, c = self.lib.ffi, self.lib.c
        model = Model(self.lib, self.text)
        source = fuzz_template.template(rng) if rng.random() < 0.8 else None
        texts = [fuzz_template.messages(rng), fuzz_template.tools(rng), source]
        given = [
            ffi.NULL if t is None else ffi.new("char[]", t.replace("\0", "").encode("utf-8", "replace")) for t in texts
        ]
        if c.equip_chat_render(model.handle, *given, rng.randrange(2)) == ffi.NULL:
            raise NativeError(-1, ffi.string(c.equip_error()).decode("utf-8", "replace"))

    def grammar(self, rng: random.Random) -> None:
        ffi, c = self.lib.ffi, self.lib.c
        model = Model(self.lib, self.text)
        is_schema = rng.random() < 0.4
        text = fuzz_grammar.schema_text(rng) if is_schema else fuzz_grammar.grammar(rng)
        given = ffi.new("char[]", text.replace("\0", "").encode("utf-8", "replace"))
        pair = (ffi.NULL, given) if is_schema else (given, ffi.NULL)
        with _session(model, "none", "") as session:
            self.lib.check(c.equip_session_set_sampler(session.handle, b"seed=1", *pair))
            self.generate(session, [5, 6, 7], 12)
            self.lib.check(c.equip_session_reset(session.handle))


class _session(Session):
    """A session from a policy (None: the environment's) and options as text."""

    def __init__(self, model: Model, policy: str | None, options: str) -> None:
        self.lib, self.n_vocab, self.n_done = model.lib, model.n_vocab, 0
        out = self.lib.ffi.new("equip_session **")
        if "n_threads" not in options:
            options += ("," if options else "") + "n_threads=1,n_threads_batch=1"
        given = self.lib.ffi.NULL if policy is None else policy.replace("\0", "").encode("utf-8", "replace")
        self.lib.check(self.lib.c.equip_session_create(out, model.handle, given, options.encode("utf-8", "replace")))
        self.handle = out[0]


class Plain:
    """A program on llama.h alone: the policy comes from the environment, and nothing is checked before."""

    def __init__(self, folder: Path) -> None:
        import cffi

        header = next((ROOT / "build").glob("*/llama.cpp/include/llama.h")).read_text(encoding="utf-8")
        found = dict(
            re.findall(r"struct (llama_(?:context|model)_params|llama_batch) \{(.*?)\n    \}", header, re.DOTALL)
        )
        self.ffi: Any = cffi.FFI()
        for name, body in found.items():
            body = re.sub(r"//[^\n]*", "", body)
            body = re.sub(r"enum \w+", "int", body)
            body = re.sub(
                r"(const )?(struct \w+|ggml_backend_dev_t|llama_seq_id \*|int8_t|int32_t|float|llama_\w+ ) *\*",
                "void *",
                body,
            )
            body = re.sub(r"\b(ggml|llama)\w+_callback\b(?=\s)", "void *", body)
            self.ffi.cdef(f"struct {name} {{ {body} }};".replace("llama_token  *", "void *"))
        self.ffi.cdef(
            "struct llama_model_params llama_model_default_params(void);"
            "struct llama_context_params llama_context_default_params(void);"
            "void * llama_model_load_from_file(const char *, struct llama_model_params);"
            "void * llama_init_from_model(void *, struct llama_context_params);"
            "struct llama_batch llama_batch_get_one(int32_t *, int32_t);"
            "int32_t llama_decode(void *, struct llama_batch); void llama_free(void *); void llama_model_free(void *);"
            "const char * llama_kv_policy_check(const char *); const char * llama_kv_policy_error(void);"
            "typedef void (*log_fn)(int, const char *, void *); void llama_log_set(log_fn, void *);"
            "void llama_backend_init(void);"
        )
        self.c: Any = self.ffi.dlopen(str(next(folder.glob("libllama.*"))))

    def decode(self, path: Path, text: str, rng: random.Random) -> None:
        quiet = self.ffi.callback("log_fn", lambda *_: None)
        self.c.llama_log_set(quiet, self.ffi.NULL)
        self.c.llama_kv_policy_check(text.encode("utf-8", "replace"))
        m, p = self.c.llama_model_default_params(), self.c.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = rng.choice([0, 64, 256, 512]), 512, rng.choice([16, 64, 512])
        p.n_threads = p.n_threads_batch = 1
        p.n_seq_max, p.kv_unified, p.swa_full = rng.choice([1, 1, 3]), rng.random() < 0.5, rng.random() < 0.5
        model = self.c.llama_model_load_from_file(str(path).encode(), m)
        ctx = self.c.llama_init_from_model(model, p)
        if ctx == self.ffi.NULL:
            said = self.c.llama_kv_policy_error()
            sentence = self.ffi.string(said).decode("utf-8", "replace") if said != self.ffi.NULL else "refused"
            raise NativeError(-1, " ".join(sentence.split()).rstrip("."))  # as a program on llama.h prints it
        for n in (16, 16, 1, 1, *[16] * 8, 1):  # n_batch is never smaller
            tokens = self.ffi.new("int32_t[]", [i * 7 % 256 for i in range(n)])
            if self.c.llama_decode(ctx, self.c.llama_batch_get_one(tokens, n)) != 0:
                break
        self.c.llama_free(ctx)
        self.c.llama_model_free(model)


# ---- children --------------------------------------------------------------------------------------------------------


def in_child(body: Callable[[], None], seconds: float = SECONDS) -> Outcome:
    """Run it in a child with limits; what it says on stderr is only read after a fault."""
    inlet, outlet = os.pipe()
    with tempfile.TemporaryFile() as heard:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(heard.fileno(), 1)
                os.dup2(heard.fileno(), 2)
                resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
                try:
                    body()
                    answer = {"kind": "ran", "said": ""}
                except NativeError as err:
                    message = str(err)[: str(err).rfind(" (")]
                    answer = {
                        "kind": "refused" if one_sentence(message) else "sentence",
                        "said": f"{err.status}: {message[:1000]}",
                    }
                except MemoryError as err:
                    answer = {"kind": "memory", "said": repr(err)}
                os.write(outlet, json.dumps(answer).encode())
                status = 0
            except BaseException as err:
                os.write(2, repr(err).encode())
            finally:
                os._exit(status)
        os.close(outlet)
        until, state, usage = time.monotonic() + CLOCK * seconds, -1, None
        ready, _, _ = select.select([inlet], [], [], CLOCK * seconds)
        answer = os.read(inlet, 65536) if ready else b""
        os.close(inlet)
        while True:
            done, state, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.wait4(pid, 0)
                return Outcome("hang", f"more than {CLOCK * seconds:g} s by the clock")
            time.sleep(0.002)
        heard.seek(0)
        tail = heard.read()[-2000:].decode("utf-8", "replace")
    if os.WIFSIGNALED(state) and os.WTERMSIG(state) == signal.SIGXCPU:
        return Outcome("hang", f"more than {seconds:g} s")
    if os.WIFSIGNALED(state):
        lines = [line for line in tail.splitlines() if re.search(r"GGML_ASSERT|what\(\)|\.(c|cpp|h):\d+: ", line)]
        return Outcome("signal", f"{signal.Signals(os.WTERMSIG(state)).name} {lines[0] if lines else tail[-300:]}")
    if not answer:
        return Outcome("signal", f"exit {os.waitstatus_to_exitcode(state)}: {tail[-500:]}")
    found = json.loads(answer)
    if usage.ru_maxrss * 1024 > RESIDENT:
        return Outcome("memory", f"{usage.ru_maxrss >> 10} MiB; {found['said']}")
    return Outcome(found["kind"], found["said"])


def outcomes(
    kind: str, seed: int, indices: range | list[int], cases: Cases, seconds: float = SECONDS
) -> Iterator[tuple[int, Outcome]]:
    for i in indices:
        rng = random.Random(f"{kind}:{seed}:{i}")
        yield i, in_child(lambda rng=rng: cases.run(kind, rng), seconds)


def work(kind: str, args: argparse.Namespace, job: int, out: int) -> None:
    """One of --jobs processes: every job-th case; a line per case into the pipe."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        cases = Cases(Path(folder))
        indices = [args.only] if args.only is not None else range(job, args.n, args.jobs)
        for i, found in outcomes(kind, args.seed, indices, cases, args.seconds):
            os.write(out, (json.dumps([i, found.kind, found.said[:1500]]) + "\n").encode())


def lines_of(kind: str, args: argparse.Namespace) -> Iterator[tuple[int, Outcome]]:
    inlet, outlet = os.pipe()
    children = []
    for job in range(1 if args.only is not None else args.jobs):
        pid = os.fork()
        if pid == 0:
            os.close(inlet)
            status = 1
            try:
                work(kind, args, job, outlet)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(pid)
    os.close(outlet)
    with os.fdopen(inlet, encoding="utf-8") as lines:
        for line in lines:
            i, name, said = json.loads(line)
            yield i, Outcome(name, said)
    for pid in children:
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("a worker ended early; its message stands above")


def generalised(said: str) -> str:
    """The sentence without its names and numbers, to count the kinds of refusals."""
    return re.sub(r"/\S+", "PATH", re.sub(r"-?\d[\d.e+-]*", "N", said))[:110]


def report(kind: str, args: argparse.Namespace) -> Mapping[str, int]:
    counts: Counter[str] = Counter()
    sentences: Counter[str] = Counter()
    for i, found in lines_of(kind, args):
        counts[found.kind] += 1
        if found.kind == "refused":
            sentences[generalised(found.said)] += 1
        if found.is_fault or args.only is not None or args.verbose:
            print(f"{kind} {i}: {found.kind}: {found.said}", flush=True)
            if args.keep and kind == "gguf" and found.is_fault:
                keep(args, i)
    for sentence, n in sentences.most_common(args.sentences):
        print(f"  {n:6d}  {sentence}")
    print(f"{kind}: seed {args.seed}: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()), flush=True)
    return counts


def keep(args: argparse.Namespace, i: int) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        bases, rng = fuzz_gguf.bases(Path(folder)), random.Random(f"gguf:{args.seed}:{i}")
        raw = fuzz_mutate.mutate(rng, bases[rng.choice(sorted(bases))])
        args.keep.mkdir(parents=True, exist_ok=True)
        (args.keep / f"{args.seed}-{i}.gguf").write_bytes(raw)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--n", type=int, default=1000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one case")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the GGUF of each fault there")
    parser.add_argument("--only", type=int, metavar="I", help="this case alone")
    parser.add_argument("--sentences", type=int, default=0, metavar="N", help="print the N most frequent refusals")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    args = parser.parse_args()
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a debugger takes a second per abort
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin take minutes on a busy machine
    os.environ.pop("LLAMA_KV_POLICY", None)
    faults = 0
    for kind in KINDS if args.kind == "all" else [args.kind]:
        faults += sum(n for name, n in report(kind, args).items() if name not in ("ran", "refused"))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
