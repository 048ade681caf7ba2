"""The page in a real browser: type, press Enter, see the canvas fill; slider, modes, refill, phone width."""

import json

import pytest

pytest.importorskip("websockets", reason="needs the test extra")
from support import browser

pytestmark = [
    pytest.mark.skipif(browser.find() is None, reason="there is no Chromium: apt-get install chromium"),
]
MASKS = "document.querySelectorAll('.answer .m').length"
IDLE = "panels.length && panels.every(p => !p.running && !p.queue)"


@pytest.fixture(scope="module")
def page(served, tmp_path_factory):
    with browser.open_page(f"{served.url}/", tmp_path_factory.mktemp("browser")) as page:
        page.until("typeof model === 'object' && model.id === 'tiny'")
        yield page
        outside = [
            url for m in page.messages if m["method"] == "Network.requestWillBeSent"
            if not (url := m["params"]["request"]["url"]).startswith((served.url, "data:"))
        ]  # fmt: skip
        wrong = [
            m for m in page.messages if m["method"] == "Runtime.exceptionThrown"
            or (m["method"] == "Log.entryAdded" and m["params"]["entry"]["level"] == "error")
        ]  # fmt: skip
        assert not wrong and not outside


def set_fields(page, **fields):
    for name, value in fields.items():
        page.run(f"$('{name}').value = {json.dumps(value)}")
    page.run("$('ask').oninput()")


def choose(page, mode):
    page.run(f"document.querySelector('[value={mode}]').click()")


def test_type_enter_see_the_canvas_fill_and_go_back(page):
    choose(page, "diffusion")
    set_fields(page, which="confidence", steps=6, length=16, seed=1)
    page.run("$('prompt').focus()")
    page.type("Line 1")
    page.key("Enter", "\r")
    page.until(IDLE)
    assert page.run(MASKS) == 0 and page.run("panels[0].frames.length") > 6
    assert page.run("panels[0].frames.some(f => f.tokens.includes(null))")  # it was not there at once
    assert page.run("panels[0].body.children.length") == page.run("panels[0].count") > 0
    stats = page.run("panels[0].stats.innerText")
    assert "NFE" in stats and "tokens/s" in stats and "–" not in stats
    page.run("panels[0].range.value = 0; panels[0].range.oninput()")
    assert page.run(MASKS) > 0 and page.run("panels[0].at.value").startswith("pass 1 of")
    page.run("panels[0].range.value = panels[0].range.max; panels[0].range.oninput()")
    assert page.run(MASKS) == 0


def test_other_modes_write_in_their_colours_side_by_side(page):
    choose(page, "autoregressive")
    set_fields(page, beside="confidence", length=16, seed=2)
    page.run("$('go').click()")
    page.until(IDLE)
    assert page.run("panels.map(p => p.sampler).join()") == "autoregressive,confidence"
    assert page.run("panels.every(p => p.seed === 2)")
    writers = "panels.map(p => [...new Set(p.frames.at(-1).tokens.map(t => t[2]))].join())"
    assert page.run(f"{writers}.join('|')") == "0|1"
    set_fields(page, beside="")


def test_a_span_is_selected_and_filled_in_again(page):
    choose(page, "diffusion")
    set_fields(page, which="confidence", length=16, seed=3)
    page.run("$('go').click()")
    page.until(IDLE)
    before = page.run("panels[0].frames.at(-1).tokens")
    assert len(before) > 8
    page.run("getSelection().setBaseAndExtent(panels[0].spans[2].firstChild, 0, panels[0].spans[4].firstChild, 1); 1")
    page.until("!$('tools').hidden")
    page.run("$('prompt').blur(); 1")
    page.key("f", "f")
    page.until(f"panels[0].frames.length < 9 && {IDLE}")
    after = page.run("panels[0].frames.at(-1).tokens")
    assert page.run("panels[0].error.textContent") == ""
    assert len(after) == len(before) and after[:2] == before[:2] and after[5:] == before[5:] and None not in after


def test_a_span_takes_words_that_are_typed_and_the_text_goes_on_from_them(page):
    choose(page, "autoregressive")
    set_fields(page, length=12, seed=4)
    page.run("$('prompt').value = 'Line 1'; $('go').click()")
    page.until(IDLE)
    before, frames = page.run("panels[0].frames.at(-1).tokens"), page.run("panels[0].frames.length")
    page.run("getSelection().setBaseAndExtent(panels[0].spans[2].firstChild, 0, panels[0].spans[4].firstChild, 1); 1")
    page.until("!$('tools').hidden")
    assert page.run("$('words').value") == "".join(token[0] for token in before[2:5])
    page.run("$('prompt').blur(); 1")
    page.key("e", "e")
    page.until("document.activeElement === $('words')")
    assert page.run("panels[0].spans.map(s => s.classList.contains('picked')).lastIndexOf(true)") == 4  # still seen
    page.type("the cat")
    page.key("Enter", "\r")
    page.until(f"panels[0].frames.length === {frames + 1} && {IDLE}")
    after = page.run("panels[0].frames.at(-1).tokens")
    own = [token for token in after if token[2] == 3]
    assert "".join(token[0] for token in own) == "the cat" == page.run("$('words').value")
    assert after == before[:2] + own + before[5:] and page.run("panels[0].frames.at(-1).final") == len(after)
    assert page.run("panels[0].body.querySelectorAll('.w3').length") == len(own) and page.run("$('tools').hidden")
    assert page.run("document.querySelectorAll('.picked').length") == 0
    last = 2 + len(own)  # the text is written on from the typed words
    ends = f"panels[0].spans[{last}].firstChild"
    page.run(f"getSelection().setBaseAndExtent({ends}, 0, {ends}, 1); 1")
    page.until("!$('tools').hidden")
    page.run("again(false); 1")
    page.until(f"panels[0].frames.length > 1 && {IDLE}")
    assert page.run("panels[0].frames.at(-1).tokens")[:last] == after[:last]


def test_it_fits_a_phone_and_is_dark_at_night(page, tmp_path):
    for width in (1100, 390):
        page.size(width, 800)
        assert page.run("document.documentElement.scrollWidth") <= width
    light = page.run("getComputedStyle(document.body).backgroundColor")
    page.dark(True)
    assert page.run("getComputedStyle(document.body).backgroundColor") != light
    page.screenshot(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 5000
