"""Random texts for tools/fuzz.py: policies and session options; what the other texts share."""

from __future__ import annotations

import random
import re

NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "4",
    "16",
    "31",
    "32",
    "64",
    "100",
    "255",
    "256",
    "257",
    "511",
    "512",
    "1000",
    "4096",
    "65536",
]
NUMBERS += ["1048576", "1073741823", "1073741824", "1073741825", "2147483647", "2147483648", "4294967040", "4294967295"]
NUMBERS += [
    "9223372036854775807",
    "9223372036854775808",
    "999999999999999999",
    "-9223372036854775808",
    "1e3",
    "0x10",
    "1.5",
    "",
]
NUMBERS += [" 4", "4 ", "+4", "nan", "inf", "a", "\u0664"]

KEYS = {
    "budget": NUMBERS,
    "sinks": NUMBERS,
    "recent": NUMBERS,
    "scope": ["token", "layer", "head", "Token", ""],
    "positions": ["true", "cache", "auto", "false", ""],
    "update": ["inplace", "shift", "gather", "x"],
    "rotate_every": NUMBERS,
    "score_queries": [*NUMBERS, "all"],
    "evict_every": NUMBERS,
    "page_size": NUMBERS,
    "filter": ["0", "0.2", "0.5", "0.9", "0.95", "-0.1", "NaN", "x", ""],
    "filter_layers": NUMBERS,
    "filter_warmup": NUMBERS,
    "cpu_attn": ["0", "1", "2", "x"],
    "nonsense": ["1"],
}
POLICIES = "none streaming h2o random tova snapkv knorm keydiff rkv caote vatp a2sf pagedeviction NONE x".split()

COMMON = ["sinks", "rotate_every", "positions", "cpu_attn"]
TAKES = {
    "streaming": COMMON,
    "random": [*COMMON, "evict_every"],
    "h2o": [*COMMON, "recent", "scope", "score_queries", "evict_every", "filter", "filter_layers", "filter_warmup"],
}
TAKES |= {
    "tova": [*COMMON, "scope", "evict_every", "filter"],
    "snapkv": [*COMMON, "recent", "scope", "evict_every"],
    "knorm": [*COMMON, "scope"],
}
TAKES |= {
    "keydiff": [*COMMON, "scope", "evict_every"],
    "pagedeviction": [*COMMON, "scope", "page_size"],
    "rkv": [*COMMON, "scope"],
    "lagkv": [*COMMON, "recent", "scope", "evict_every"],
    "external": [*COMMON, "recent", "scope", "evict_every"],
}

SESSION = {
    "n_ctx": NUMBERS,
    "n_batch": NUMBERS,
    "n_ubatch": NUMBERS,
    "n_threads": ["1", "2", "0", "-1", "513"],
    "flash_attn": ["auto", "on", "off", "x"],
    "type_k": ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q2_K", ""],
    "type_v": ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "i8"],
    "offload_kv": ["0", "1", "2"],
    "n_outputs": NUMBERS,
    "context_shift": ["0", "1", "-1"],
    "rope_upstream": ["0", "1"],
}


def mangle(rng: random.Random, text: str, n: int = 3) -> str:
    """A few characters lost, doubled, exchanged or put in."""
    for _ in range(rng.randrange(1, n + 1)):
        at, new = rng.randrange(len(text) + 1), rng.choice(",:=;|-+*?[](){}\"'\\/#%<>$ \n\t\u00e9\u4e00\U0001f600a0")
        cut = rng.randrange(4)
        text = text[:at] + rng.choice(["", new, text[at : at + 1] * 2]) + text[at + (cut > 0) :]
    return text


def _items(rng: random.Random, keys: dict[str, list[str]], n_max: int) -> list[str]:
    chosen = rng.sample(sorted(keys), rng.randrange(min(n_max, len(keys)) + 1))
    if chosen and rng.random() < 0.05:
        chosen.append(chosen[0])
    return [f"{key}={rng.choice(keys[key])}" for key in chosen]


def policy(rng: random.Random) -> str:
    if rng.random() < 0.02:
        return rng.choice(
            ["", ":", ",", "=", "x" * 100000, "h2o:" + "budget=64," * 20000, "\x01", "streaming:budget=" + "9" * 5000]
        )
    mild = ["4", "8", "16", "32", "48", "64", "96", "128", "200", "300", "700", "4096"]
    if rng.random() < 0.5:  # what each policy takes, in any numbers
        name = rng.choice(sorted(TAKES))
        mine = {
            k: mild
            if KEYS[k] is NUMBERS
            else [w for w in KEYS[k] if re.fullmatch(r"[01]|0\.[0-9]", w) or (w.islower() and w != "x")]
            for k in ("budget", *TAKES[name])
        }
        items = _items(rng, mine, 6)
        return name + (":" if items else "") + ",".join(items)
    keys = {
        k: mild if v is NUMBERS and rng.random() < 0.5 else v
        for k, v in KEYS.items()
        if k != "nonsense" or rng.random() < 0.1
    }
    items = _items(rng, keys, 6)
    text = rng.choice(POLICIES) + (":" if items or rng.random() < 0.1 else "") + ",".join(items)
    return mangle(rng, text) if rng.random() < 0.15 else text


def options(rng: random.Random) -> str:
    """Of equip_session_create."""
    text = ",".join(_items(rng, SESSION, 4))
    return mangle(rng, text) if rng.random() < 0.1 else text


def deep_json(rng: random.Random) -> str:
    n = rng.choice([150, 300, 3000, 100000, 1000000])
    return rng.choice(
        ["[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, "[" * n, '[{"a":' * n, "[[]," * n + "1" + "]" * n]
    )
