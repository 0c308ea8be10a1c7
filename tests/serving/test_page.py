"""The page at / of equip serve: its files, and in a browser what a user sees and a model cannot do."""

from __future__ import annotations

import json
import os
import random
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from dropin_text import say
from serving import Served, equip_serve, need_program

from equip_cli.serving.program import PAGE

BUDGET = 128
FILES = ("index.html", "page.css", "page.js")

TEXTS = {name: (PAGE / name).read_text(encoding="utf-8") for name in FILES}


# ---- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_page_is_three_files_that_name_each_other_alone() -> None:
    assert sorted(path.name for path in PAGE.iterdir()) == sorted(FILES)
    named = re.findall(r'(?:src|href)="([^"]*)"', TEXTS["index.html"])
    assert sorted(named) == ["#text", "data:,", "page.css", "page.js"]
    assert "url(" not in TEXTS["page.css"] and "@import" not in TEXTS["page.css"]
    # the name of SVG's elements is an address, but nobody asks it
    names = {url for text in TEXTS.values() for url in re.findall(r"\w+://\w[^\s\"'`<>)]*", text)}
    assert names == {"http://www.w3.org/2000/svg"}


@pytest.mark.quick
def test_the_script_parses_no_string_as_html_or_code() -> None:
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|setHTML|\beval\b|new Function|import\("
    assert re.findall(sinks, TEXTS["page.js"]) == []
    assert re.findall(r"<script(?! src=)|\son\w+=|style=", TEXTS["index.html"]) == []


@pytest.mark.quick
def test_a_browser_is_told_to_run_and_load_nothing_else() -> None:
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', TEXTS["index.html"])
    assert found is not None
    rules = {name: words for name, *words in (rule.split() for rule in found[1].split(";"))}
    assert rules.pop("img-src") == ["data:"]
    assert rules.pop("require-trusted-types-for") == ["'script'"]
    assert {word for words in rules.values() for word in words} == {"'none'", "'self'"}
    assert rules["default-src"] == ["'none'"]


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One lane of BUDGET tokens; answers have at most 60."""
    if os.name == "nt":
        pytest.skip("the browser is driven through POSIX pipes")
    need_program()
    log = tmp_path_factory.mktemp("page") / "serve.log"
    with equip_serve(log, "--budget", BUDGET, "-np", 1, "-ub", 64, "--", "-n", 60, "--temp", 0) as served:
        yield served


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def page(window: Browser, server: Served) -> Iterator[Browser]:
    """The page without chats; nothing may fail in it that the test does not ask for, and it talks to its server alone."""
    window.size(1280, 800)
    window.open(server.url)
    window.run("localStorage.clear(), sessionStorage.clear()")
    window.errors.clear()
    window.requests.clear()
    window.open(server.url)
    window.wait("at('policy').textContent.startsWith('policy')")
    yield window
    assert window.errors == []
    assert [url for url in window.requests if not url.startswith((server.url, "data:"))] == []


def rendered(page: Browser, text: str) -> str:
    """The elements that a text becomes, written down by the browser."""
    script = f"(() => {{ const e = document.createElement('div'); e.append(renderMarkdown({json.dumps(text)})); return e.innerHTML; }})()"
    return str(page.run(script))


def finish(page: Browser) -> None:
    """Until the answer is complete, and the page has asked what is kept of it."""
    page.wait(
        "running === null && chat.messages.at(-1).role === 'assistant' && chat.places?.length >= chat.messages.length"
    )
    page.wait("document.querySelector('#log article:last-child .acts')")


def ask(page: Browser, text: str) -> None:
    page.run("at('text').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(f"chat.messages.some(({{ content }}) => content === {json.dumps(text)})")
    finish(page)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b** *c* ~~d~~ `e*f*`", "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e*f*</code></p>"),
        ("**b *c* d**", "<p><strong>b <em>c</em> d</strong></p>"),
        ("snake_case_name, 2 * 3 * 4, \\*no\\*", "<p>snake_case_name, 2 * 3 * 4, *no*</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# A\n## B #", "<h3>A</h3><h4>B</h4>"),
        ("- a\n- b\n  - c\n\n3. d\n4. e", '<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol start="3"><li>d</li><li>e</li></ol>'),
        ("> a\n> b\n\n---", "<blockquote><p>a<br>b</p></blockquote><hr>"),
        ("```py\nx = *1*\n\n  y\n```\nz", '<pre tabindex="0"><code>x = *1*\n\n  y</code></pre><p>z</p>'),
        ("```\nnot closed", '<pre tabindex="0"><code>not closed</code></pre>'),
        ("|a|b|\n|-|:-:|\n|*1*|", '<div class="wide"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td><em>1</em></td><td></td></tr></tbody></table></div>'),
        ("see https://a.example/b.", '<p>see <a href="https://a.example/b" target="_blank" rel="noopener noreferrer">https://a.example/b</a>.</p>'),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(page: Browser, text: str, html: str) -> None:
    assert rendered(page, text) == html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("<b>x</b> & <script>bad()</script>", "<p>&lt;b&gt;x&lt;/b&gt; &amp; &lt;script&gt;bad()&lt;/script&gt;</p>"),
        ("<img src=x onerror=bad()>", "<p>&lt;img src=x onerror=bad()&gt;</p>"),
        ("```html\n</code></pre><script>bad()</script>\n```", '<pre tabindex="0"><code>&lt;/code&gt;&lt;/pre&gt;&lt;script&gt;bad()&lt;/script&gt;</code></pre>'),
        ("[x](javascript:bad()) [y](data:text/html,z) [z]( JAVASCRIPT:bad())", "<p>[x](javascript:bad()) [y](data:text/html,z) [z]( JAVASCRIPT:bad())</p>"),
        ("[x](https://a.example/\"onclick=\"bad())", '<p><a href="https://a.example/&quot;onclick=&quot;bad(" target="_blank" rel="noopener noreferrer">x</a>)</p>'),
        ("![x](https://a.example/y.png)", '<p>!<a href="https://a.example/y.png" target="_blank" rel="noopener noreferrer">x</a></p>'),
        ("&lt;b&gt; &#60;", "<p>&amp;lt;b&amp;gt; &amp;#60;</p>"),
    ],
)  # fmt: skip
def test_nothing_that_a_model_writes_becomes_html(page: Browser, text: str, html: str) -> None:
    assert rendered(page, text) == html


def test_any_text_becomes_allowed_elements_and_ends(page: Browser) -> None:
    # rows of marks, where a scanner may begin again at each, and blocks within blocks
    parts = ["*", "**", "_", "`", "```\n", "[", "](", ")", "<b>", "\n", "\n\n", "> ", "- ", "1. ", "  ", "|", "|-|\n", "#", "# ", "\\",
             "word", " ", "https://a.example", "~~", "\t", "\u2028", "\U0001f600", "javascript:"]  # fmt: skip
    rng = random.Random(7)
    texts = ["".join(rng.choices(parts, k=rng.randrange(1, 60))) for _ in range(400)]
    texts += [part * 20_000 for part in parts] + [("a" + part) * 20_000 for part in parts]
    check = """(texts) => {
        const tags = new Set(), attributes = new Set(), schemes = new Set();
        for (const text of texts) {
            const made = document.createElement("div");
            made.append(renderMarkdown(text));
            for (const each of made.querySelectorAll("*")) {
                tags.add(each.localName);
                for (const name of each.getAttributeNames()) attributes.add(name);
                if (each.localName === "a") schemes.add(each.protocol);
            }
        }
        return [[...tags], [...attributes], [...schemes]];
    }"""
    tags, attributes, schemes = page.run(f"({check})({json.dumps(texts)})")
    allowed = "p br strong em del code pre a h3 h4 h5 h6 hr blockquote ul ol li table thead tbody tr th td div"
    assert {"p", "strong", "a", "li"} <= set(tags) <= set(allowed.split())
    assert set(attributes) <= {"href", "target", "rel", "tabindex", "class", "start"}
    assert schemes == ["https:"]


def test_a_chat_is_held_with_the_keyboard_alone(page: Browser) -> None:
    assert page.run("document.activeElement.id") == "text"
    page.type("My name is Ada.")
    page.press("Enter", modifiers=8)
    page.type("Hello!")
    page.press("Enter")
    page.wait("chat.messages.length")
    assert page.run("chat.messages[0].content") in ("My name is Ada.Hello!", "My name is Ada.\nHello!")
    finish(page)
    # on to the last button of the conversation, which has a visible focus
    page.run("at('log').focus()")
    page.press("Tab")
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Regenerate"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_escape_stops_an_answer_and_the_server_hears_it(page: Browser, server: Served) -> None:
    # longer than the test waits for
    page.run(
        "(() => { const plain = fetch; window.fetch = (path, given) => plain(path, { ...given, body: given.body?.replace('{', '{\"max_tokens\":1000000,\"ignore_eos\":true,') }); })()"
    )
    page.type("Tell me everything.")
    page.press("Enter")
    page.wait("running && chat.messages.at(-1).content.length > 20")
    assert page.run("at('send').hidden") and not page.run("at('stop').hidden")
    page.press("Escape")
    page.wait("running === null && !at('send').hidden")
    said = page.run("chat.messages.at(-1).content")
    page.wait("document.querySelector('#log article:last-child .fate')?.textContent.includes('stopped')")
    page.wait("get('slots').then((lanes) => !lanes[0].is_processing)")
    assert page.run("chat.messages.at(-1).content") == said


def undimmed(page: Browser) -> str:
    """What the page shows as readable, without blanks."""
    script = """[...document.querySelectorAll("#log .body")].map((body) => {
        const copy = body.cloneNode(true);
        copy.querySelectorAll(".gone").forEach((each) => each.remove());
        return copy.textContent;
    }).join("")"""
    return re.sub(r"\s", "", str(page.run(script)))


def test_what_is_no_longer_readable_is_dimmed(page: Browser, server: Served) -> None:
    for turn in range(3):
        ask(page, say(turn, 40))
        now = page.run("chat.now")
        assert page.run("at('n-kept').textContent") == str(now["n_kept"])
        assert page.run("at('n-evicted').textContent") == str(now["n_evicted"])
        assert now["n_kept"] <= BUDGET
    assert now["n_evicted"] > BUDGET
    # the server's own words: its template and its tokenizer, and of these the first tokens and the newest
    messages = [{key: each[key] for key in ("role", "content")} for each in page.run("chat.messages")]
    _, frame = server.post("/apply-template", {"messages": [*messages, {"role": "user", "content": ""}]})
    text = frame["prompt"][
        : frame["prompt"].rindex(messages[-1]["content"].strip()) + len(messages[-1]["content"].strip())
    ]
    _, answer = server.post("/tokenize", {"content": text, "add_special": True, "with_pieces": True})
    pieces = [each["piece"] for each in answer["tokens"]]
    assert abs(len(pieces) - now["n_kept"] - now["n_evicted"]) <= 2  # an answer's tokens, and those of its text
    kept = re.sub(r"<\|\w+\|>|\s", "", "".join(pieces[:4] + pieces[4 + now["n_evicted"] :]).replace("<s>", ""))
    assert len(kept) > 100 and undimmed(page) == re.sub(r"\s", "", kept)
    fates = page.run(
        "[...document.querySelectorAll('#log article')].map((each) => each.querySelector('.fate')?.textContent ?? '')"
    )
    assert fates[0].startswith("partly readable") and fates[1].startswith("no longer readable")
    assert page.run("document.querySelector('#log article:last-child .gone')") is None
    assert page.run("at('which').textContent") == "Dimmed text is no longer readable."


def test_a_system_prompt_that_is_evicted_says_so(page: Browser) -> None:
    page.run("at('system').value = 'Be brief.', at('system').dispatchEvent(new Event('change'))")
    head = "document.querySelector('#system-box summary').textContent"
    ask(page, "Hello!")
    assert page.run(head) == "System prompt: Be brief."
    for turn in range(2):
        ask(page, say(20 + turn, 50))
    assert re.fullmatch(r"System prompt, (no longer|partly) readable by the model: Be brief\.", page.run(head))


def test_a_server_that_tells_what_is_kept_is_believed(page: Browser) -> None:
    def lost(now: dict[str, Any], lane: dict[str, Any] | None) -> Any:
        return page.run(f"lostRanges({json.dumps(now)}, {json.dumps(lane)})")

    now = {"policy": "h2o", "budget": 6, "n_kept": 6, "n_evicted": 4}
    told = lost(now, {"kept": [[0, 2], [4, 6, 0.25], [8, 10]]})
    assert told == {"how": "server", "ranges": [[2, 4, 0], [4, 6, 0.25], [6, 8, 0]]}
    assert lost(now, {"n_kept": 6}) == {"how": "unknown", "ranges": []}
    assert lost({**now, "policy": "streaming"}, None) == {"how": "policy", "ranges": [[4, 8, 0]]}
    assert lost({**now, "n_evicted": 0}, None) == {"how": "all", "ranges": []}


def test_lines_of_memory_stay_within_the_budget(page: Browser) -> None:
    for turn in range(4):
        ask(page, say(10 + turn, 30))
    samples = page.run("chat.samples")
    assert len(samples) >= 2
    assert all(kept <= BUDGET < text + BUDGET and speed > 0 for text, kept, speed in samples)
    assert [text for text, _, _ in samples] == sorted(text for text, _, _ in samples)
    assert page.run("document.querySelectorAll('#memory polyline, #speed polyline').length") == 3
    assert str(BUDGET) in page.run("at('memory').getAttribute('aria-label')")


def test_an_answer_is_written_again_in_the_place_of_the_last(page: Browser) -> None:
    ask(page, "My name is Bruno.")
    page.run("chat.messages.at(-1).content = 'another answer'")
    page.run(
        "[...document.querySelectorAll('#log .acts button')].find((each) => each.textContent === 'Regenerate').click()"
    )
    finish(page)
    assert page.run("chat.messages.length") == 2
    assert page.run("chat.messages[1].content") != "another answer"


def test_chats_and_their_system_prompts_outlive_the_page(page: Browser, server: Served) -> None:
    page.run("at('system').value = 'Be brief.', at('system').dispatchEvent(new Event('change'))")
    ask(page, "First chat.")
    page.run("at('new-chat').click()")
    assert page.run("[at('system').value, chat.messages.length]") == ["", 0]
    ask(page, "Second chat.")
    # neither does what something else has left there stop it
    page.run("localStorage['equip.chat.a'] = '{', localStorage['equip.chat.b'] = '{\"id\": \"b\", \"messages\": [1]}'")
    page.open(server.url)
    page.wait("document.querySelectorAll('#log article').length === 2")
    names = "[...document.querySelectorAll('#chat-list .open')].map((each) => each.textContent)"
    assert page.run(names) == ["Second chat.", "First chat."]
    page.run("document.querySelectorAll('#chat-list .open')[1].click()")
    assert page.run("at('system').value") == "Be brief."
    assert page.run("sent(chat).map(({ role }) => role)") == ["system", "user", "assistant"]
    page.run("window.confirm = () => true")
    page.run("document.querySelector('#chat-list [aria-label=\"Delete First chat.\"]').click()")
    assert page.run(names) == ["Second chat."]
    assert page.run("Object.keys(localStorage).length") == 3


CONTRAST = """(() => {
    const number = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !parent.checkVisibility() || parent.closest("script, .unseen")) continue;
        let back = parent;
        while (back && (number(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0) back = back.parentElement;
        const [a, b] = [light(number(getComputedStyle(parent).color)), light(number(getComputedStyle(back ?? document.body).backgroundColor))];
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data.slice(0, 40)]);
    }
    return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 320])
