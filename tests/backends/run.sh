#!/usr/bin/env bash
# The core tests on a backend that is not the CPU, all layers offloaded. See README.md beside this file.
#
#   tests/backends/run.sh vulkan|rpc [build | pytest arguments...]
#
#   build          build only
#   PYTHON         a Python with the packages of `python3 install.py --with test` (default: .venv/bin/python, else python3)
#   EQUIP_JOBS     compilers at a time (default: all cores)
#   EQUIP_CACHE_DIR  where the builds are kept, below backends/
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD

fail() {
    echo "run.sh: $*" >&2
    exit 1
}

backend=${1:-}
case $backend in
    vulkan | rpc) shift ;;
    *) fail "usage: tests/backends/run.sh vulkan|rpc [build | pytest arguments...]" ;;
esac

python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
python=$(command -v "$python") || fail "there is no ${PYTHON:-python3}"
"$python" -c 'import cffi, gguf, hypothesis, numpy, patch_ng, pytest' ||
    fail "the test dependencies are missing; run: python3 install.py --with test"

# cmake and ninja may be packages of an environment that is not active
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
command -v cmake > /dev/null || fail "cmake is missing; run: $python -m pip install cmake ninja"

# ---- what the build needs -----------------------------------------------------------------------------------------

headers=/usr/include/vulkan/vulkan_core.h
packages="libvulkan-dev glslc spirv-headers mesa-vulkan-drivers"
if [ "$backend" = vulkan ]; then
    command -v glslc > /dev/null || fail "glslc is missing; Debian: apt install $packages"
    if [ -n "${VULKAN_SDK:-}" ]; then
        headers=$VULKAN_SDK/include/vulkan/vulkan_core.h
    fi
    [ -e "$headers" ] || fail "$headers is missing; Debian: apt install $packages"
fi

# ---- source -------------------------------------------------------------------------------------------------------

cache=$("$python" -c "import sys; sys.path.insert(0, 'native/cmake'); import upstream; print(upstream.cache_dir())")
folder=$cache/backends/$backend
source=$folder/source
mkdir -p "$folder"
"$python" native/cmake/upstream.py --no-patches --out "$source"

# The Vulkan headers of Debian 12 are older than VK_EXT_layer_settings, which ggml fills in for its validation build
# only. The copy that is built here does without; nothing else of it changes.
if [ "$backend" = vulkan ] && ! grep -q VK_EXT_layer_settings "$headers"; then
    "$python" - "$source/ggml/src/ggml-vulkan/ggml-vulkan.cpp" << 'PATCH'
import re
import sys
from pathlib import Path

path = Path(sys.argv[1])
text = path.read_text(encoding="utf-8")
if "LayerSettingsCreateInfoEXT" in text:
    text, n = re.subn(
        r"    VkBool32 enable_best_practice = layer_settings;\n.*?    vk::LayerSettingsCreateInfoEXT [^\n]*\n",
        "",
        text,
        flags=re.DOTALL,
    )
    text, m = re.subn(r"layers, extensions, &layer_setting_info\);", "layers, extensions);", text)
    if (n, m) != (1, 1) or "LayerSetting" in text:
        sys.exit(f"run.sh: the place of VK_EXT_layer_settings in {path} has changed; correct tests/backends/run.sh")
    path.write_text(text, encoding="utf-8")
PATCH
fi

# ---- build --------------------------------------------------------------------------------------------------------

option=GGML_$(echo "$backend" | tr '[:lower:]' '[:upper:]')
generator=()
command -v ninja > /dev/null && generator=(-G Ninja)
EQUIP_LLAMA_CPP_SOURCE=$source cmake "${generator[@]}" -S native -B "$folder/build" "-D$option=ON" -DCMAKE_BUILD_TYPE=Release \
    "-DPython3_EXECUTABLE=$python" > "$folder/configure.log" 2>&1 || {
    tail -20 "$folder/configure.log" >&2
    fail "cmake failed; its output is in $folder/configure.log"
}
start=$SECONDS
EQUIP_LLAMA_CPP_SOURCE=$source cmake --build "$folder/build" -j "${EQUIP_JOBS:-$(getconf _NPROCESSORS_ONLN)}" \
    --target equip equip-libraries > "$folder/build.log" 2>&1 || {
    tail -20 "$folder/build.log" >&2
    fail "the build failed; its output is in $folder/build.log"
}
echo "run.sh: built in $((SECONDS - start)) s: $folder/build/bin"
[ "${1:-}" != build ] || exit 0

# ---- test ---------------------------------------------------------------------------------------------------------

export EQUIP_TEST_BACKEND=$backend EQUIP_LIB_PATH=$folder/build/bin PYTHONPATH=$root/tests/backends:$root/tests/native
unset LLAMA_KV_POLICY EQUIP_TEST_NGL
if [ "$backend" = vulkan ]; then
    # the first device, also where it is the processor: ggml leaves software drivers out unless they are named
    export GGML_VK_VISIBLE_DEVICES=${GGML_VK_VISIBLE_DEVICES:-0}
else
    # a server serves one client at a time: one for the tests' own process, one for the programs that it starts
    servers=()
    trap 'kill "${servers[@]}" 2> /dev/null || true' EXIT
    for variable in EQUIP_TEST_RPC_HERE EQUIP_TEST_RPC; do
        port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
        "$python" tests/backends/rpc.py "$folder/build/bin" "127.0.0.1:$port" > "$folder/$variable.log" 2>&1 &
        servers+=($!)
        "$python" - "$port" << 'WAIT' || fail "the RPC server did not start; its output is in $folder/$variable.log"
import socket
import sys
import time

for _ in range(100):
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1]))).close()
        break
    except OSError:
        time.sleep(0.1)
else:
    sys.exit(1)
WAIT
        export "$variable=127.0.0.1:$port"
    done
fi

"$python" -m pytest -o cache_dir="$folder/pytest" --timeout 3600 --durations 5 -s tests/backends/core.py "$@"
