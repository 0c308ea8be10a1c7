"""The records of `equip eval` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equip_cli import engine, output
from equip_cli.memory import megabytes
from equip_cli.policy import CONTEXT_SHIFT, choice_words


def _label(record: dict[str, Any], scopes: bool, rotations: bool, updates: bool, types: bool) -> str:
    """Words that tell a row from its neighbours, and how it chose; the flags: the rows differ in these."""
    if record["update"] == CONTEXT_SHIFT:
        words = [CONTEXT_SHIFT, str(record["budget"]), f"{record['sinks']} sinks"]
    elif record["policy"] == "none":
        words = ["none", str(record["budget"])]
    elif record["policy"] == "streaming" and record["sinks"] == 0:
        words = ["window only", str(record["budget"]), record["positions"]]
    else:
        words = [record["policy"], *([record["scope"]] if scopes else [])]
        words += [str(record["budget"]), f"{record['sinks']} sinks", record["positions"]]
    if record["policy"] != "none":
        if rotations and record["rotate_every"]:
            words.append(f"rotate every {record['rotate_every']}")
        if updates or record["update"] != "inplace":
            words.append(record["update"])
        words += choice_words(record)
    if types:
        k, v = record["type_k"], record["type_v"]
        words.append(k if k == v else f"K {k}, V {v}")
    return ", ".join(words)


def labels(records: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each record, as short as tells them apart."""
    updates = len({record["update"] for record in records if record["policy"] != "none"}) > 1
    by_type: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        by_type.setdefault((record["type_k"], record["type_v"]), []).append(record)
    types, scopes = len(by_type) > 1, engine.differ_in_scope(records)
    # quantised keys have another default
    rotations = any(engine.differ_in_rotation(each) for each in by_type.values())
    return [_label(record, scopes, rotations, updates, types) for record in records]


def _size(n_bytes: int) -> str:
    """Kilobytes where megabytes would hide what a small model keeps."""
    return f"{n_bytes / 1024:.0f} KB" if n_bytes < 4 << 20 else megabytes(n_bytes)


def _grid(names: list[str], columns: list[str], cells: list[list[str]], corner: tuple[str, str]) -> str:
    """`cells[row][column]`, turned over where that is narrower; corner: what the rows are, and what the columns are."""
    across = output.table([[name, *row] for name, row in zip(names, cells, strict=True)], [corner[0], *columns])
    turned = [[column, *(row[i] for row in cells)] for i, column in enumerate(columns)]
    down = output.table(turned, [corner[1], *names])
    return min(across, down, key=lambda text: text.index("\n"))


def _perplexity(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    types = len({(record["type_k"], record["type_v"]) for record in records}) > 1
    base = next((i for i, record in enumerate(records) if record["update"] == "none"), 0)
    rows = [
        [name, *([_size(r["kept_bytes"])] if types else []), str(r["n_tokens"]), f"{r['ppl']:.3f}",
         f"{100 * (r['ppl'] / records[base]['ppl'] - 1):+.1f}%"]
        for name, r in zip(names, records, strict=True)
    ]  # fmt: skip
    to = "to none" if records[base]["update"] == "none" else "to the first row"
    header = ["policy, budget", *(["kept"] if types else []), "tokens", f"perplexity of {records[0]['text']}", to]
    return output.table(rows, header)


def _agreement(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    rows = []
    for name, record in zip(names, records, strict=True):
        found = record["agreement"]
        if found is None:
            continue
        (low, high), (least, most) = found["top1_ci95"], found["kl_ci95"]
        rows.append(
            [
                name,
                _size(record["kept_bytes"]),
                str(found["n_tokens"]),
                f"{found['top1']:.3f} [{low:.3f}, {high:.3f}]",
                f"{found['kl']:.4f} [{least:.4f}, {most:.4f}]",
            ]
        )
    header = ["agreement with the full f16 cache", "kept", "tokens", "same top token", "KL, nats per token"]
    return output.table(rows, header)


def _recall(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    keys = list(dict.fromkeys(key for record in records for key in record["recall"]))
    first = min(map(int, keys))
    columns = [
        f"{int(key) - first} to {int(key) - 1} ({max(r['recall_n'].get(key, 0) for r in records)})" for key in keys
    ]
    cells = []
    for record in records:
        shares = []
        for key in keys:
            low, high = record["recall_ci95"][key]
            shares.append(f"{record['recall'][key]:.2f} [{low:.2f}, {high:.2f}]")
        cells.append(shares)
    return _grid(names, columns, cells, ("recall", "recall: distance in tokens (dialogues)"))


def _passkey(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    keys = [(length, depth) for length, by_depth in records[0]["passkey"].items() for depth in by_depth]
    cells = [[f"{record['passkey'][length][depth]:.2f}" for length, depth in keys] for record in records]
    n = records[0]["passkey_n"]
    title = f"passkey, {n} trial{'s' if n > 1 else ''}"
    return _grid(names, [f"{length} at {depth}" for length, depth in keys], cells, (title, f"{title}: tokens at depth"))


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """A table for each measure that was taken."""
    names = labels(records)
    tables = []
    for key, table in (("ppl", _perplexity), ("agreement", _agreement), ("recall", _recall), ("passkey", _passkey)):
        taken = [i for i, record in enumerate(records) if record[key] not in (None, {})]
        if taken:
            tables.append(table([records[i] for i in taken], [names[i] for i in taken]))
    return "\n".join(tables)
