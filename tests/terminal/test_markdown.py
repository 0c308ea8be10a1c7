"""Markdown on a terminal while it comes: what is a mark, what stays text, where lines end, and that nothing is lost."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from equip_cli.terminal.flow import Flow
from equip_cli.terminal.markdown import LOOK_AHEAD, Markdown

ENDLESS = 10**6  # columns
NAMES = {"1": "b", "2": "dim", "3": "i", "4": "u", "36": "code"}


def shown(pieces: Sequence[str], width: int | Callable[[], int] = ENDLESS, *, coloured: bool = True) -> str:
    """What a terminal gets."""
    out: list[str] = []
    columns = width if callable(width) else lambda: width
    markdown = Markdown(Flow(coloured=coloured, width=columns, write=out.append))
    for piece in pieces:
        markdown.feed(piece)
    markdown.close()
    return "".join(out)


def bare(text: str) -> str:
    """Without styles."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def tagged(text: str) -> str:
    """Styles as tags, runs of the same style as one: `<b>words</b>`."""
    parts = re.findall(r"\x1b\[([0-9;]+)m(.*?)\x1b\[0m|(\n|[^\x1b\n]+)", text, re.DOTALL)
    runs: list[tuple[str, str]] = []
    for codes, styled, plain in parts:
        style = "+".join(sorted({NAMES[code] for code in codes.split(";") if code != "0"})) if styled else ""
        if runs and runs[-1][0] == style:
            runs[-1] = (style, runs[-1][1] + styled + plain)
        else:
            runs.append((style, styled + plain))
    return "".join(f"<{style}>{text}</{style}>" if style else text for style, text in runs)


# ---- what is a mark


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("a **bold word** here", "a <b>bold word</b> here"),
        ("a *word* and _another_.", "a <i>word</i> and <i>another</i>."),
        ("***both***", "<b+i>both</b+i>"),
        ("**a *b* c**", "<b>a </b><b+i>b</b+i><b> c</b>"),
        ("**a *b***", "<b>a </b><b+i>b</b+i>"),
        ("*a **b** c*", "<i>a </i><b+i>b</b+i><i> c</i>"),
        ("`x = a*b*c`, ``a ` b``", "<code>x = a*b*c</code>, <code>a ` b</code>"),
        ("**use `a**b` now**", "<b>use </b><b+code>a**b</b+code><b> now</b>"),
        ("这是**粗体**文字。", "这是<b>粗体</b>文字。"),
        ("# Title", "<b+u>Title</b+u>"),
        ("### A `b` c", "<b>A </b><b+code>b</b+code><b> c</b>"),
        ("> said *so*", "<dim>> </dim><i>said so</i>"),
        ("- **a**: b", "- <b>a</b>: b"),
        ("---", "<dim>---</dim>"),
        ("* * *", "<dim>* * *</dim>"),
        ("```py\na *b* c\n\n```\n*d*", "<dim>```py</dim>\n<code>a *b* c</code>\n\n<dim>```</dim>\n<i>d</i>"),
        ("- ~~~\n  # x\n  ~~~", "- <dim>~~~</dim>\n<code>  # x</code>\n<dim>  ~~~</dim>"),
        ("````\n```\n````", "<dim>````</dim>\n<code>```</code>\n<dim>````</dim>"),
        ("> ```\n> a*b*\n> ```\nc", "<dim>> ```</dim>\n<code>> a*b*</code>\n<dim>> ```</dim>\nc"),
    ],
)  # fmt: skip
def test_marks_become_styles(written: str, seen: str) -> None:
    for pieces in ([written], list(written)):
        assert tagged(shown(pieces)) == seen + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "2 * 3 * 4", "2*3*4", "2**3**4", "snake_case_name and other_name_too", "a lone * here", "*", "**", "***a", "`",
        "a lone ` here", "*args and **kwargs", "__init__.py", "src/_a_/b and https://x.org/_a_/*b*/", "\\*not\\* this",
        "**", "** a **", "#hashtag", "#", "-5 and -", "1.5 or 2024", "1.", "f(*a, *b)", "*.py and *.txt", "a_b_ _", "$x^*$ $y^*$",
        "[a_b](https://x.org/a_b_c)", "``` a `b", "--", "==", "\\(x_1\\) \\", "a ** b ** c", "a ****", "a " + "`" * 10 + "a` b", "* ", "  a ",
    ],
)  # fmt: skip
def test_what_is_no_mark_stays(text: str) -> None:
    for pieces in ([text], list(text)):
        assert shown(pieces) == text + "\n"


