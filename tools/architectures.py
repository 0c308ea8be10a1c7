"""Write docs/architectures.md: what a bounded cache does on each architecture that upstream can make a tiny model of.

python tools/architectures.py [NAME ...] [--generator PROGRAM] [--out FILE]

NAME: only rows whose name begins with one of these, printed and not written. The models are random, so the table tells
whether rotations, positions and kept tokens are right, not how well a model answers. Each model is measured in a process
of its own: an abort or a hang becomes a cell.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import upstream_tests
from gguf_copy import finish

from equip_cli import CachePolicy, EquipError, Model, Session
from equip_cli.core import native

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "architectures.md"

Array = npt.NDArray[np.float32]

TOLERANCE = 1e-4  # of the logit range: largest difference of two updates with an f32 cache
NOISE_FACTOR = 4.0  # a difference up to this many times that of slot order alone is rounding
Q8_RATIO = 1.5  # error of inplace with q8_0 keys, in units of gather's
SHIFTED, SHIFTED_Q8 = 1e-5, 1e-2  # of the logit range: what a shift of 0 may change
BY, MOVED = 7, 2e-4  # what a shift of all cells, and of what follows, by 7 may change
BUDGET, N_UBATCH, SINKS, RECENT = 64, 32, 4, 16
N_PROMPT, N_EVICTIONS, N_SHORT = 48, 512, 150
REBASE_AT = 97  # positions, in place of 65536
SECONDS = 60.0  # for one model's cells, and for one run of shift-zero

# upstream's default of 0.1 leaves attention so even that a wrong rotation would hardly show
STDEV = "0.3"

EXACT: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "n_threads": 1, "n_threads_batch": 1}
EXACT |= {"n_ubatch": N_UBATCH, "n_batch": 4 * N_UBATCH}

CELLS = ("cache", "true", "q8_0")
COLUMNS = (
    "RoPE",
    "positions cache",
    "positions true",
    "q8_0 keys",
    "llama.cpp's own shift",
    "what positions are worth",
)

# tests/native/test_architectures.py holds the library to these
PASS_CACHE = "llama qwen2 qwen3 gemma2 gemma3 gpt-oss phi3 granite mistral3 smollm3".split()
PASS_TRUE = "qwen2vl qwen3vl qwen35 granitehybrid".split()


# ---- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A generated model with other RoPE parameters.

    base: stem of the generated file; keys: metadata without the architecture's prefix; factors: tensor name -> the
    factor of the slowest pair (the fastest one has 1, the others lie between, as in Llama 3 and LongRoPE); n_layer: with
    copies of the last one.
    """

    base: str
    keys: Mapping[str, str | int | float] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    n_layer: int | None = None


def _yarn(factor: float, n_ctx_orig: int) -> dict[str, str | int | float]:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": n_ctx_orig,
    }


def _long(n_ctx_orig: int) -> dict[str, str | int | float]:
    # llama.cpp takes the long factors where the context is longer than the original one; the files say 256
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": 1.19,
        "rope.scaling.original_context_length": n_ctx_orig,
    }


_LONG_SHORT = {"rope_factors_long.weight": 24.0, "rope_factors_short.weight": 1.5}
_LINEAR: dict[str, str | int | float] = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}