def test_text_is_readable_in_any_window(page: Browser, scheme: str, width: int) -> None:
    page.size(width, 700, scheme, is_phone=width < 600)
    written = (
        "# A\n`code` [link](https://a.example) **b**\n> quote\n\n```\n"
        + "long line " * 40
        + "\n```\n\n|a|b|\n|-|-|\n|c|d|"
    )
    messages = [{"role": role, "content": f"{written} {i}"} for i in range(2) for role in ("user", "assistant")]
    now = {"policy": "streaming", "budget": 100, "n_kept": 100, "n_evicted": 500, "n_reread": 0}
    page.run(f"chat.messages = {json.dumps(messages)}, chat.now = {json.dumps(now)}, learn(chat)")
    page.wait("document.querySelector('.gone')")
    page.run("showProblem('Something is wrong.')")
    drawers = ["", "chats", "cache"] if width < 600 else [""]
    for drawer in drawers:
        page.run(f"showDrawer({json.dumps(drawer)})")
        found = page.run(CONTRAST)
        assert len(found) > 10
        assert [each for each in found if each[0] < 4.5] == []
        assert page.run("document.documentElement.scrollWidth") <= width
        # nothing that is to be used lies outside
        outside = "[...document.querySelectorAll('button, textarea')].filter((e) => e.checkVisibility()).filter((e) => e.getBoundingClientRect().right > innerWidth + 1).length"
        assert page.run(outside) == 0


