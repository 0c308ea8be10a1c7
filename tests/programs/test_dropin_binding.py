"""llama-cpp-python, installed without a build of its own, on our libllama: bounded by LLAMA_KV_POLICY and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dropin_support import (
    BUDGET,
    N_CTX,
    Outcome,
    binding_environment,
    binding_python,
    kv_bytes,
    run_scenario,
    serve,
    spec,
)
from dropin_text import say
from models import Spec

pytestmark = pytest.mark.timeout(900)  # the first run sets the binding up

MALFORMED = {  # value: what the sentence must name
    "nonsense:budget=256": "'nonsense'",
    "streaming budget=256": "'streaming budget=256'",
    "streaming:budgt=256": "'budgt'",
    "streaming:budget": "'budget'",
    "streaming:budget=256,": "''",
    "streaming:budget=": "''",
    "streaming:budget=abc": "'abc'",
    "streaming:budget=256x": "'256x'",
    "streaming:budget=-1": "budget is -1",
    "streaming:budget=1099511627776": "budget is 1099511627776",
    "streaming:budget=5,sinks=4": "budget=6 or more",
    "streaming:budget=256,sinks=255": "budget=257 or more",
    "streaming:budget=256,recent=16": "recent",
    "streaming:budget=256,budget=512": "twice",
    "streaming:budget=256,positions=rank": "no positions 'rank'",
    "streaming:budget=256,rotate_every=0": "rotate_every is 0",
    "streaming:budget=256,update=shift": "use update=inplace",  # its calls are the caller's
    "random:budget=256,recent=252": "budget=257 or more",
    "none:budget=256": "none",
    "h2o:budget=256,scope=row": "no scope 'row'",
    "h2o:budget=256,score_queries=0": "score_queries is 0",
    "h2o:budget=256,evict_every=0": "evict_every is 0",
    "h2o:budget=256,page_size=16": "not pages",
    "h2o:budget=256,update=shift": "no update 'shift'",
    "h2o:budget=256,filter=0.95": "filter is 0.95",
    "h2o:budget=256,filter=0.2,scope=token": "use scope=layer or scope=head",
    "knorm:budget=256,score_queries=8": "no attention weights",
    "streaming:budget=256,evict_every=2": "evict_every",
    "pagedeviction:budget=250": "no multiple",
    "pagedeviction:budget=48,recent=16": "too small for pages",
    "rkv:budget=256,scope=token": "no scope 'token'",
}


@pytest.fixture(scope="module")
def shape(upstream_file: Callable[[str], Path]) -> Spec:
    return spec(upstream_file)


@pytest.fixture(scope="module")
def model(model_file: Callable[[Spec | str], Path], shape: Spec) -> Path:
    return model_file(shape)


@pytest.fixture(scope="module", params=[False, True], ids=["fa-off", "fa-on"])
def life(request: pytest.FixtureRequest, model: Path) -> dict[str, Any]:
    """One object: 2,000 tokens in one call, a chat that continues, its first message edited."""
    return run_scenario("long_life", model, flash_attn=request.param).result


# ---- one long call ---------------------------------------------------------------------------------------------------


def test_one_call_stays_within_the_budget(life: dict[str, Any]) -> None:
    assert (life["finish_reason"], life["n_gen"]) == ("length", 2000)
    n = life["n_prompt"] + 1999  # the last token is sampled, not evaluated
    assert life["kept"] == [*range(4), *range(n - BUDGET + 4, n)]
    assert life["stats"] == {
        "n_evicted": n - BUDGET,
        "n_used": BUDGET,
        "n_slots": 768,  # budget + n_ubatch of 512, rounded up to 256
        "budget": BUDGET,
        "n_protect": 4,
    }


def test_memory_grows_neither_with_n_ctx_nor_with_the_text(life: dict[str, Any], shape: Spec) -> None:
    growth = {int(n): at for n, at in life["rss_growth"].items()}
    assert set(growth) == {500, 1000, 1500, 2000}
    if not any(growth.values()):
        pytest.skip("this system does not say how much memory a process uses")
    assert growth[2000] - growth[500] < 4 << 20
    assert growth[2000] < N_CTX * kv_bytes(shape) / 2  # upstream allocates and clears all of it


# ---- chats on the same object, after evictions -----------------------------------------------------------------------


def test_a_new_chat_is_answered_from_its_own_text(life: dict[str, Any]) -> None:
    assert life["other"]["n_before"] > 2000
    assert life["other"]["n_read"] == life["other"]["n_prompt"]
    assert life["other"]["text"] == life["other_fresh"]["text"]


def test_a_continued_chat_is_not_read_again(life: dict[str, Any]) -> None:
    assert life["evicted_in_chat"] > 2 * BUDGET
    for turn in life["turns"]:
        # all but the last sampled token of the turn before was evaluated then
        assert turn["n_read"] == turn["n_prompt"] - turn["n_before"]
    assert life["unedited"]["n_read"] == life["unedited"]["n_prompt"] - life["unedited"]["n_before"]


def test_an_edited_first_message_is_read_again(life: dict[str, Any]) -> None:
    assert life["edited"]["n_read"] == life["edited"]["n_prompt"]
    assert life["edited"]["text"] == life["edited_fresh"]["text"]
    assert life["edited"]["text"] != life["unedited"]["text"], "the test cannot tell one prefix from the other"


@pytest.mark.parametrize("flash_attn", [False, True], ids=["fa-off", "fa-on"])
def test_heads_that_keep_different_tokens_answer_from_their_own_chat(model: Path, flash_attn: bool) -> None:
    life = run_scenario("long_life", model, policy="h2o:budget=512", flash_attn=flash_attn).result
    assert (life["finish_reason"], life["n_gen"]) == ("length", 2000)
    assert (life["stats"]["n_used"], life["stats"]["budget"]) == (512, 512)
    assert life["stats"]["n_evicted"] == life["n_prompt"] + 1999 - 512
    newest = life["n_prompt"] + 1999
    assert life["kept"][:4] == [0, 1, 2, 3] and life["kept"][-128:] == [*range(newest - 128, newest)]
    assert life["kept"] != [*range(4), *range(newest - 508, newest)], "no head keeps anything but the newest"
    for turn in life["turns"]:  # a chat that goes on is not read again
        assert turn["n_read"] == turn["n_prompt"] - turn["n_before"]
    for name in ("other", "edited"):
        assert life[name]["n_read"] == life[name]["n_prompt"]
        assert life[name]["text"] == life[f"{name}_fresh"]["text"]


# ---- the binding's OpenAI server -------------------------------------------------------------------------------------


def test_the_openai_server_answers_beyond_the_budget(model: Path, tmp_path: Path) -> None:
    command = [str(binding_python()), "-m", "llama_cpp.server", "--model", str(model), "--n_ctx", str(N_CTX)]
    options = {"max_tokens": 64, "temperature": 0, "logit_bias": {"2": -100, "32000": -100, "32007": -100}}
    messages = [{"role": "user", "content": say(1, 2 * BUDGET)}]
    answers = []
    log = tmp_path / "server.log"
    with serve(
        [*command, "--n_threads", "1", "--n_threads_batch", "1"], binding_environment(), "/v1/models", log
    ) as server:
        for message in (say(2, 60), say(3, 60)):
            answer = server.call("/v1/chat/completions", {"messages": messages, **options})
            answers.append(answer)
            messages += [answer["choices"][0]["message"], {"role": "user", "content": message}]
    assert [a["choices"][0]["finish_reason"] for a in answers] == ["length", "length"]
    assert [a["usage"]["completion_tokens"] for a in answers] == [64, 64]
    assert answers[0]["usage"]["prompt_tokens"] > 2 * BUDGET
    assert all(a["choices"][0]["message"]["content"] for a in answers)
    assert f"policy streaming, scope token, budget {BUDGET}" in server.log


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refusals(model: Path) -> Outcome:
    return run_scenario("malformed", model, values=[*MALFORMED, "streaming:budget=256"])


@pytest.mark.parametrize("value", MALFORMED)
def test_a_malformed_policy_is_refused_in_one_sentence(refusals: Outcome, value: str) -> None:
    assert refusals.result[value] == "Failed to create llama_context"
    said = refusals.stderr.split(f"@@@{value}\n")[1].split("@@@")[0].splitlines()
    sentences = [line for line in said if line.startswith("LLAMA_KV_POLICY: ")]
    assert len(sentences) == 1, said
    assert MALFORMED[value] in sentences[0]
    assert not sentences[0].endswith(".") and ". " not in sentences[0]


def test_a_refusal_ends_with_the_context_that_it_was_for(refusals: Outcome) -> None:
    assert refusals.result["streaming:budget=256"] == "made"
    assert "LLAMA_KV_POLICY: " not in refusals.stderr.split("@@@streaming:budget=256\n")[1]


def test_a_unified_cache_with_several_sequences_is_refused(model: Path) -> None:
    outcome = run_scenario("several_sequences", model)
    assert not outcome.result["unified"]
    sentences = [line for line in outcome.stderr.splitlines() if line.startswith("LLAMA_KV_POLICY: ")]
    assert len(sentences) == 1
    assert "4 sequences" in sentences[0] and "-np 1" in sentences[0] and "--no-kv-unified" in sentences[0]

    # a stream per sequence: each has a budget of its own
    assert outcome.result["separate"]
    assert outcome.result["kept"] == {
        "0": [*range(4), *range(400 - BUDGET + 4, 400)],
        "1": [],
        "2": [],
        "3": [*range(4), *range(280 - BUDGET + 4, 280)],
    }


def test_a_restored_chat_is_answered_alike_without_reading_again(model: Path) -> None:
    report = run_scenario("saved_state", model).result
    assert report["n_evicted"] > 0
    assert report["restored"] == report["straight"]
    assert report["restored_evals"] == report["straight_evals"]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_cache_of_conversations_answers_from_the_right_one(model: Path, tmp_path: Path, place: str) -> None:
    report = run_scenario("cached_chats", model, folder=str(tmp_path) if place == "disk" else "").result
    assert len(report["answers"]) == 6 and min(report["n_evicted"]) > 0
    assert report["answers"] == report["expected"]


# ---- sequence operations ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operations(model: Path) -> dict[str, Any]:
    return run_scenario("memory", model).result


def after(n: int) -> list[Any]:
    """Kept positions, pos_min, pos_max when n tokens were read."""
    return [[*range(4), *range(n - BUDGET + 4, n)], n - BUDGET + 4, n - 1]


def test_no_shift_is_offered(operations: dict[str, Any]) -> None:
    assert operations["can_shift"] is False


def test_seq_add_div_and_cp_move_nothing(operations: dict[str, Any]) -> None:
    assert operations["void_calls"] == {"before": after(1000), "after": after(1000)}
    assert operations["logits_after_void_calls"] == operations["logits_untouched"][0]


def test_pos_min_answers_no_evicted_position(operations: dict[str, Any]) -> None:
    assert operations["pos_empty"] == [[], -1, -1]
    assert operations["past_the_end"]["before"] == after(1001)


@pytest.mark.parametrize("case", ["ends_early", "ends_early_from_0", "evicted", "newest_evicted", "between_sinks"])
def test_an_impossible_rewind_fails_and_changes_nothing(operations: dict[str, Any], case: str) -> None:
    assert operations[case] == {"result": False, "before": after(1001), "after": after(1001)}


def test_a_refused_rewind_leaves_the_next_token(operations: dict[str, Any]) -> None:
    assert operations["logits_after_refusals"] == operations["logits_untouched"][1]


def test_a_rewind_past_the_end_succeeds_and_changes_nothing(operations: dict[str, Any]) -> None:
    assert operations["past_the_end"] == {"result": True, "before": after(1001), "after": after(1001)}


def test_a_rewind_within_the_tail_drops_the_tail_alone(operations: dict[str, Any]) -> None:
    kept, pos_min, _ = after(1002)
    assert operations["tail"] == {
        "result": True,
        "before": [kept, pos_min, 1001],
        "after": [[p for p in kept if p < 990], pos_min, 989],
    }
    assert operations["after_tail"] == after(1002)


def test_a_rewind_to_pos_min_succeeds(operations: dict[str, Any]) -> None:
    _, pos_min, _ = after(1002)
    assert operations["at_pos_min"]["result"] is True
    assert operations["at_pos_min"]["after"] == [[0, 1, 2, 3], pos_min, pos_min - 1]


@pytest.mark.parametrize("case", ["all", "all_negative"])
def test_a_removal_of_everything_succeeds_and_leaves_no_trace(operations: dict[str, Any], case: str) -> None:
    assert operations[case]["result"] is True
    assert operations[case]["after"] == [[], -1, -1]
    assert operations["logits_again"] == operations["logits_fresh"]
