"""Pack what tests/cuda needs on a machine without a network: sources, tiny models, the oracle's logits, benchmark models.

    python tests/cuda/bundle.py OUT.tar.xz

Needs numpy, gguf and patch-ng, and the pinned llama.cpp (cached, or fetched as native/cmake/upstream.py does). The
benchmark models have the shape of real ones, q4_0, with one block of random weights repeated: a recipe of a megabyte.
The oracle's logits travel along, so that the machine with the GPU needs Python and no packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "native" / "cmake"), str(ROOT / "tests" / "support")]

import upstream  # noqa: E402
from models import MODELS, write  # noqa: E402
from oracle import Oracle  # noqa: E402

LIMIT = 64 << 20  # bytes

# of llama.cpp; the other backends' folders are left out
TAKE = re.compile(
    r"CMakeLists\.txt|LICENSE|cmake/.*|include/.*|src/.*|ggml/(CMakeLists\.txt|cmake/.*|include/.*)"
    r"|ggml/src/([^/]+|ggml-(cpu|cuda)/.*)"
)


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    type_k: str
    type_v: str
    fa: int
    positions: str
    budget: int = 64
    n_ubatch: int = 32
    sinks: int = 4

    @property
    def name(self) -> str:
        return f"{self.model}-{self.type_k}-{self.type_v}-fa{self.fa}-{self.positions}"

    @property
    def chunks(self) -> list[int]:
        """A prompt past the budget, single tokens, a chunk in mid-stream, single tokens."""
        u = self.n_ubatch
        return [*[u] * (self.budget // u + 1), 7, *[1] * 190, u, u // 2, *[1] * 60]


CASES = [
    Case("llama-gqa", "f32", "f32", 0, "cache"),
    Case("llama-gqa", "f32", "f32", 0, "true"),
    Case("llama-gqa", "f16", "f16", 1, "cache"),
    Case("llama-gqa", "q8_0", "q8_0", 1, "cache"),
    Case("llama-mha-128", "f16", "f16", 0, "cache"),
    Case("llama-mha-128", "q4_0", "q4_0", 1, "cache"),
    Case("qwen2-gqa", "f32", "f32", 0, "cache"),
    Case("qwen2-gqa", "f16", "f16", 1, "true"),
    Case("qwen2-gqa", "q8_0", "f16", 0, "cache"),
    Case("gemma3", "f16", "f16", 0, "cache"),
    Case("gemma3", "f16", "f16", 1, "cache"),
    Case("gpt-oss", "f16", "f16", 1, "cache"),
]

# layers, d_model, heads, kv heads, ffn, vocabulary; head_dim 64
SHAPES = {"smollm-135m": (30, 576, 9, 3, 1536, 49152), "llama-3.2-1b": (16, 2048, 32, 8, 8192, 128256)}


def sources(to: Path) -> None:
    """The patched tree without what a CUDA build does not read, our sources, and the scripts of the other machine."""
    with tempfile.TemporaryDirectory(dir=to.parent) as tmp:
        tree = Path(tmp) / "llama.cpp"
        given = os.environ.get("EQUIP_LLAMA_CPP_SOURCE")
        series = upstream.series(upstream.PATCHES)
        upstream.prepare(tree, upstream.load_pin(), series, Path(given).resolve() if given else None)
        for path in sorted(p for p in tree.rglob("*") if p.is_file()):
            name = path.relative_to(tree).as_posix()
            if TAKE.fullmatch(name):
                target = to / "llama.cpp" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    (to / "llama.cpp" / "vendor").mkdir()
    (to / "llama.cpp" / "vendor" / "CMakeLists.txt").write_text("# libllama needs nothing of this folder\n")
    sources = ["native/cache/*", "native/policies/*", "native/ggml/*.*", "native/ggml/cuda/*", "native/ggml/gcc/*"]
    sources += ["native/cmake/processor.cmake", "native/cmake/cuda.cmake"]
    for pattern in (*sources, "native/tests/*.cpp", "native/tests/*.h"):
        for path in sorted(ROOT.glob(pattern)):
            target = to / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for name in ("CMakeLists.txt", "check.py"):
        shutil.copyfile(ROOT / "tests" / "cuda" / name, to / name)


def missing_includes(folder: Path) -> list[str]:
    """Quoted includes that the bundle cannot resolve: what a build with nvcc would stumble over."""
    tree = folder / "llama.cpp"
    roots = [tree / "include", tree / "src", tree / "ggml/include", tree / "ggml/src", tree / "ggml/src/ggml-cpu"]
    roots += [tree / "ggml/src/ggml-cuda", folder / "native/cache", folder / "native/ggml"]
    roots += [folder / "native/ggml/cuda"]
    wanted = [*(tree / "ggml/src/ggml-cuda").rglob("*"), *(tree / "src").rglob("*"), *(folder / "native").rglob("*")]
    # headers of vendors, behind their #ifdef, and one that CMake makes
    foreign = re.compile(r"vendors/|hip/|mudnn|rocwmma|musa|nccl|rccl|cub/|kleidiai|llama-version\.h")
    missing = []
    for path in (p for p in wanted if p.suffix in (".cu", ".cuh", ".cpp", ".c", ".h")):
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            if not foreign.search(name) and not any((base / name).is_file() for base in (path.parent, *roots)):
                missing.append(f"{path.relative_to(folder)}: {name}")
    return missing


def cases(to: Path) -> None:
    """Models, tokens and the float64 oracle's logits, as raw files, and cases.json, which names them."""
    to.mkdir()
    listed = []
    for case in CASES:
        spec = MODELS[case.model]
        model = to / f"{case.model}.gguf"
        if not model.is_file():
            write(spec, model)
        text = np.random.default_rng(len(case.model)).integers(0, spec.n_vocab, sum(case.chunks))
        tokens = to / f"{case.model}.tokens"
        text.astype(np.int32).tofile(tokens)
        entry = dataclasses.asdict(case) | {"name": case.name, "chunks": case.chunks, "n_vocab": spec.n_vocab}
        for positions in ("true", case.positions):
            oracle = Oracle(spec, budget=case.budget, sinks=case.sinks, positions=positions)
            want, pos, full = [], 0, []
            for n in case.chunks:
                full.append(int(n == 1 and len(oracle.kept) == case.budget))
                want.append(oracle.chunk([int(t) for t in text[pos : pos + n]]))
                pos += n
            file = to / f"{case.model}-{positions}.logits"
            np.array(want, dtype=np.float32).tofile(file)
            entry |= {"full": full, f"want_{positions}": file.name}
        listed.append(entry | {"model_file": model.name, "tokens": tokens.name})
    (to / "cases.json").write_text(json.dumps(listed), encoding="utf-8")