def test_a_server_that_has_ended_is_named(window: Browser, tmp_path: Path) -> None:
    need_program()
    with equip_serve(tmp_path / "serve.log", "-np", 1) as served:
        window.open(served.url)
        window.wait("at('policy').textContent.startsWith('policy')")
    window.type("Hello?")
    window.press("Enter")
    window.wait("!at('problem').hidden")
    assert "cannot be reached" in window.run("at('problem').textContent")
    # the question is not lost, and can be asked again
    assert window.run("document.querySelector('#log .acts button').textContent") == "Answer"


def test_the_page_needs_no_key_and_asks_for_the_servers(window: Browser, tmp_path: Path) -> None:
    need_program()
    with equip_serve(tmp_path / "serve.log", "-np", 1, LLAMA_API_KEY="open-sesame") as served:
        for name in FILES:
            with urllib.request.urlopen(f"{served.url}/{name}") as response:
                assert response.read() == (PAGE / name).read_bytes()
        window.open(served.url)
        for given in ("wrong", "open-sesame"):
            window.wait("at('key-box').open")
            window.run("at('key').focus()")
            window.type(given)
            window.press("Enter")
            window.wait("!at('key-box').open || at('key-why').textContent.includes('does not take')")
        window.wait("at('policy').textContent.startsWith('policy')")
        ask(window, "Hello!")
        assert window.run("sessionStorage.getItem('equip.key')") == "open-sesame"
        assert "open-sesame" not in window.run("JSON.stringify(localStorage)")
