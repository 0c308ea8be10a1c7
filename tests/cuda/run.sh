#!/usr/bin/env bash
# Correctness and speed on an NVIDIA GPU, in one call. See README.md beside this file.
#
#   tests/cuda/run.sh              make the bundle unless it is there, build it with CUDA, run, compare, write numbers
#   tests/cuda/run.sh --bundle     make the bundle and stop: on the machine that has the network
#   tests/cuda/run.sh --dry-run    make the bundle and check that it is complete; needs no GPU and no CUDA
#
#   BUNDLE     the bundle (default: build/cuda/bundle.tar.xz; it travels alone)
#   CUDA_ARCH  as CMAKE_CUDA_ARCHITECTURES (default: 90-real, that is sm_90 machine code alone)
#   OUT        where the numbers go (default: ./out)
#   WORK       where it is unpacked and built, kept between calls (default: build/cuda)
#   JOBS       compilers at a time (default: all cores)
#   STEPS      of a run: "build check" (default), or one of them
#   PYTHON     for the bundle: one with numpy, gguf and patch-ng (default: .venv's; else an environment made in WORK)
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
    echo "run.sh: $*" >&2
    exit 1
}

mode=${1:-}
case $mode in
    "" | --bundle | --dry-run) ;;
    *) fail "usage: tests/cuda/run.sh [--bundle | --dry-run]" ;;
esac

work=${WORK:-build/cuda}
mkdir -p "$work"
work=$(cd "$work" && pwd)
bundle=${BUNDLE:-$work/bundle.tar.xz}
out=${OUT:-./out}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}

# ---- bundle -------------------------------------------------------------------------------------------------------

make_bundle() {
    local modules="import gguf, numpy, patch_ng" python=${PYTHON:-.venv/bin/python}
    if ! "$python" -c "$modules" 2> /dev/null; then
        [ -z "${PYTHON:-}" ] || fail "$PYTHON has no numpy, gguf or patch-ng"
        python=$work/venv/bin/python
        if ! "$python" -c "$modules" 2> /dev/null; then
            echo "run.sh: an environment for the bundle: $work/venv"
            python3 -m venv --without-pip "$work/venv"
            python3 -m pip --python "$python" install --quiet --disable-pip-version-check gguf numpy patch-ng pip
        fi
    fi
    "$python" tests/cuda/bundle.py "$bundle"
}

# files of the last bundle keep their time where they are the same, so that only what changed is compiled
unpack() {
    rm -rf "$work/new"
    mkdir -p "$work/new" "$work/bundle"
    tar -C "$work/new" -xJf "$bundle"
    (cd "$work/new/bundle" && find . -type f) | while read -r file; do
        if ! cmp -s "$work/new/bundle/$file" "$work/bundle/$file"; then
            mkdir -p "$(dirname "$work/bundle/$file")"
            cp "$work/new/bundle/$file" "$work/bundle/$file"
            touch "$work/bundle/$file"
        fi
    done
    (cd "$work/bundle" && find . -type f ! -path './bench/*.gguf') | while read -r file; do
        [ -e "$work/new/bundle/$file" ] || rm "$work/bundle/$file"
    done
    rm -rf "$work/new"
}

configure() { # folder, CMake arguments
    local generator=()
    ! command -v ninja > /dev/null || generator=(-G Ninja)
    cmake "${generator[@]}" -S "$work/bundle" -B "$@" > "$1.configure.log" 2>&1 || {
        tail -20 "$1.configure.log" >&2
        fail "cmake failed; its output is in $1.configure.log"
    }
    sed -n 's/^-- equip: /run.sh: /p' "$1.configure.log"
}

compile() { # folder, CMake arguments
    cmake --build "$1" -j "$jobs" "${@:2}" > "$1.build.log" 2>&1 || {
        grep -E "error|FAILED" "$1.build.log" | head -20 >&2
        fail "the build failed; its output is in $1.build.log"
    }
}

if [ "$mode" != "" ] || [ ! -e "$bundle" ]; then
    make_bundle
fi
[ "$mode" != --bundle ] || exit 0
command -v cmake > /dev/null || fail "cmake is missing; install it (Debian: apt install cmake)"
unpack

# ---- dry run ------------------------------------------------------------------------------------------------------

if [ "$mode" = --dry-run ]; then
    configure "$work/dry" -DGGML_CUDA=OFF
    compile "$work/dry" --target equip-compile-only
    echo "run.sh: our part of libllama and the programs compile"
    nvcc=${CUDACXX:-$(command -v nvcc || true)}
    if [ -z "$nvcc" ] || ! echo '#include <cublas_v2.h>' | "$nvcc" -x cu -E - > /dev/null 2>&1; then
        echo "run.sh: no nvcc with cuBLAS here: the CUDA part is not configured"
    else
        configure "$work/dry-cuda" -DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCH:-90-real}" "-DCMAKE_CUDA_COMPILER=$nvcc"
        echo "run.sh: it configures with CUDA, $("$nvcc" --version | tail -1)"
    fi
    echo "run.sh: dry run OK"
    exit 0
fi

# ---- run ----------------------------------------------------------------------------------------------------------

mkdir -p "$out"
nvcc=${CUDACXX:-$(command -v nvcc || true)}
[ -n "$nvcc" ] || nvcc=$(ls /usr/local/cuda/bin/nvcc 2> /dev/null) || fail "nvcc was not found; set CUDACXX"
steps=${STEPS:-build check}
if [[ $steps == *build* ]]; then
    start=$SECONDS
    configure "$work/build" -DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCH:-90-real}" "-DCMAKE_CUDA_COMPILER=$nvcc"
    compile "$work/build"
    {
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
        "$nvcc" --version | tail -2
        echo "CUDA_ARCH=${CUDA_ARCH:-90-real}, built in $((SECONDS - start)) s with $jobs jobs on $(nproc) cores"
    } > "$out/machine.txt"
    cat "$out/machine.txt"
fi
if [[ $steps == *check* ]]; then
    PYTHONUNBUFFERED=1 python3 "$work/bundle/check.py" "$work/bundle" "$work/build/bin" "$out"
fi
