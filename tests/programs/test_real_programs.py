"""Real models in the hands of programs: the command line, and llama-cpp-python on our libllama."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dropin_support import binding_environment, binding_python, clean_environment
from places import SUPPORT
from real_setup import MODELS, N_THREADS

from equip_cli.models import embedded

pytestmark = pytest.mark.timeout(3600)  # the first run may fetch the models, or set the binding up
real = pytest.mark.real
each_model = pytest.mark.parametrize("name", MODELS)

THREADS = ("-t", str(N_THREADS))

Equip = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def equip(equip_bin: Path, real_file: Callable[[str], Path]) -> Equip:
    """equip(command, model, *options, say=None): run the command on that model."""

    def run(command: str, name: str, *args: str, say: str = "") -> subprocess.CompletedProcess[str]:
        words = [str(equip_bin), command, str(real_file(name)), *args]
        env = clean_environment(NO_COLOR="1")
        return subprocess.run(words, env=env, input=say, capture_output=True, text=True, timeout=600)

    return run


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# ---- the command line ------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    ("name", "arch", "shape"), [("smollm2", "llama", (30, 9, 3, 64)), ("gemma3", "gemma3", (18, 4, 1, 256))]
)
def test_info_tells_the_shape(equip: Equip, name: str, arch: str, shape: tuple[int, ...]) -> None:
    told = answer(equip("info", name, "--json"))
    model = told["model"]
    assert model["arch"] == arch
    assert tuple(model[key] for key in ("n_layer", "n_head", "n_head_kv", "head_dim")) == shape
    assert {"streaming", "h2o"} <= set(told["supports"]["policies"])


@real
@each_model
def test_generate_goes_past_its_budget(equip: Equip, name: str) -> None:
    options = ("-n", "100", "--budget", "64", "--seed", "1", "--ignore-eos", *THREADS, "--json")
    told = answer(equip("generate", name, "-p", "The sea was calm, and the captain said", *options))
    assert told["n_gen"] == 100 and len(told["text"]) > 100
    assert told["n_used"] <= 64 and told["n_evicted"] == told["n_prompt"] + 100 - told["n_used"]


@real
@each_model
def test_chat_answers_each_turn_and_says_when_the_file_has_no_template(equip: Equip, name: str) -> None:
    done = equip("chat", name, "-n", "40", "--budget", "96", "--seed", "1", *THREADS, say="Hello!\nWhat is rain?\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 2
    assert ("has no chat template" in done.stderr) == (name == "gemma3"), done.stderr


@real
@each_model
def test_bench_measures(equip: Equip, name: str) -> None:
    options = ("-n", "4", "-d", "128", "--policy", "none,streaming,h2o", "-r", "2", "-o", "json", *THREADS)
    rows = answer(equip("bench", name, "--budget", "128", *options))
    assert {row["policy"] for row in rows} == {"none", "streaming", "h2o"}
    assert all(row["avg_ts"] > 0 for row in rows)


@real
@each_model
def test_eval_measures_a_perplexity_of_prose(equip: Equip, name: str) -> None:
    options = ("-n", "200", "--budget", "128", "--policy", "none,streaming,h2o", "--dialogues", "0", "--json", *THREADS)
    rows = answer(equip("eval", name, *options, "--no-baselines"))
    assert {row["policy"] for row in rows} == {"none", "streaming", "h2o"}
    assert all(5 < row["ppl"] < 200 for row in rows), [row["ppl"] for row in rows]


# ---- llama-cpp-python ------------------------------------------------------------------------------------------------

# prints what it generated, and what the cache keeps
COMPLETION = """
import json
import sys
sys.path.insert(0, sys.argv[3])
import llama_cpp
from dropin_scenarios import kept, stats
n = int(sys.argv[2])
llm = llama_cpp.Llama(sys.argv[1], n_ctx=32768, n_threads=int(sys.argv[4]), verbose=False)
options = {"temperature": 1.0, "seed": 1, "logit_bias": {llm.token_eos(): -100.0}}
answer = llm.create_completion(sys.stdin.read(), max_tokens=n, **options)
print(json.dumps({"answer": answer, "kept": kept(llm.ctx), "stats": stats(llm.ctx)}))
"""


@pytest.mark.parametrize(
    "policy",
    [
        "streaming:budget=256",
        pytest.param("h2o:budget=256,recent=64", marks=real),
    ],
)
def test_a_program_that_knows_no_policy_goes_past_its_budget(real_file: Callable[[str], Path], policy: str) -> None:
    n_new, words = 600, " ".join(embedded.prose().split()[:250])
    command = [str(binding_python()), "-c", COMPLETION, str(real_file("smollm2")), str(n_new)]
    command += [str(SUPPORT), str(N_THREADS)]
    done = subprocess.run(
        command, env=binding_environment(policy), input=words, capture_output=True, text=True, timeout=600
    )
    told = answer(done)
    usage, n_past = told["answer"]["usage"], told["answer"]["usage"]["prompt_tokens"] + n_new - 1
    assert usage["prompt_tokens"] > 256 and usage["completion_tokens"] == n_new
    assert told["answer"]["choices"][0]["text"].strip()
    assert (told["stats"]["n_used"], told["stats"]["n_evicted"]) == (256, n_past - 256)
    newest = 252 if policy.startswith("streaming") else 64
    assert {*range(4), *range(n_past - newest, n_past)} <= set(told["kept"])
