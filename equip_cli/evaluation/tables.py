"""The records of `equip eval` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equip_cli.core.memory import megabytes
from equip_cli.core.policy import CHOICE, CONTEXT_SHIFT, choice_words, differ_in_rotation, differ_in_scope, type_words
from equip_cli.terminal.columns import BLANK, Column, blocks, fold, fold_by, interval, paragraph, table, width


def _name(record: dict[str, Any]) -> str:
    """What a row is called."""
    if record["update"] == CONTEXT_SHIFT:
        return CONTEXT_SHIFT
    if record["policy"] == "streaming" and record["sinks"] == 0:
        return "window only"
    return str(record["policy"])


def _label(record: dict[str, Any], scopes: bool, rotations: bool, updates: bool, types: bool, recents: bool) -> str:
    """Words that tell a row from its neighbours, and how it chose; the flags: the rows differ in these."""
    name, budget = _name(record), str(record["budget"])
    if name == CONTEXT_SHIFT:
        words = [name, budget, f"{record['sinks']} sinks"]
    elif name == "none":
        words = [name, budget]
    elif name == "window only":
        words = [name, budget, record["positions"]]
    else:
        words = [name, *([record["scope"]] if scopes else []), budget, f"{record['sinks']} sinks", record["positions"]]
    if record["policy"] != "none":
        if rotations and record["rotate_every"]:
            words.append(f"rotate every {record['rotate_every']}")
        if updates or record["update"] != "inplace":
            words.append(record["update"])
        if recents and record["recent"] is not None:
            words.append(f"recent {record['recent']}")
        words += choice_words(record)
    if types:
        words.append(type_words(record))
    return ", ".join(words)


def labels(records: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each record that says it all: for a plot, or for what is missing."""
    updates = len({record["update"] for record in records if record["policy"] != "none"}) > 1
    types = len({(record["type_k"], record["type_v"]) for record in records}) > 1
    flags = (differ_in_scope(records), _rotations(records), updates, types, _recents(records))
    return [_label(record, *flags) for record in records]


def _rotations(records: Sequence[dict[str, Any]]) -> bool:
    """Whether rows differ in `rotate_every` alone; quantised keys have another default."""
    by_type: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        by_type.setdefault((record["type_k"], record["type_v"]), []).append(record)
    return any(differ_in_rotation(each) for each in by_type.values())


def _recents(records: Sequence[dict[str, Any]]) -> bool:
    """Whether rows of one policy and budget differ in `recent`, whose default follows the budget."""
    found = [(record["policy"], record["budget"], record["recent"]) for record in records]
    return len(set(found)) > len({each[:2] for each in found})