def bench_model(name: str, folder: Path) -> None:
    """A llama of that shape, q4_0, as a recipe: check.py writes the file. Matrices repeat 256 random quantised rows."""
    n_layer, d, n_head, n_head_kv, n_ff, n_vocab = SHAPES[name]
    kind, norm = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32
    rng = np.random.default_rng(0)
    blocks = {
        f"{name}-{cols}.block": gguf.quants.quantize(rng.normal(0, cols**-0.5, (256, cols)).astype(np.float32), kind)
        for cols in (d, n_ff)
    }
    blocks[f"{name}-ones.block"] = np.ones((1, d), np.float32)
    w = gguf.GGUFWriter(str(folder / f"{name}.header"), "llama")
    w.add_tokenizer_model("no_vocab")
    w.add_name(f"bench-{name}")
    w.add_context_length(131072)
    w.add_embedding_length(d)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    w.add_key_length(64)
    w.add_value_length(64)
    w.add_vocab_size(n_vocab)
    w.add_rope_dimension_count(64)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-5)
    recipe: list[tuple[str, int]] = []  # (block, bytes) of each tensor, in order

    def add(tensor: str, rows: int, cols: int) -> None:
        block = f"{name}-{cols if rows else 'ones'}.block"
        row_bytes = blocks[block].nbytes // len(blocks[block])
        if rows:
            w.add_tensor_info(tensor, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=kind)
        else:
            w.add_tensor_info(tensor, (cols,), np.dtype(np.float32), row_bytes, raw_dtype=norm)
        recipe.append((block, max(1, rows) * row_bytes))

    add("token_embd.weight", n_vocab, d)
    add("output_norm.weight", 0, d)
    for il in range(n_layer):
        p = f"blk.{il}."
        add(p + "attn_norm.weight", 0, d)
        add(p + "ffn_norm.weight", 0, d)
        add(p + "attn_q.weight", n_head * 64, d)
        add(p + "attn_k.weight", n_head_kv * 64, d)
        add(p + "attn_v.weight", n_head_kv * 64, d)
        add(p + "attn_output.weight", d, n_head * 64)
        add(p + "ffn_gate.weight", n_ff, d)
        add(p + "ffn_up.weight", n_ff, d)
        add(p + "ffn_down.weight", d, n_ff)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    for block, data in blocks.items():
        (folder / block).write_bytes(data.tobytes())
    (folder / f"{name}.json").write_text(
        json.dumps({"alignment": w.data_alignment, "tensors": recipe}), encoding="utf-8"
    )


def files(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        yield path, f"bundle/{path.relative_to(folder).as_posix()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Pack what tests/cuda needs on a machine without a network.")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as tmp:
        folder = Path(tmp) / "bundle"
        folder.mkdir()
        try:
            sources(folder)
        except upstream.UpstreamError as error:
            print(f"bundle.py: {error}", file=sys.stderr)
            return 1
        if missing := missing_includes(folder):
            print("bundle.py: the bundle lacks headers; correct TAKE:\n" + "\n".join(missing), file=sys.stderr)
            return 1
        cases(folder / "cases")
        (folder / "bench").mkdir()
        for name in SHAPES:
            bench_model(name, folder / "bench")
        part = args.out.with_suffix(".part")
        with tarfile.open(part, "w:xz") as archive:
            for path, name in files(folder):
                archive.add(path, name)
        size = part.stat().st_size
        if size > LIMIT:
            print(f"bundle.py: the bundle has {size >> 20} MiB, more than {LIMIT >> 20}; drop a model", file=sys.stderr)
            return 1
        part.replace(args.out)
    print(f"bundle.py: {args.out}, {size / (1 << 20):.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