VARIANTS: dict[str, Variant] = {
    "llama + YaRN x4": Variant("llama-dense", _yarn(4.0, 128)),
    "llama + YaRN x32": Variant("llama-dense", _yarn(32.0, 128)),
    "llama + attention factor 1.19": Variant("llama-dense", {"rope.scaling.attn_factor": 1.19}),
    "llama + YaRN x32 + attention factor 1.19": Variant(
        "llama-dense", _yarn(32.0, 128) | {"rope.scaling.attn_factor": 1.19}
    ),
    "llama + linear x4": Variant("llama-dense", _LINEAR),
    "llama + Llama 3 factors": Variant("llama-dense", factors={"rope_freqs.weight": 8.0}),
    "llama + LongRoPE, long": Variant("llama-dense", _long(64), _LONG_SHORT),
    "qwen2 + YaRN x4": Variant("qwen2-dense", _yarn(4.0, 128)),
    "qwen3 + YaRN x32": Variant("qwen3-dense", _yarn(32.0, 128)),
    "chatglm + partial rotary 50%": Variant("chatglm-dense", {"rope.dimension_count": 64}),
    "chatglm + partial rotary 50% + YaRN x32": Variant(
        "chatglm-dense", _yarn(32.0, 128) | {"rope.dimension_count": 64}
    ),
    "stablelm + partial rotary 25%": Variant("stablelm-dense", {"rope.dimension_count": 32}),
    "gemma3 + partial rotary 50%": Variant(
        "gemma3-dense", {"rope.dimension_count": 64, "rope.dimension_count_swa": 64}
    ),
    "phi3 + LongRoPE, long": Variant("phi3-dense", _long(64), _LONG_SHORT),
    "phi3 + LongRoPE, short": Variant("phi3-dense", _long(4096), _LONG_SHORT),
    "phi3 + partial rotary 50% + LongRoPE, long": Variant(
        "phi3-dense", _long(64) | {"rope.dimension_count": 64}, _LONG_SHORT
    ),
    "phi3 + partial rotary 75%": Variant("phi3-dense", {"rope.dimension_count": 96}),
    "gemma3 + linear x8": Variant("gemma3-dense", _LINEAR | {"rope.scaling.factor": 8.0}),
    "gpt-oss + YaRN x32": Variant("gpt-oss-moe", _yarn(32.0, 128)),
    # the rotation of some layers is left out: smollm3's and afmoe's every fourth, smallthinker's first of four
    "smollm3 + 5 layers": Variant("smollm3-dense", n_layer=5),
    "afmoe + 5 layers": Variant("afmoe-moe", n_layer=5),
    "smallthinker + context of 16384": Variant("smallthinker-moe", {"context_length": 16384}),
    "baichuan + 32 layers": Variant("baichuan-dense", n_layer=32),
    "llama4 + context of 16384": Variant("llama4-moe", {"context_length": 16384}),
    # no scaling in their sliding-window layers
    "olmo2 + YaRN x32": Variant("olmo2-dense", _yarn(32.0, 128)),
    "mellum + YaRN x32": Variant("mellum-moe", _yarn(32.0, 128)),
    "mistral3 + YaRN x16": Variant("mistral3-dense", _yarn(16.0, 128)),
    "granite + YaRN x4": Variant("granite-dense", _yarn(4.0, 128)),
    "qwen35 + YaRN x4": Variant("qwen35-dense", _yarn(4.0, 128)),
    "deepseek2 + YaRN x32": Variant("deepseek2-moe", _yarn(32.0, 128) | {"rope.scaling.yarn_log_multiplier": 0.1}),
}


def rewrite(
    source: Path,
    target: Path,
    keys: Mapping[str, str | int | float],
    tensors: Mapping[str, Array] | None = None,
    drop: Collection[str] = (),
    n_layer: int | None = None,
) -> Path:
    """Copy a GGUF with other metadata and f32 tensors, without those in `drop`; returns `target`.

    keys: without the architecture's prefix; n_layer: more layers, copies of the file's last one.
    """
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, arch)
    given = {f"{arch}.{key}": value for key, value in keys.items()}
    n_old = int(reader.fields[f"{arch}.block_count"].contents())
    n_layer = n_layer or n_old
    given[f"{arch}.block_count"] = n_layer
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in given or entry.contents() == []:
            continue
        kind = entry.types[0]
        element = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = entry.contents()
        if isinstance(value, list) and name.startswith(f"{arch}.") and len(value) == n_old:
            value = (value * n_layer)[:n_layer]
        writer.add_key_value(name, value, kind, element)
    for name, value in given.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(name, value)  # type: ignore[operator]
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        copies = range(n_old, n_layer) if tensor.name.startswith(f"blk.{n_old - 1}.") else []
        for name in [tensor.name, *(re.sub(r"^blk\.\d+", f"blk.{il}", tensor.name) for il in copies)]:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    finish(writer)
    return target


def factors(n_pairs: int, slowest: float) -> Array:
    """Divisors of the frequencies `[n_pairs]`: 1 for the fastest half, then rising to `slowest`."""
    return np.interp(np.arange(n_pairs), [n_pairs / 2, n_pairs - 1], [1.0, slowest]).astype(np.float32)