def short_labels(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """A name for each record, as short as tells them apart; and in words what the names leave out, since it is the same in
    all rows, or in all rows of a policy."""
    names = [_name(record) for record in records]

    def column(phrase: str, key: str, *without: str) -> Column:
        """without: names that the setting means nothing to, beside `none`."""
        skipped = ("none", *without)
        values = [
            BLANK if name in skipped else str(record.get(key) or BLANK)
            for name, record in zip(names, records, strict=True)
        ]
        return Column(key, values, phrase)

    sinks = [
        "-" if name in ("none", "window only") else str(r["sinks"]) for name, r in zip(names, records, strict=True)
    ]
    settings = [
        column("scope {}", "scope", CONTEXT_SHIFT),
        Column("sinks", sinks, "{} sinks"),
        *([column("recent {}", "recent", CONTEXT_SHIFT)] if _recents(records) else []),
        column("positions {}", "positions", CONTEXT_SHIFT),
        *([column("rotate every {}", "rotate_every", CONTEXT_SHIFT)] if _rotations(records) else []),
        column("update {}", "update", CONTEXT_SHIFT),
        *(column(f"{key.replace('_', ' ')} {{}}", key) for key in CHOICE),
        Column("type", [type_words(record) for record in records], "cache {}"),
    ]
    words, left = fold(settings)
    by_name, left = fold_by(names, left)
    shown = [column for column in left if column.phrase]
    rows = zip(names, records, *(column.cells for column in shown), strict=True)
    made = []
    for name, record, *cells in rows:
        parts = [
            cell if column.title in ("scope", "positions", "update", "type") else column.said(cell)[0]
            for column, cell in zip(shown, cells, strict=True)
            if cell != BLANK
        ]
        made.append(", ".join([name, str(record["budget"]), *parts]))
    return made, words + by_name


def _size(n_bytes: int) -> str:
    """Kilobytes where megabytes would hide what a small model keeps."""
    return f"{n_bytes / 1024:.0f} KB" if n_bytes < 4 << 20 else megabytes(n_bytes)


def _grid(names: list[str], columns: list[str], cells: list[list[str]], corner: tuple[str, str]) -> str:
    """`cells[row][column]`, turned over where that is narrower; corner: what the rows are, and what the columns are."""
    across = [Column(title, [row[i] for row in cells]) for i, title in enumerate(columns)]
    down = [Column(name, row) for name, row in zip(names, cells, strict=True)]
    ways = [(Column(corner[0], names), across), (Column(corner[1], columns), down)]
    first, others = min(ways, key=lambda way: width([way[0], *way[1]]))
    return blocks(first, others)


def _perplexity(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    types = len({(record["type_k"], record["type_v"]) for record in records}) > 1
    base = next((i for i, record in enumerate(records) if record["update"] == "none"), 0)
    more = [f"{100 * (record['ppl'] / records[base]['ppl'] - 1):+.1f}%" for record in records]
    words, columns = fold(
        [
            Column("policy, budget", names),
            *([Column("kept", [_size(record["kept_bytes"]) for record in records])] if types else []),
            Column("tokens", [str(record["n_tokens"]) for record in records], "{} tokens"),
            Column(f"perplexity of {records[0]['text']}", [f"{record['ppl']:.3f}" for record in records]),
            Column("to none" if records[base]["update"] == "none" else "to the first row", more),
        ]
    )
    return paragraph(words) + table(columns)


def _agreement(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    rows = [
        (name, record, record["agreement"])
        for name, record in zip(names, records, strict=True)
        if record["agreement"] is not None
    ]

    words, columns = fold(
        [
            Column("policy, budget", [name for name, _, _ in rows]),
            Column("kept", [_size(record["kept_bytes"]) for _, record, _ in rows]),
            Column("tokens", [str(found["n_tokens"]) for _, _, found in rows], "{} tokens"),
            Column("same top token", [interval(found["top1"], found["top1_ci95"], 3) for _, _, found in rows]),
            Column("KL, nats per token", [interval(found["kl"], found["kl_ci95"], 4) for _, _, found in rows]),
        ]
    )
    return paragraph(["agreement with the full f16 cache", *words]) + table(columns)


def _paired(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    """Differences to the baselines; a column for each that some row has."""
    columns = [Column("policy, budget", names)]
    for name in dict.fromkeys(name for record in records for name in record["paired"]):
        for key, title, decimals in (("log_loss", "log loss", 4), ("kl", "KL", 4)):
            found = [(record["paired"].get(name) or {}).get(key) for record in records]
            cells = [interval(each["difference"], each["ci95"], decimals) if each else BLANK for each in found]
            if any(found):
                columns.append(Column(f"{title} to {name}", cells))
    words = ["differences in nats per token, on the same tokens, of as many bytes kept; below 0 is better"]
    return paragraph(words) + blocks(columns[0], columns[1:])


def _recall(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    keys = list(dict.fromkeys(key for record in records for key in record["recall"]))
    first = min(map(int, keys))
    columns = [
        f"{int(key) - first} to {int(key) - 1} ({max(r['recall_n'].get(key, 0) for r in records)})" for key in keys
    ]
    cells = [[interval(record["recall"][key], record["recall_ci95"][key], 2) for key in keys] for record in records]
    about = paragraph(["recall by distance in tokens, with the number of dialogues"])
    return about + _grid(names, columns, cells, ("recall", "distance (dialogues)"))


def _passkey(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    keys = [(length, depth) for length, by_depth in records[0]["passkey"].items() for depth in by_depth]
    cells = [[f"{record['passkey'][length][depth]:.2f}" for length, depth in keys] for record in records]
    n = records[0]["passkey_n"]
    about = paragraph([f"passkeys found, {n} trial{'s' if n > 1 else ''} at each depth of each number of tokens"])
    return about + _grid(
        names, [f"{length} at {depth}" for length, depth in keys], cells, ("passkey", "tokens at depth")
    )


def _told(records: Sequence[dict[str, Any]], names: list[str]) -> str:
    """Facts in texts of each length, and in a chat."""
    columns = [Column("policy, budget", names)]
    for key, title in (("facts", "in {} tokens of prose"), ("chat", "after {} turns")):
        for length, n in records[0][f"{key}_n"].items():
            cells = [interval(record[key][length], record[f"{key}_ci95"][length], 2) for record in records]
            columns.append(Column(f"{title.format(length)} ({n})", cells))
    words = ["facts that were told and asked back, with the number of questions"]
    return paragraph(words) + blocks(columns[0], columns[1:])


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """What all rows share, then a table for each measure that was taken."""
    names, words = short_labels(records)
    tables = []
    measures = (
        ("ppl", _perplexity),
        ("agreement", _agreement),
        ("paired", _paired),
        ("recall", _recall),
        ("passkey", _passkey),
        ("told", _told),
    )
    for key, make in measures:
        taken = [
            i
            for i, record in enumerate(records)
            if (record["facts"] or record["chat"] if key == "told" else record[key]) not in (None, {})
        ]
        if taken:
            tables.append(make([records[i] for i in taken], [names[i] for i in taken]))
    return paragraph([f"model {records[0]['model']}", *words]) + "\n".join(tables) if records else ""
