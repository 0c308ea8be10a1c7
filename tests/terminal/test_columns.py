"""Tables that fit a terminal: what is the same in all rows is said above them, and nothing else leaves the table."""

from __future__ import annotations

from equip_cli.terminal.columns import (
    BLANK,
    WIDTH,
    Column,
    blocks,
    fold,
    fold_by,
    from_rows,
    interval,
    listing,
    of_records,
    paragraph,
    table,
    width,
    wrapped,
)


def test_what_is_the_same_in_all_rows_is_said_once() -> None:
    model = Column("model", ["tiny", "tiny"], "model {}")
    policy = Column("policy", ["none", "h2o"], "policy {}")
    budget = Column("budget", [BLANK, "64"], "budget {}")  # means nothing to the first row
    pages = Column("page size", [BLANK, BLANK], "page size {}")
    speed = Column("t/s", ["5", "5"])  # a measure stays
    assert fold([model, policy, budget, pages, speed]) == (["model tiny", "budget 64"], [policy, speed])


def test_what_is_the_same_in_all_rows_of_a_policy_is_said_with_its_name() -> None:
    keys = ["none", "h2o", "h2o", "streaming"]
    scope = Column("scope", [BLANK, "head", "head", "token"], "scope {}")
    positions = Column("positions", [BLANK, "auto", "true", "cache"], "positions {}")
    said, left = fold_by(keys, [scope, positions])
    assert said == ["h2o: scope head", "streaming: scope token"]
    assert left == [positions]


def test_a_paragraph_and_a_table_are_markdown_apart() -> None:
    words = [f"word {i}" for i in range(40)]
    text = paragraph(words)
    assert text.endswith("\n\n") and max(map(len, text.splitlines())) <= WIDTH
    assert " ".join(text.split()).split(" | ") == words
    assert paragraph([]) == ""


def test_a_table_that_is_too_wide_is_continued_below() -> None:
    first = Column("policy", ["none", "h2o"])
    others = [Column(f"column {i}", ["0.94 [0.84, 0.98]"] * 2) for i in range(9)]
    text = blocks(first, others)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("| policy |") == 3 and all(column.title in text for column in others)
    assert width([first, others[0]]) == len(table([first, others[0]]).splitlines()[0])


def test_names_are_aligned_to_the_left_and_what_follows_to_the_right() -> None:
    text = table(from_rows(["policy", "t/s", ""], [["none", "9", "x"], ["streaming", "1234", ""]]))
    assert text.splitlines() == [
        "| policy    |  t/s |   |",
        "| --------- | ---: | : |",
        "| none      |    9 | x |",
        "| streaming | 1234 |   |",
    ]
    assert len(table(from_rows(["policy", "t/s"], [])).splitlines()) == 2


def test_columns_of_records_are_words_and_measures() -> None:
    column = of_records([{"n": 3, "ms": 1.5}, {"n": 3, "ms": 2.25}])
    assert fold([column("n", "{} tokens", lambda r: r["n"]), column("ms", None, lambda r: f"{r['ms']:.2f}")]) == (
        ["3 tokens"],
        [Column("ms", ["1.50", "2.25"])],
    )


def test_values_with_their_intervals_and_facts_below_each_other() -> None:
    assert interval(1.05, [0.984, 1.1], 2) == "1.05 [0.98, 1.10]"
    assert listing({"a": 1, "longer": "two"}) == "a       1\nlonger  two\n"
    lines = wrapped("- " + "word " * 60, "  ").splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= WIDTH and all(line.startswith("  w") for line in lines[1:])