def test_without_colour_everything_stays_as_it_is_written() -> None:
    text = "# A\n- **b** `c`\n\n```py\nd\n```\n> *e*\n"
    assert shown(list(text), coloured=False) == text


# ---- where lines end


PROSE = (
    "Words of an answer are not cut in the middle, whatever the width of the terminal is, and spaces go with the line. "
)


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_prose_is_wrapped_as_textwrap_would(width: int) -> None:
    text = (PROSE * 4).strip()
    assert shown(re.findall(r"\w+|\W", text), width) == textwrap.fill(text, width) + "\n"


def test_lists_and_quotes_hang() -> None:
    assert shown(["- one two three\n  - four five six\n10. seven eight\n\nnine ten eleven"], 12).splitlines() == [
        "- one two", "  three", "  - four", "    five six", "10. seven", "    eight", "", "nine ten", "eleven",
    ]  # fmt: skip
    assert bare(shown(["> one two three four"], 12)).splitlines() == ["> one two", "> three four"]
    assert shown([" " * 30 + "one two three"], 12).splitlines() == [
        "one two",
        "      three",
    ]  # half of the line is left


def test_code_is_not_wrapped() -> None:
    code = "x = " + "y + " * 30
    assert bare(shown([f"```\n{code}\n```\n"], 40)) == f"```\n{code}\n```\n"


def test_a_word_longer_than_a_line_comes_out_as_it_grows() -> None:
    out: list[str] = []
    flow = Flow(coloured=False, width=lambda: 10, write=out.append)
    for _ in range(30):
        flow.write("x")
    assert "".join(out) == "x" * 30
    flow.write(" yy zz")
    flow.close()
    assert "".join(out) == "x" * 30 + "\nyy zz\n"  # the terminal has filled its third line


def test_wide_characters_take_two_columns() -> None:
    lines = shown(["中文文本没有空格，所以可以断开。中文 and English在一起 👍👍👍"], 12).splitlines()
    assert max(map(cell_len, lines)) <= 12 and len(lines) <= 6
    for width in range(6, 30):
        lines = shown(["中文（文本）没有空格，所以可以断开。中文“和”在一起！"], width).splitlines()
        assert not any(line[0] in "，。）”！" or line[-1] in "（“" for line in lines)
    assert shown(["ab 한국어는 띄어쓰기"], 10).splitlines() == ["ab", "한국어는", "띄어쓰기"]
    assert shown(["abc ❤️❤️❤️ d"], 10).splitlines() == ["abc ❤️❤️❤️", "d"]


def test_a_resize_counts_from_the_next_line_on() -> None:
    columns = 40
    out: list[str] = []
    flow = Flow(coloured=False, width=lambda: columns, write=out.append)
    words = "word " * 30
    flow.write(words)
    columns = 20  # the line that has begun is longer than that
    flow.write(words)
    columns = 60
    flow.write(words)
    flow.close()
    lines = "".join(out).splitlines()
    assert " ".join(lines).split() == (words * 3).split()
    assert {len(line) for line in lines[:3]} == {39}
    assert {len(line) for line in lines[4:10]} == {19}
    assert {len(line) for line in lines[-3:-1]} == {59}


# ---- nothing is lost


