"""What a policy adds to the graph of a token on a device: each operation is a launch, of about two microseconds on a GPU.

On the CPU the composed form is built where the variables ask for it. The numbers are exact, so that a change shows.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from models import MODELS, Spec

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ModelFile = Callable[[Spec | str], Path]

COMPOSED = {"LLAMA_KV_SINKS": "graph", "LLAMA_KV_SCORES": "graph"}


def nodes(run_native: Run, path: Path, policy: str, *options: str) -> Counter[str]:
    found = run_native("count-nodes", path, policy, *options, **COMPOSED)
    assert found.returncode == 0, found.stderr
    return Counter(json.loads(found.stdout))


# per layer and per token, by operation; a device that adds several tensors at once has one launch for all ADD of a layer
SUMS = {"MUL_MAT": 1, "SOFT_MAX": 1, "ADD": "group"}
# where the host chooses: the sums of the new token start at zero
HOST = {"SET_ROWS": 1}
# where the device does: worth and birth of the new token; candidates, the least of them, the oldest of equals; where to, and for the books
CHOICE = {"SET_ROWS": 2, "ADD": 2, "CLAMP": 2, "SUB": 2, "ARGMAX": 2, "GET_ROWS": 1, "UNARY": 1, "SCALE": 1, "CPY": 2}
# what is older than the victims has moved up by a rank
DEBTS = {"GET_ROWS": 2, "SUB": 3, "UNARY": 2, "ADD": 3}
CASES = [
    ("streaming:budget=64,positions=true", {}, {}),
    ("streaming:budget=64,positions=cache", {}, {"ROPE": 1, "SET_ROWS": 1}),
    ("h2o:budget=64,positions=true", SUMS, CHOICE),
    ("h2o:budget=64,positions=cache", SUMS, CHOICE | DEBTS | {"ROPE": 1, "SET_ROWS": 3}),
    ("h2o:budget=64,positions=true,evict_every=2", SUMS, HOST),
    ("h2o:budget=64,positions=true,scope=layer", SUMS, CHOICE | {"ADD": "layer"}),
    ("h2o:budget=64,positions=true,scope=token", SUMS, CHOICE | {"ADD": "model"}),
    ("a2sf:budget=64,positions=true", SUMS, CHOICE | {"SCALE": 2}),
    ("tova:budget=64,positions=true,scope=head", SUMS, CHOICE | {"SCALE": 2}),
    ("vatp:budget=64,positions=true", SUMS | {"UNARY": 1, "SUM_ROWS": 1, "SET_ROWS": 1}, HOST),
    ("random:budget=64,positions=true,scope=head", {}, CHOICE),
    ("random:budget=64,positions=true,scope=head,evict_every=2", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize("fa", [1, 0])
@pytest.mark.parametrize("model", ["llama-gqa", "llama-mha-128"])
@pytest.mark.parametrize(("policy", "per_layer", "per_token"), CASES, ids=[case[0] for case in CASES])
def test_a_token_costs_a_few_launches_more_than_without_a_policy(
    run_native: Run,
    model_file: ModelFile,
    model: str,
    fa: int,
    policy: str,
    per_layer: dict[str, int | str],
    per_token: dict[str, int | str],
) -> None:
    spec, path = MODELS[model], model_file(model)
    plain = nodes(run_native, path, "none", f"fa={fa}")
    ours = nodes(run_native, path, policy, f"fa={fa}")
    # heads that decide together are added up
    sums_of = {"layer": spec.n_head_kv - 1, "model": spec.n_layer * spec.n_head_kv - 1}
    want: Counter[str] = Counter({op: 2 + sums_of[n] if isinstance(n, str) else n for op, n in per_token.items()})
    for op, n in per_layer.items():
        # without flash attention the softmax is there, and so is the product
        count = (
            spec.n_head // spec.n_head_kv
            if isinstance(n, str)
            else 0
            if op in ("MUL_MAT", "SOFT_MAX") and not fa
            else n
        )
        want[op] += spec.n_layer * count
    got = {op: ours[op] - plain[op] for op in ours if op != "nodes"}
    assert {op: n for op, n in got.items() if n} == {op: n for op, n in want.items() if n}
    assert ours["nodes"] - plain["nodes"] == sum(want.values())


def test_sinks_with_quantised_keys_are_written_layer_by_layer(run_native: Run, model_file: ModelFile) -> None:
    spec, path = MODELS["llama-gqa"], model_file("llama-gqa")
    plain = nodes(run_native, path, "none", "type_k=q8_0")
    ours = nodes(run_native, path, "streaming:budget=64,positions=cache", "type_k=q8_0")
    assert ours["SET_ROWS"] - plain["SET_ROWS"] == spec.n_layer
    # one rotation, and the Hadamard product of what it gives
    assert ours["ROPE"] - plain["ROPE"] == 1 and ours["MUL_MAT"] - plain["MUL_MAT"] == 1