def make_variant(variant: Variant, base: Path, target: Path) -> Path:
    """Write the variant of the model file `base`; returns `target`."""
    reader = gguf.GGUFReader(base)
    arch = reader.fields["general.architecture"].contents()

    def number(key: str) -> int:
        entry = reader.fields.get(f"{arch}.{key}")
        return 0 if entry is None else int(entry.contents())

    n_rot = int(variant.keys.get("rope.dimension_count", 0)) or number("rope.dimension_count")
    n_rot = n_rot or number("attention.key_length") or number("embedding_length") // number("attention.head_count")
    # the generator fills factors with random numbers, some of them near 0: angles that float32 does not resolve
    given = {tensor.name: 1.0 for tensor in reader.tensors if "rope_f" in tensor.name}
    slowest = variant.factors or given
    tensors = {name: factors(n_rot // 2, last) for name, last in slowest.items()}
    return rewrite(base, target, variant.keys, tensors, given.keys(), variant.n_layer)


def make_models(generator: Path, folder: Path) -> dict[str, Path]:
    """Every generated model by the stem of its file, then the variants by name."""
    command = [str(generator), "-s", "1", "-d", STDEV, "-o", str(folder)]
    subprocess.run(command, capture_output=True, check=True, cwd=folder)
    models = {path.stem: path for path in sorted(folder.glob("*.gguf"))}
    for path in models.values():
        if any("rope_f" in tensor.name for tensor in gguf.GGUFReader(path).tensors):
            make_variant(Variant(path.stem), path, folder / "new.gguf").replace(path)
    for name, variant in VARIANTS.items():
        if variant.base in models:
            file = re.sub(r"[^a-z0-9]+", "-", name.lower()) + "-variant.gguf"
            models[name] = make_variant(variant, models[variant.base], folder / file)
    # two layers are no size that baichuan's loader knows, and its graph has no RoPE then: the variant of 32 stands for it
    models.pop("baichuan-dense", None)
    return models


def build_shift_zero(headers: Path, folder: Path) -> Path:
    """Build native/tests/shift-zero.cpp against the installed libllama; headers: a llama.cpp tree."""
    cmake, ninja = upstream_tests.tool("cmake"), upstream_tests.tool("ninja")
    if cmake is None:
        raise SystemExit("cmake is missing; run: python -m pip install cmake ninja")
    options = [
        f"-DLLAMA_INCLUDE={headers / 'include'};{ROOT / 'native' / 'cache'}",
        f"-DGGML_INCLUDE={headers / 'ggml' / 'include'}",
        f"-DLLAMA_LIB_DIR={native.library_folder()}",
    ]
    options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for line in (
        ["-S", str(ROOT / "native" / "tests"), "-B", str(folder), *options],
        ["--build", str(folder), "--target", "shift-zero", "--config", "RelWithDebInfo"],
    ):
        subprocess.run([cmake, *line], check=True, stdout=subprocess.DEVNULL)
    return next(p for p in folder.rglob("shift-zero*") if p.stem == "shift-zero" and os.access(p, os.X_OK))


def environment() -> dict[str, str]:
    """No policy of the caller's, one thread, and the installed library for native programs."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "GGML_"))}
    folder = str(native.library_folder())
    path = {"darwin": "DYLD_LIBRARY_PATH", "win32": "PATH"}.get(sys.platform, "LD_LIBRARY_PATH")
    env[path] = os.pathsep.join([folder, env.get(path, "")]).rstrip(os.pathsep)
    env |= {
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1",
        "EQUIP_TEST_LIB_DIR": folder,
        "GGML_NO_BACKTRACE": "1",
    }
    return env


# ---- one model, in its own process ----------------------------------------------------------------------------------


def relative(a: Array, b: Array) -> float:
    """Largest difference in units of b's range; infinite if anything is not a number."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / max(float(b.max() - b.min()), 1e-30))


def refusal(error: EquipError) -> str:
    """The property that the library names, without the remedy."""
    text = str(error).split("\n")[0].rstrip(".")
    if found := re.search(r"this model has (.*?)(?:, so positions=|: use )", text):
        return found[1]
    return re.split(r": (?:use|drop|start) ", text)[0].replace("update=shift is not possible, ", "")


class Refused(Exception):
    """The library does not run this combination; the text is the property."""


def run(model: Model, policies: Sequence[CachePolicy], n_evictions: int, **options: Any) -> Iterator[list[Array]]:
    """Logits of each policy's session after each single token, 16 of them before the first eviction.

    Raises Refused if a session cannot be made, RuntimeError if two sessions did not keep the same tokens.
    """
    n_vocab = min(model.n_vocab, 1000)
    text = [int(t) for t in np.random.default_rng(7).integers(0, n_vocab, BUDGET + n_evictions)]
    with ExitStack() as stack:
        try:
            sessions = [stack.enter_context(Session(model, policy, **(EXACT | options))) for policy in policies]
        except EquipError as error:
            raise Refused(refusal(error)) from error
        for session in sessions:
            session.eval(text[:N_PROMPT])
        for token in text[N_PROMPT:]:
            for session in sessions:
                session.eval([token])
            yield [session.logits() for session in sessions]
        kept = [[position for position, _ in session.kept()] for session in sessions]
        if any(other != kept[0] for other in kept):
            raise RuntimeError("the updates kept other tokens")
        if len(kept[0]) != BUDGET:
            raise RuntimeError(f"{len(kept[0])} tokens were kept")


def policy(update: str, positions: str, name: str = "streaming") -> CachePolicy:
    recent = None if name == "streaming" else RECENT
    return CachePolicy(name, BUDGET, SINKS, recent, positions=positions, update=update, rotate_every=1)


def verdict(worst: float) -> str:
    return f"{'pass' if worst <= TOLERANCE else 'FAIL'} ({worst:.0e})"


def rebase_difference(model: Model) -> float:
    """What moving the whole cache to lower positions changes, where it must change nothing: positions are relative.

    The one check that needs no second implementation: it shows keys that are rotated though the model never did so.
    """
    spec = policy("inplace", "cache", "random")
    stayed = [row[0] for row in run(model, [spec], N_SHORT)]
    os.environ["LLAMA_KV_REBASE_AT"] = str(REBASE_AT)
    try:
        moved = [row[0] for row in run(model, [spec], N_SHORT)]
    finally:
        del os.environ["LLAMA_KV_REBASE_AT"]
    return max(relative(a, b) for a, b in zip(moved, stayed, strict=True))


def agreement(model: Model, positions: str, name: str, updates: Sequence[str], n_evictions: int) -> float:
    """The largest difference of the logits from those of the first update. Raises what `run` raises."""
    worst = 0.0
    for first, *others in run(model, [policy(update, positions, name) for update in updates], n_evictions):
        worst = max(worst, *(relative(other, first) for other in others))
    return worst


def why_no_shift(model: Model, **options: Any) -> dict[str, str]:
    """The library's words where it refuses update=shift; empty where it does not."""
    try:
        with Session(model, policy("shift", "cache"), **(EXACT | options)):
            return {}
    except EquipError as error:
        return {f"no shift {options.get('type_k', 'f32')}": refusal(error)}


def cell_cache(model: Model) -> dict[str, str]:
    """inplace against gather and, where the library runs it, upstream's shift; sinks that move, then every token."""
    out = why_no_shift(model)
    updates = ["inplace", "gather"] if out else ["inplace", "gather", "shift"]
    worst = agreement(model, "cache", "streaming", updates, N_EVICTIONS)
    worst = max(worst, agreement(model, "cache", "random", updates, N_SHORT))
    rebase = rebase_difference(model)
    # the control: the same kept tokens at other positions
    control = 0.0
    for first, other in run(model, [policy("inplace", rule, "random") for rule in ("cache", "true")], N_SHORT):
        control = max(control, relative(other, first))
    # random weights may make positions count for little
    limit = max(TOLERANCE / 30, min(TOLERANCE, control / 10))
    # tables of GELU in 16 bits jump at a rounding: what slot order alone does, where no key is rotated
    noise = 0.0
    if max(worst, rebase) > limit:
        noise = agreement(model, "true", "random", ["inplace", "gather"], N_EVICTIONS)
    most = max(limit, NOISE_FACTOR * noise)
    text = f"{'pass' if worst <= most else 'FAIL'} ({worst:.0e})"
    if limit < worst <= most:
        text = f"pass ({worst:.0e}; the order of the slots alone {noise:.0e})"
    if rebase > most:
        text = f"FAIL (updates {worst:.0e}, but moving all keys and positions alike changes {rebase:.0e})"
    return out | {"cache": text, "control": f"{control:.0e}"}


def cell_true(model: Model) -> str:
    """inplace against gather, where only the order of the slots differs."""
    worst = agreement(model, "true", "random", ["inplace", "gather"], N_EVICTIONS)
    if worst > TOLERANCE:
        noise = agreement(model, "true", "streaming", ["inplace", "gather"], N_EVICTIONS)
        if worst <= NOISE_FACTOR * noise:
            return f"pass ({worst:.0e}; the order of the slots alone {noise:.0e})"
    return verdict(worst)


def cell_q8(model: Model) -> dict[str, str]:
    """RMS error of q8_0 keys under inplace, in units of that under gather, both against an f32 cache."""
    exact = [row[0] for row in run(model, [policy("inplace", "cache")], N_SHORT)]
    updates = [policy("inplace", "cache"), policy("gather", "cache")]
    options = {"type_k": "q8_0", "type_v": "f16"}
    try:
        rows = list(run(model, updates, N_SHORT, **options))
    except Refused as error:
        if "cache types" not in str(error):
            raise
        # latent attention: V is a part of K
        options = {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"}
        rows = list(run(model, updates, N_SHORT, **options))
    # only steps with rotations behind them
    n = BUDGET - N_PROMPT
    errors = [
        float(np.sqrt(np.mean([(r[i] - e) ** 2 for r, e in zip(rows[n:], exact[n:], strict=True)]))) for i in (0, 1)
    ]
    ratio = errors[0] / max(errors[1], 1e-30)
    return why_no_shift(model, **options) | {"q8_0": f"{'ok' if ratio <= Q8_RATIO else 'FAIL'} ({ratio:.2f})"}


def failure(model: Model, text: str) -> str:
    """A cell for a run that ended with an error: is it the policy's?"""
    if "learned positions" in text:
        return f"refused: {text}"
    try:
        with Session(model, CachePolicy("none"), n_ctx=256, **EXACT) as session:
            session.eval(list(range(N_PROMPT)))
    except EquipError:
        return "refused: llama.cpp itself cannot run this file"
    return f"FAIL ({text})"


def measure_here(path: Path, cells: Sequence[str]) -> Iterator[dict[str, str]]:
    """Facts about the model, then one dictionary per cell; `cell` names it."""
    try:
        model = Model(path, n_gpu_layers=0)
    except EquipError as error:
        reason = str(error).replace(str(path), "the file")
        yield from ({"cell": cell, cell: f"cannot be loaded: {reason}"} for cell in cells)
        return
    with model:
        yield {"cell": "info", "arch": str(model.info["arch"]), "rope": str(model.info["rope"])}
        for cell in cells:
            try:
                if cell == "cache":
                    out = cell_cache(model)
                elif cell == "true":
                    out = {cell: cell_true(model)}
                else:
                    out = cell_q8(model)
            except Refused as error:
                out = {cell: f"refused: {error}"}
            except (EquipError, RuntimeError) as error:
                out = {cell: failure(model, str(error).rstrip("."))}
            yield {"cell": cell} | out


# ---- the parent -----------------------------------------------------------------------------------------------------


def measure(path: Path, cells: Sequence[str] = CELLS) -> dict[str, str]:
    """What `measure_here` finds, in a process with a time limit; what ends that process is the text of its cell."""
    out: dict[str, str] = {}
    left = list(cells)
    while left:
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(path), *left]
        try:
            result = subprocess.run(command, capture_output=True, timeout=SECONDS, env=environment())
            text, end = result.stdout, f"FAIL (ends with exit code {result.returncode})"
        except subprocess.TimeoutExpired as error:
            text, end = error.stdout or b"", f"FAIL (not done in {SECONDS:.0f} s)"
        for line in text.decode().splitlines():
            if not line.startswith('{"cell"'):
                continue  # of the library
            found = json.loads(line)
            left = [cell for cell in left if cell != found["cell"]]
            out |= found
        if left:
            out[left.pop(0)] = end
    return out


def shift_zero(program: Path, model: Path, *options: str) -> float | str:
    """What a shift of 0 changes, in units of the logit range; or `cannot shift`, `crashes`, ..."""
    command = [str(program), str(model), "n_ctx=256", "times=2", *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment())
    except subprocess.TimeoutExpired:
        return "hangs"
    if result.returncode == 2:
        return "cannot shift"
    if result.returncode == 1:
        return "no context"
    return float(result.stdout) if result.returncode == 0 else "crashes"


def cell_shift(program: Path, model: Path, found: Mapping[str, str]) -> str:
    """Upstream's own calls with f32 and with q8_0 keys, and whether the library refuses update=shift where it must."""

    def text(what: float | str, limit: float, kind: str) -> str:
        if isinstance(what, float) and what <= limit:
            return "right" if found.get("rope") != "none" else "right (nothing rotates)"
        said = f"wrong: a shift of 0 changes the logits by {what:.0e}" if isinstance(what, float) else what
        ran = (
            "FAIL" not in found.get(cell := "cache" if kind == "f32" else "q8_0", "FAIL")
            and "refused" not in found[cell]
        )
        if said != "cannot shift" and ran and f"no shift {kind}" not in found:
            said += ", FAIL: update=shift is not refused"
        return said

    exact = text(shift_zero(program, model, "type_k=f32", "type_v=f32"), SHIFTED, "f32")
    if exact == "right":
        moved = shift_zero(program, model, "type_k=f32", "type_v=f32", f"by={BY}")
        if isinstance(moved, str):
            return moved
        if moved > MOVED:
            exact = f"wrong: a shift of everything by {BY} changes the logits by {moved:.0e}"
            if "no shift f32" not in found and found.get("cache", "").startswith(("pass", "FAIL (updates")):
                exact += ", FAIL: update=shift is not refused"
            return exact
    q8 = shift_zero(program, model, "type_k=q8_0")
    if q8 == "no context":
        q8 = shift_zero(program, model, "type_k=q8_0", "type_v=q8_0", "fa=1")
    rounded = text(q8, SHIFTED_Q8, "q8_0")
    said = exact if exact == rounded or not exact.startswith("right") else f"{exact}; q8_0 keys {rounded}"
    if exact.startswith("right") and "no shift f32" in found:
        said += f"; update=shift refused: {found['no shift f32']}"
    return said


@dataclass
class Row:
    """One line of the table: `cells` in the order of COLUMNS."""

    name: str
    arch: str
    cells: list[str]

    @property
    def status(self) -> list[str]:
        """The cells without numbers, and without the last column, which is nothing but one."""
        return [status(cell) for cell in self.cells[:-1]]


def status(cell: str) -> str:
    """A cell without its numbers."""
    return re.sub(r"\b\d+(\.\d+)?(e[-+]\d+)?\b|\binf\b", "#", re.sub(r"; the order of.*(?=\))", "", cell))


def row_of(name: str, model: Path, program: Path) -> Row:
    """Measure one model; `program` is shift-zero."""
    found = measure(model)
    cells = [found.get("rope", ""), *(found.get(cell, "") for cell in CELLS)]
    cells += [cell_shift(program, model, found), found.get("control", "")]
    arch = found.get("arch") or str(gguf.GGUFReader(model).fields["general.architecture"].contents())
    return Row(name, arch, cells)


def collapsed(rows: Sequence[Row]) -> list[Row]:
    """One row per architecture where its files differ in numbers alone; the variants stay."""
    out: list[Row] = []
    for arch in sorted({row.arch for row in rows}):
        mine = [row for row in rows if row.arch == arch and row.name not in VARIANTS]
        if mine and all(row.status == mine[0].status for row in mine):
            mine = [Row(arch, arch, mine[0].cells)]
        out += mine + [row for row in rows if row.arch == arch and row.name in VARIANTS]
    return out


INTRODUCTION = """# Architectures

What a bounded cache does on each architecture that llama.cpp's `test-llama-archs` can make a tiny random model of, and
on variants with other RoPE parameters. Made by `python tools/architectures.py`; random weights tell whether
rotations, positions and kept tokens are right, not how well a model answers.

{counts}

Everything but the q8_0 column: f32 keys and values, flash attention off, budget {budget}, `n_ubatch` {n_ubatch},
`rotate_every` 1, tokens read one by one. Differences are in units of the range of the logits.

- *positions cache*: largest difference between the updates `inplace` and `gather` (and `shift`, where the library runs
  it) over {n} evictions of `streaming` and {short} of `random`, which must keep the same tokens; and no difference from
  moving the whole cache to lower positions, which shows keys that are rotated though the model never does so.
  `pass` is at most {tolerance:.0e}, or a tenth of *what positions are worth* where random weights make that little; a
  model whose logits move by more from the order of the slots alone (GELU tables in 16 bits) may differ by
  {noise:.0f} times that.
- *positions true*: `inplace` against `gather` under `random`, {n} evictions.
- *q8_0 keys*: RMS error of the logits under `inplace` in units of that under `gather`, both against f32 keys.
- *llama.cpp's own shift*: no policy, upstream's calls alone. A shift of 0, and one of everything by {by}, must change
  nothing. With q8_0 keys a shift of 0 may change {q8:.0e}. Where it is wrong, `update=shift` must be refused.
- *what positions are worth*: largest difference between positions `cache` and `true` with the same kept tokens.

"""


def document(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    counts = []
    for i, cell in enumerate(("positions `cache`", "positions `true`", "q8_0 keys"), 1):
        kinds = [row.cells[i] for row in rows]
        n_pass, n_fail = sum(k.startswith(("pass", "ok")) for k in kinds), sum(k.startswith("FAIL") for k in kinds)
        counts.append(f"{cell} {n_pass} pass, {n_fail} FAIL, {len(kinds) - n_pass - n_fail} refused")
    n_archs = len({row.arch for row in rows})
    n_wrong = sum("wrong" in row.cells[4] or "crashes" in row.cells[4] for row in rows)
    summary = f"{n_archs} architectures, {len(rows)} rows: {'; '.join(counts)}. llama.cpp's own shift is wrong or crashes in {n_wrong}."
    text = INTRODUCTION.format(
        counts=summary,
        budget=BUDGET,
        n_ubatch=N_UBATCH,
        n=N_EVICTIONS,
        short=N_SHORT,
        tolerance=TOLERANCE,
        noise=NOISE_FACTOR,
        by=BY,
        q8=SHIFTED_Q8,
    )
    lines = [["architecture", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *([row.name, *row.cells] for row in rows)]
    return text + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def read(text: str) -> dict[str, list[str]]:
    """Row name -> statuses, of a document."""
    out = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| architecture |")):
            name, *cells = line[2:-2].split(" | ")
            out[name] = Row(name, name, cells).status
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/architectures.md.")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--generator", type=Path, help="upstream's test-llama-archs; default: built if it is not")
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        for found in measure_here(Path(args.names[0]), args.names[1:]):
            print(json.dumps(found), flush=True)
        return 0
    generator = args.generator or Path(upstream_tests.build("tests")) / "test-llama-archs"
    with tempfile.TemporaryDirectory() as folder:
        program = build_shift_zero(generator.resolve().parents[1] / "llama.cpp", Path(folder) / "build")
        (Path(folder) / "models").mkdir()
        models = make_models(generator, Path(folder) / "models")
        chosen = {k: v for k, v in models.items() if not args.names or k.startswith(tuple(args.names))}
        rows = []
        for name, path in chosen.items():
            begin = time.perf_counter()
            rows.append(row_of(name, path, program))
            seconds = f"{time.perf_counter() - begin:.1f} s"
            print(" | ".join([name, *rows[-1].cells, seconds]), file=sys.stderr, flush=True)
    rows = collapsed(rows)
    if args.names:
        print(document(rows))
    else:
        args.out.write_text(document(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