@pytest.mark.parametrize("text", ["**bold", "`code and", "a *b " + "c " * 200, "*" * 50 + "a", "`" * 500, "- " * 100])
def test_little_is_held_back(text: str) -> None:
    out: list[str] = []
    markdown = Markdown(Flow(coloured=True, width=lambda: 80, write=out.append))
    for n, char in enumerate(text, 1):
        markdown.feed(char)
        assert len(re.sub(r"\s", "", bare("".join(out)))) >= len(re.sub(r"\s", "", text[:n])) - LOOK_AHEAD - 2
    markdown.close()
    assert bare("".join(out)).split() == text.split()


def test_words_appear_as_soon_as_they_end() -> None:
    out: list[str] = []
    markdown = Markdown(Flow(coloured=True, width=lambda: 80, write=out.append))
    seen = []
    for piece in ("Some", " words", " and `co", "de` and", " **bo", "ld** more", " *o"):
        markdown.feed(piece)
        seen.append(bare("".join(out)))
    assert seen == [
        "", "Some", "Some words and", "Some words and code", "Some words and code and", "Some words and code and bold",
        "Some words and code and bold more",
    ]  # fmt: skip


def test_a_models_control_characters_do_nothing() -> None:
    evil = "A\x1b[2JB \x1b]0;owned\x07 `\x1b[1mC`\n```\nD\x1b[2J\x9b2J\r\n\x1b[A\n```\n# \x1b[H"
    for coloured in (True, False):
        text = bare(shown(list(evil), 80, coloured=coloured))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
        assert "A␛[2JB" in text and "D␛[2J�2J␍" in text


MARKS = [
    "*", "**", "***", "_", "__", "`", "``", "```", "```py\n", "~~~", "#", "## ", "- ", "1. ", "> ", "---", "\\", "[a](b)", "|",
    " ", "  ", "\t", "\n", "\n\n", "word", "a", "I'm", "1", "2 * 3", "x_y", ".", ",", ":", "(", ")", "中", "文。", "👍", "❤️", "é",
    "word " * 20, " " * 90, "-" * 90, "x" * 90,
]  # fmt: skip
texts = st.lists(st.sampled_from(MARKS) | st.text("ab *_`#>-\n", max_size=5), max_size=30).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in zip(at, at[1:], strict=False)]


cuts = st.lists(st.integers(0, 10**6), max_size=40)


@settings(max_examples=200, deadline=None)
@given(texts, cuts, st.sampled_from([1, 7, 40, 80]))
def test_nothing_is_lost_or_moved(text: str, places: list[int], width: int) -> None:
    pieces = cut(text, places)
    # where no line is full, it is what was written
    end = "" if not text or text.endswith("\n") else "\n"
    assert shown(pieces, coloured=False) == text + end
    # with styles, marks alone are missing: the rest stands in its order
    marks = str.maketrans("", "", "*_`# \t\n>")
    for coloured in (True, False):
        seen = shown(pieces, width, coloured=coloured)
        assert bare(seen).translate(marks) == text.translate(marks)
        assert not re.search(r"\x1b(?!\[[0-9;]*m)|\r|\x08", seen)  # no movement of the cursor


@settings(max_examples=200, deadline=None)
@given(texts, cuts, st.sampled_from([20, 80]))
def test_pieces_make_no_difference(text: str, places: list[int], width: int) -> None:
    assert tagged(shown(cut(text, places), width)) == tagged(shown([text], width))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "word", "longer-one", "中文", "👍", "x" * 15]), max_size=60), st.integers(16, 60))
def test_no_line_is_too_long_and_no_word_is_cut(words: list[str], width: int) -> None:
    text = " ".join(words)
    lines = shown(cut(text, list(range(0, 600, 7))), width).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    assert " ".join(lines).split() == text.split() or any(word in ("中文", "👍") for word in words)
    assert "".join(lines).replace(" ", "") == "".join(words)
