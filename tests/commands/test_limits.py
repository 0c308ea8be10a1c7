"""Numbers out of range are usage errors: one sentence that names the option, its value and the range, before a model is loaded."""

from __future__ import annotations

import functools
import math
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from equip_cli import BudgetError, CachePolicy, Model, Sampling, UsageError, cli
from equip_cli.commands.setup import values
from equip_cli.core import limits
from equip_cli.core.limits import Limit

# command, what makes it run, and the option with its limit
HI = ("-p", "Hi")
CHAT_AND_GENERATE = {
    "-n": limits.PREDICT, "--seed": limits.SEED, "--temp": limits.TEMP, "--top-k": limits.TOP_K, "--top-p": limits.SHARE,
    "--min-p": limits.SHARE, "--repeat-penalty": limits.REPEAT_PENALTY, "--repeat-last-n": limits.REPEAT_LAST_N,
    "--budget": limits.BUDGET, "--sinks": limits.KEPT, "--recent": limits.KEPT, "--rotate-every": limits.ROTATE_EVERY,
    "--score-queries": limits.SCORE_QUERIES, "--evict-every": limits.EVICT_EVERY, "--page-size": limits.PAGE_SIZE,
    "--filter": limits.FILTER, "--filter-layers": limits.FILTER_LAYERS, "--filter-warmup": limits.FILTER_WARMUP,
    "-c": limits.CTX_SIZE, "-t": limits.THREADS, "-b": limits.BATCH, "-ub": limits.UBATCH, "-ngl": limits.GPU_LAYERS,
}  # fmt: skip
COMMANDS: dict[str, dict[str, Limit]] = {
    "generate": CHAT_AND_GENERATE,
    "chat": CHAT_AND_GENERATE | {"--saved-caches": limits.SAVED_CACHES, "--cache-limit": limits.CACHE_MB},
    "bench": {
        "-p": limits.TEST_TOKENS, "-n": limits.TEST_TOKENS, "-d": limits.DEPTH, "-r": limits.REPETITIONS, "--upto": limits.UPTO,
        "--ttft": limits.TTFT, "--latency": limits.LATENCY, "--lanes": limits.LANES, "--pool": limits.POOL, "--budget": limits.ROW_BUDGET, "--sinks": limits.KEPT,
        "--rotate-every": limits.ROTATE_EVERY, "--score-queries": limits.SCORE_QUERIES, "--evict-every": limits.EVICT_EVERY,
        "--page-size": limits.PAGE_SIZE, "--filter": limits.FILTER,
        "--filter-layers": limits.FILTER_LAYERS, "--filter-warmup": limits.FILTER_WARMUP, "-t": limits.THREADS, "-b": limits.BATCH, "-ub": limits.UBATCH,
        "-ngl": limits.GPU_LAYERS,
    },
    "eval": {
        "-n": limits.N_TOKENS, "--chunk": limits.N_OUTPUTS, "--dialogues": limits.DIALOGUES, "--seed": limits.EVAL_SEED,
        "--passkey-length": limits.PASSKEY_LENGTH, "--passkey-depths": limits.SHARE, "--passkey-trials": limits.PASSKEY_TRIALS,
        "--facts-length": limits.FACTS_LENGTH, "--facts-trials": limits.FACTS_TRIALS, "--chat-turns": limits.CHAT_TURNS,
        "--chat-trials": limits.CHAT_TRIALS,
        "--budget": limits.BUDGET, "--sinks": limits.KEPT, "--rotate-every": limits.ROTATE_EVERY,
        "--score-queries": limits.SCORE_QUERIES, "--evict-every": limits.EVICT_EVERY, "--page-size": limits.PAGE_SIZE,
        "--filter": limits.FILTER, "--filter-layers": limits.FILTER_LAYERS, "--filter-warmup": limits.FILTER_WARMUP,
        "-c": limits.CTX_SIZE, "-t": limits.THREADS, "-b": limits.BATCH, "-ub": limits.UBATCH, "-ngl": limits.GPU_LAYERS,
    },
    "rpc": {"-p": limits.WORKER_PORT, "-t": limits.THREADS},
    "serve": {
        "-np": limits.LANES, "--port": limits.PORT, "--budget": limits.BUDGET, "--sinks": limits.KEPT, "--recent": limits.KEPT,
        "--rotate-every": limits.ROTATE_EVERY, "--score-queries": limits.SCORE_QUERIES, "--evict-every": limits.EVICT_EVERY,
        "--page-size": limits.PAGE_SIZE, "--filter": limits.FILTER,
        "--filter-layers": limits.FILTER_LAYERS, "--filter-warmup": limits.FILTER_WARMUP, "-t": limits.THREADS, "-b": limits.BATCH, "-ub": limits.UBATCH,
        "-ngl": limits.GPU_LAYERS,
    },
    "check": {
        "--budget": limits.CHECK_BUDGET, "-n": limits.EVICTIONS, "-t": limits.THREADS, "-ngl": limits.GPU_LAYERS,
    },
}  # fmt: skip


