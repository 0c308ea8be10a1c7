"""What a policy adds to the graph of a token on a device: each operation is a launch, of about two microseconds on a GPU.

On the CPU the composed form is built where the variables ask for it. The numbers are exact, so that a change shows.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from models import MODELS, Spec

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ModelFile = Callable[[Spec | str], Path]

COMPOSED = {"LLAMA_KV_SINKS": "graph", "LLAMA_KV_SCORES": "graph"}


def nodes(run_native: Run, path: Path, policy: str, *options: str, **variables: str) -> Counter[str]:
    found = run_native("count-nodes", path, policy, *options, **{**COMPOSED, **variables})
    assert found.returncode == 0, found.stderr
    return Counter(json.loads(found.stdout))


def fusable(run_native: Run, path: Path, policy: str, **variables: str) -> int:
    """Keys that CUDA and Vulkan rotate and write in one launch."""
    return nodes(run_native, path, policy, "fa=1", **variables)["fusable"]


Counts = Mapping[str, int | str]

# by operation, in each layer and for the token; a device that adds several tensors at once has one launch for a group's ADD
# beside flash attention the queries of the layers are kept, and weighed in all of them at once
SUMS: tuple[Counts, Counts] = ({"CPY": 1}, {"MUL_MAT": 1, "SOFT_MAX": 1, "ADD": "group"})
# one layer after the other: keys are quantised, or the softmax is there and only the heads of a group are added
ALONE: Counts = {"MUL_MAT": 1, "SOFT_MAX": 1, "ADD": "group"}
THERE: Counts = {"ADD": "group"}
# where the host chooses: the sums of the new token start at zero
HOST: Counts = {"SET_ROWS": 1}
# where the device does: worth and birth of the new token; candidates, the least of them, the oldest of equals; where to, and for the books
CHOICE: dict[str, int | str] = {
    "SET_ROWS": 2,
    "ADD": 2,
    "CLAMP": 2,
    "SUB": 2,
    "ARGMAX": 2,
    "GET_ROWS": 1,
    "UNARY": 1,
    "SCALE": 1,
    "CPY": 2,
}
# what is older than the victims has moved up by a rank
DEBTS: dict[str, int | str] = {"GET_ROWS": 2, "SUB": 3, "UNARY": 2, "ADD": 3}
CASES = [
    ("streaming:budget=64,positions=true", False, {}, {}),
    ("streaming:budget=64,positions=cache", False, {}, {"ROPE": 1, "SET_ROWS": 1}),
    ("h2o:budget=64,positions=true", True, {}, CHOICE),
    ("h2o:budget=64,positions=cache", True, {}, CHOICE | DEBTS | {"ROPE": 1, "SET_ROWS": 3}),
    ("h2o:budget=64,positions=true,evict_every=2", True, {}, HOST),
    ("h2o:budget=64,positions=true,scope=layer", True, {}, CHOICE | {"ADD": "layer"}),
    ("h2o:budget=64,positions=true,scope=token", True, {}, CHOICE | {"ADD": "model"}),
    ("a2sf:budget=64,positions=true", True, {}, CHOICE | {"SCALE": 2}),
    ("tova:budget=64,positions=true,scope=head", True, {}, CHOICE | {"SCALE": 2}),
    ("vatp:budget=64,positions=true", True, {"UNARY": 1, "SUM_ROWS": 1, "SET_ROWS": 1}, CHOICE | {"MUL": 1}),
    ("vatp:budget=64,positions=true,evict_every=2", True, {"UNARY": 1, "SUM_ROWS": 1, "SET_ROWS": 1}, HOST),
    ("knorm:budget=64,positions=true", False, {"SQR": 1, "SUM_ROWS": 1, "SQRT": 1, "SET_ROWS": 1}, CHOICE | {"ADD": 3, "SUB": 1}),
    ("random:budget=64,positions=true,scope=head", False, {}, CHOICE),
    ("random:budget=64,positions=true,scope=head,evict_every=2", False, {}, {}),
]  # fmt: skip


def counted(spec: Spec, per_layer: Counts, per_token: Counts) -> Counter[str]:
    # query heads of a group, and heads that decide together, are added up
    named = {
        "group": spec.n_head // spec.n_head_kv,
        "layer": 2 + spec.n_head_kv - 1,
        "model": 2 + spec.n_layer * spec.n_head_kv - 1,
    }
    want: Counter[str] = Counter()
    for times, counts in ((spec.n_layer, per_layer), (1, per_token)):
        for op, n in counts.items():
            want[op] += times * (named[n] if isinstance(n, str) else n)
    return want


def added(run_native: Run, path: Path, policy: str, *options: str, **variables: str) -> dict[str, int]:
    """What the policy adds to the operations of `none`."""
    plain, ours = nodes(run_native, path, "none", *options), nodes(run_native, path, policy, *options, **variables)
    for counted in (plain, ours):
        del counted["fusable"]
    assert ours["nodes"] - plain["nodes"] == sum(ours[op] - plain[op] for op in {*ours, *plain} - {"nodes"})
    return {op: ours[op] - plain[op] for op in ours if op != "nodes" and ours[op] != plain[op]}


@pytest.mark.parametrize("fa", [1, 0])
@pytest.mark.parametrize("model", ["llama-gqa", "llama-mha-128"])
@pytest.mark.parametrize(("policy", "reads_weights", "per_layer", "per_token"), CASES, ids=[case[0] for case in CASES])
def test_a_token_costs_a_few_launches_more_than_without_a_policy(
    run_native: Run,
    model_file: ModelFile,
    model: str,
    fa: int,
    policy: str,
    reads_weights: bool,
    per_layer: Counts,
    per_token: Counts,
) -> None:
    spec = MODELS[model]
    want = counted(spec, per_layer, per_token)
    if reads_weights:
        want += counted(spec, *SUMS) if fa else counted(spec, THERE, {})
    assert added(run_native, model_file(model), policy, f"fa={fa}") == dict(want)


def test_quantised_keys_are_weighed_and_rotated_layer_by_layer(run_native: Run, model_file: ModelFile) -> None:
    spec, path = MODELS["llama-gqa"], model_file("llama-gqa")
    # sinks: one rotation for all layers, and the Hadamard product of what it gives
    sinks = counted(spec, {"SET_ROWS": 1}, {"ROPE": 1, "MUL_MAT": 1})
    assert added(run_native, path, "streaming:budget=64,positions=cache", "type_k=q8_0") == dict(sinks)
    sums = counted(spec, ALONE, CHOICE)
    assert added(run_native, path, "h2o:budget=64,positions=true", "type_k=q8_0") == dict(sums)


def test_many_heads_that_decide_together_find_room_in_the_graph(run_native: Run, model_file: ModelFile) -> None:
    """The worth of each is a product, which is added to that of the others."""
    many = Spec(n_head=96, n_head_kv=96, head_dim=32, n_embd=64, seed=21)
    policy = "vatp:budget=64,positions=cache,scope=layer"
    assert added(run_native, model_file(many), policy)["MUL"] == many.n_head_kv


def test_layers_that_do_not_attend_alike_are_weighed_one_by_one(run_native: Run, model_file: ModelFile) -> None:
    """gpt-oss has attention sinks of its own in each layer."""
    spec = MODELS["gpt-oss"]
    bounded = dataclasses.replace(spec, n_layer=sum(not spec.is_swa(il) for il in range(spec.n_layer)))
    want = counted(bounded, ALONE, CHOICE)
    assert added(run_native, model_file("gpt-oss"), "h2o:budget=64,positions=true") == dict(want)


# where the device has kernels of ours: a node for up to eight layers' weights (four with attention sinks), and one for the choice
KERNELS = [
    ("h2o:budget=64,positions=true", 1, {"SET_ROWS": 1, "ADD": 1}),
    ("h2o:budget=64,positions=true,scope=token", 1, {"SET_ROWS": 1, "ADD": 1}),
    ("h2o:budget=64,positions=cache", 1, {"SET_ROWS": 2, "ROPE": 1, "GET_ROWS": 1, "SUB": 1, "UNARY": 1, "ADD": 2}),
    ("a2sf:budget=64,positions=true", 1, {"SET_ROWS": 1, "SCALE": 1, "ADD": 1}),
    ("vatp:budget=64,positions=true,scope=layer", 1, {"SET_ROWS": 1, "ADD": 1}),
    ("random:budget=64,positions=true,scope=head", 1, {"SET_ROWS": 1}),
]


@pytest.mark.parametrize("model", ["llama-gqa", "llama-mha-128", "gpt-oss"])
@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
@pytest.mark.parametrize(("policy", "n_choices", "others"), KERNELS, ids=[case[0] for case in KERNELS])
def test_kernels_of_ours_take_the_place_of_most_launches(
    run_native: Run, model_file: ModelFile, model: str, type_k: str, policy: str, n_choices: int, others: Counts
) -> None:
    spec = MODELS[model]
    n_layer = sum(not spec.is_swa(il) for il in range(spec.n_layer))
    n_nodes = -(-n_layer // (4 if model == "gpt-oss" else 8)) * (not policy.startswith("random")) + n_choices
    got = added(run_native, model_file(model), policy, "fa=1", f"type_k={type_k}", LLAMA_KV_SCORES="node")
    assert got.pop("CUSTOM") == n_nodes
    if policy.startswith("vatp"):  # norms of the values
        assert got.pop("UNARY") == got.pop("SUM_ROWS") == n_layer
        assert got == {**others, "SET_ROWS": n_layer + 1}
    else:
        # each layer's sinks are written, and the product with a Hadamard matrix
        if "cache" in policy and type_k == "q8_0":
            others = {**others, "SET_ROWS": n_layer + 1, "MUL_MAT": 1}
        assert got == others


# the first layer has the view of its index in between; for those behind it there is a place before
AT_ONCE = [
    ("streaming:budget=64,positions=true", "graph", 0),
    ("h2o:budget=64,positions=true,scope=layer", "node", 1),
    ("h2o:budget=64,positions=true,scope=token", "node", 1),
    ("random:budget=64,positions=true,scope=layer", "node", 1),
    ("random:budget=64,positions=true,scope=token", "node", 0),  # written as upstream does
    ("h2o:budget=64,positions=true,scope=layer,evict_every=2", "graph", 1),
    ("vatp:budget=64,positions=true,scope=layer", "node", 1),
    ("knorm:budget=64,positions=true,scope=layer", "node", 1),
    ("pagedeviction:budget=64,positions=true,scope=layer", "graph", 1),
    ("h2o:budget=64,positions=true,scope=token,evict_every=2", "graph", 0),
]


@pytest.mark.parametrize(("policy", "form", "n_apart"), AT_ONCE, ids=[case[0] for case in AT_ONCE])
def test_keys_are_rotated_and_written_at_once_where_a_layer_has_one_slot_for_a_token(
    run_native: Run, model_file: ModelFile, policy: str, form: str, n_apart: int
) -> None:
    path, n_layer = model_file("llama-mha"), MODELS["llama-mha"].n_layer
    assert fusable(run_native, path, "none") == n_layer
    assert fusable(run_native, path, policy, LLAMA_KV_SCORES=form) == n_layer - n_apart