def wrong(limit: Limit) -> list[str]:
    """Values that are out of range, and what is no number."""
    if isinstance(limit.low, float):
        return [str(limit.low - 1), str(limit.high * 1.01), "nan", "inf", "-inf", "1e999", "x", ""]
    return [str(limit.low - 1), "-7", str(int(limit.high) + 1), str(10**20), str(-(10**20)), "1.5", "x", ""]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The error of a command that must be refused before it loads a model."""
    monkeypatch.delenv("LLAMA_KV_POLICY", raising=False)

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("equip_cli.core.model.Model.__init__", load)
    # to build the commands takes longer than to refuse an option
    monkeypatch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))

    def run(*args: str) -> str:
        assert cli.main(list(args)) == 2, args
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert out == "" and len(errors) == 1, err
        return errors[0]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_out_of_range_are_usage_errors(refused: Callable[..., str], command: str) -> None:
    for option, limit in COMMANDS[command].items():
        base = [command, *(HI if command in ("chat", "generate") else ())]
        # a policy that takes the option
        base += ["--policy", "pagedeviction" if option == "--page-size" else "h2o"] * (command not in ("check", "rpc"))
        for value in wrong(limit):
            error = refused(*base, option, value)
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", error), (option, value, error)
            assert value in error or value == "1e999", (option, value, error)
            ends = f" number from {limit.low:g} to {limit.high:{'d' if isinstance(limit.high, int) else 'g'}}"
            assert ends in error or value == "" or option == "--passkey-depths", (option, value, error)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_ends_of_a_range_are_in_it(command: str) -> None:
    for option, limit in COMMANDS[command].items():
        for value in (limit.low, limit.high):
            limit.check(value, option)
        with pytest.raises((UsageError, BudgetError), match=f"{option} is "):
            limit.check(math.nan, option)


def test_every_number_has_a_range() -> None:
    """A new option without one fails here."""
    found: dict[str, set[str]] = {}
    for registered in cli.app.registered_commands:
        function: Any = registered.callback
        name = registered.name or function.__name__
        for parameter, hint in typing.get_type_hints(function, include_extras=True).items():
            # Optional may be around Annotated
            parts = [hint, *typing.get_args(hint)]
            for option in [each for part in parts for each in getattr(part, "__metadata__", ())]:
                kinds = {kind for part in parts for kind in (part, *typing.get_args(part))}
                if kinds & {int, float}:
                    assert option.parser is not None, (name, parameter)
                if re.search(r"\[[\d.-]+ (or more|to [\d.]+)", option.help or ""):
                    found.setdefault(name, set()).add(option.default)  # Typer keeps the first flag there
    assert found == {name: set(limits_) for name, limits_ in COMMANDS.items()}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("bench", "-t", ","), "-t is ','"),
        (("bench", "-n", ""), "-n is ''"),
        (("bench", "-p", " , "), "-p is"),
        (("bench", "--budget", ""), "--budget is ''"),
        (("bench", "--policy", ""), "--policy is ''"),
        (("bench", "--policy", "h2o", "--scope", ","), "--scope is ','"),
        (("bench", "--policy", "h2o", "--positions", ""), "--positions is ''"),
        (("bench", "--policy", "h2o", "--update", ""), "--update is ''"),
        (("bench", "--policy", "h2o", "--score-queries", ","), "--score-queries is ','"),
        (("bench", "--compare", "--policy", ""), "--policy is ''"),
        (("bench", "--shift-rope", ""), "--shift-rope is ''"),
        (("bench", "--ttft", ""), "--ttft is ''"),
        (("bench", "-fa", ""), "-fa is ''"),
        (("bench", "-ctk", ","), "-ctk is ','"),
        (("bench", "-ctv", ""), "-ctv is ''"),
        (("bench", "-n", "0", "-p", "0"), "nothing to measure"),
        (("bench", "--ttft", "4096", "--budget", "8192"), "--ttft is 4096"),
        (("eval", "--policy", ","), "--policy is ','"),
        (("eval", "--policy", "h2o", "--budget", ","), "--budget is ','"),
        (("eval", "-ctk", ""), "-ctk is ''"),
        (("eval", "--passkey-length", ""), "--passkey-length is ''"),
        (("eval", "--passkey-depths", ""), "--passkey-depths is ''"),
        (("eval", "--passkey-depths", "nan"), "--passkey-depths is 'nan'"),
        (("check", "--update", ""), "--update is ''"),
    ],
)
def test_empty_lists_are_usage_errors(refused: Callable[..., str], args: tuple[str, ...], words: str) -> None:
    assert words in refused(*args)


# ---- the Python API


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2**32 - 1}, {"seed": -2}, {"seed": 1.5}, {"temp": -0.1}, {"temp": math.nan}, {"temp": math.inf},
        {"temp": "hot"}, {"top_k": -1}, {"top_k": 2**31}, {"top_p": 1.1}, {"min_p": -1}, {"repeat_penalty": 0},
        {"repeat_penalty": math.nan}, {"repeat_last_n": 4097}, {"top_k": True},
    ],
)  # fmt: skip
def test_numbers_of_sampling_are_checked(options: dict[str, Any]) -> None:
    ((key, value),) = options.items()
    with pytest.raises(UsageError, match=rf"^{key} is {value}: give a (whole )?number from "):
        Sampling(**options)


def test_a_seed_that_is_accepted_is_a_seed(model: Model) -> None:
    """llama.cpp takes 2**32 - 1 for a wish to have a random one."""
    texts = []
    for seed in (2**32 - 2, 2**32 - 2, 0, 0):
        with model.session("streaming:budget=64", n_threads=1) as session:
            hot = Sampling(seed=seed, temp=5.0, top_k=0, top_p=1.0, min_p=0.0, ignore_eos=True)
            texts.append("".join(session.generate("My cat is called", 12, hot)))
    assert texts[0] == texts[1] != texts[2] == texts[3]
    with pytest.raises(UsageError, match=r"seed is 4294967295: give a whole number from -1 to 4294967294 \(-1 = a new"):
        Sampling(seed=2**32 - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": -1}, {"n_ctx": 2**40}, {"n_batch": 0}, {"n_ubatch": 2**17}, {"n_threads": -3}, {"n_threads": 100000},
        {"n_threads_batch": 513}, {"n_outputs": 0}, {"n_ctx": 1.5},
    ],
)  # fmt: skip
def test_numbers_of_a_session_are_checked(model: Model, options: dict[str, Any]) -> None:
    ((key, value),) = options.items()
    with pytest.raises(UsageError, match=rf"^{key} is {value}: give a whole number from "):
        model.session("streaming:budget=64", **options)


def test_numbers_of_a_sessions_calls_are_checked(model: Model) -> None:
    with model.session("streaming:budget=64", n_threads=1) as session:
        for call in (
            lambda: list(session.iter_tokens(-7)),
            lambda: list(session.generate("Hi", -2)),
            lambda: list(session.iter_tokens(2**31)),
            lambda: session.generate_tokens(-2),
            lambda: session.pin(2**31),
            lambda: session.pin(-1),
            lambda: session.rewind(2**40),
            lambda: session.rewind(-1),
            lambda: session.fill(2**40),
            lambda: session.time_decode(-1),
            lambda: session.nll([1], chunk=0),
        ):
            with pytest.raises(UsageError, match="give a whole number from"):
                call()
        assert session.stats()["n_past"] == 0
    with pytest.raises(UsageError, match="n_gpu_layers is -7"):
        Model(model.path, n_gpu_layers=-7)


def test_numbers_of_a_policy_are_checked() -> None:
    for options in ({"budget": -1}, {"budget": 2**31}, {"budget": 1.5}):
        with pytest.raises(
            BudgetError, match=r"budget is .*: give a whole number from 0 to 1073741824 \(0 = the trained"
        ):
            CachePolicy(**options)
    for key in ("sinks", "recent", "rotate_every", "evict_every", "page_size", "score_queries"):
        with pytest.raises(UsageError, match=f"{key} is -1: give .*a whole number from [01] to (1073741824|65536)"):
            CachePolicy("h2o", **{key: -1})  # type: ignore[arg-type]
    for key, low in (("filter_layers", 1), ("filter_warmup", 0)):
        with pytest.raises(UsageError, match=f"{key} is -1: give a whole number from {low} to 1073741824"):
            CachePolicy("h2o", filter=0.5, **{key: -1})  # type: ignore[arg-type]
    for ratio in (-0.1, 0.91, float("nan")):
        with pytest.raises(UsageError, match=r"filter is .*: give a number from 0 to 0\.9 \(0 = none\)"):
            CachePolicy("h2o", filter=ratio)


@pytest.mark.parametrize("n_threads", [0, -1, None])
def test_no_number_of_threads_is_all_cores(model: Model, n_threads: int | None) -> None:
    with model.session("streaming:budget=64", n_threads=n_threads) as session:
        assert session.stats()["n_threads"] >= 1


def test_flash_attention_may_be_a_bool(model: Model) -> None:
    for given, found in ((True, "on"), ("on", "on"), (False, "off"), ("off", "off")):
        with model.session(CachePolicy("none"), n_ctx=256, flash_attn=given) as session:
            assert session.stats()["flash_attn"] in (found, found == "on")
    for wrong_one in ("maybe", 2, None):
        with pytest.raises(UsageError, match="give auto, on or off, True or False"):
            model.session(flash_attn=wrong_one)


def test_numbers_of_a_list_are_checked() -> None:
    assert values.numbers("1, 2", "-x", limits.DEPTH) == [1, 2]
    with pytest.raises(UsageError, match=r"^-x is 0: give a whole number from 1 to 16777216$"):
        values.numbers("1,0", "-x", limits.DEPTH)


def test_a_file_of_numbers_is_no_place_for_a_range() -> None:
    """The ranges stand in limits.py alone."""
    for path in (Path(cli.__file__).parent / "commands").rglob("*.py"):
        assert not re.search(r"\b(min|max)=\d", path.read_text()), path
