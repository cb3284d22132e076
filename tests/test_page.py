"""The page in a browser: an answer streams in, survives reloads, can be stopped, and nothing leaves the machine."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, running_server

pytestmark = pytest.mark.browser

FIGURES = re.compile(r"^\d+ tok/s · (\d\.\d) tok/step · (\d+) tokens?")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("page data"), pace_s=0.02) as (url, _):
        yield url


def test_answer_streams_in_and_the_conversation_survives_a_reload(page: Page) -> None:
    assert page.page.locator(".examples button").count() == 4
    page.send("Tell me about dragons")
    first = page.wait_for_answer(1)
    second = page.wait_for_answer(len(first) + 40)
    assert len(first) < len(second) and page.page.locator("#stop").is_visible()
    assert page.page.locator(".message.assistant strong").first.inner_text() == "very tidy"
    page.wait_for_end()
    match = FIGURES.match(page.figures())
    assert match and float(match[1]) > 1.5 and int(match[2]) == 512
    whole = page.answer()
    assert "?c=" in page.page.url
    page.page.reload()
    page.wait_for_answer(len(whole))
    assert page.answer() == whole
    assert page.page.locator(".message.user .body").inner_text() == "Tell me about dragons"
    page.assert_local_and_quiet()


def test_medusa_switch_applies_to_the_next_answer(page: Page) -> None:
    page.send("echo:one two three four five six seven eight nine ten")
    page.wait_for_end()
    page.page.click("#medusa-switch input")
    page.send("echo:one two three four five six seven eight nine ten")
    page.wait_for_end()
    assert page.answer(0) == page.answer(1) == "one two three four five six seven eight nine ten"
    assert "1.0 tok/step" not in page.figures(0) and "1.0 tok/step" in page.figures(1)
    assert page.page.locator(".message.assistant .tag").all_inner_texts() == ["Medusa", "plain"]
    page.page.reload()
    page.wait_for_answer(5)
    assert not page.page.locator("#medusa-switch input").is_checked()
    page.assert_local_and_quiet()


def test_reload_and_second_tab_follow_a_running_answer_that_only_stop_ends(page: Page) -> None:
    page.send("A long one, please")
    before = page.wait_for_answer(50)
    address = page.page.url
    page.page.reload()
    after = page.wait_for_answer(len(before) + 50)
    assert after.startswith(before[:40])
    tab = Page(page.page.context.new_page(), page.address).open(address.removeprefix(page.address))
    grown = tab.wait_for_answer(len(after) + 1)
    page.page.close()
    tab.wait_for_answer(len(grown) + 40)
    tab.page.click("#stop")
    tab.wait_for_end()
    assert tab.figures().endswith("stopped")
    kept = tab.answer()
    tab.page.reload()
    tab.wait_for_answer(len(kept))
    assert tab.answer() == kept and tab.figures().endswith("stopped")
    tab.assert_local_and_quiet()


def test_answer_goes_on_after_the_browser_was_closed(chromium: Any, address: str) -> None:
    first = chromium.new_context()
    page = Page(first.new_page(), address).open()
    page.send("One that nobody waits for")
    seen = page.wait_for_answer(30)
    shown = page.page.url.removeprefix(address)
    first.close()
    later = chromium.new_context()
    again = Page(later.new_page(), address).open(shown)
    again.wait_for_end()
    assert again.answer().startswith(seen[:30]) and len(again.answer()) > len(seen)
    assert again.figures().endswith("512 tokens · cut at the length limit"), "nothing ended it before its time"
    later.close()


def test_switching_while_streaming_mixes_nothing_up(page: Page) -> None:
    page.send("A story that goes on")
    page.wait_for_answer(30)
    page.page.click(".new-chat")
    page.page.wait_for_selector(".empty")
    page.send("echo:short")
    page.page.wait_for_selector(".message[data-status='waiting'], .message[data-status='running']")
    assert page.page.locator(".message.user .body").all_inner_texts() == ["echo:short"]
    page.page.click(".conversation-list button:has-text('A story that goes on')")
    page.page.wait_for_selector(".message.user .body:has-text('A story')")
    page.wait_for_answer(60)
    page.page.click("#stop")
    page.wait_for_end()
    page.page.go_back()
    page.page.wait_for_selector(".message.user .body:has-text('echo:short')")
    page.page.wait_for_selector(".message.assistant .body p:text-is('short')")
    assert page.page.locator(".message").count() == 2
    page.assert_local_and_quiet()


def test_tree_shows_each_step_as_it_is(page: Page) -> None:
    page.send("echo:one two three four five six seven eight")
    page.wait_for_end()
    step = page.page.evaluate("import('/medusa/shared.js').then(m => m.shared.live.steps.at(-1))")
    classes = page.page.locator("#live .tree-scroll .node").evaluate_all("all => all.map(n => n.getAttribute('class'))")
    expected = ["accepted" if node in step["path"] else "rejected" for node in range(len(step["parents"]))]
    assert classes == [f"node {kind}" for kind in ["root", *expected[1:]]]
    assert page.page.locator("#live .tree-scroll .edge.accepted").count() == step["accepted"] == len(step["path"]) - 1
    chips = page.page.locator("#live .chip").all_inner_texts()
    assert [chip.replace("·", " ") for chip in chips] == step["texts"]
    page.page.reload()
    page.page.wait_for_selector("#live .tree-scroll .node")
    assert page.page.locator("#live .tree-scroll .node").count() == len(classes)


def test_keyboard_sends_and_breaks_lines(page: Page) -> None:
    box = page.page.locator("#composer-text textarea")
    box.focus()
    page.page.keyboard.type("echo:first")
    page.page.keyboard.press("Shift+Enter")
    page.page.keyboard.type("second")
    assert box.input_value() == "echo:first\nsecond"
    page.page.keyboard.press("Enter")
    page.wait_for_end()
    assert page.page.locator(".message.user .body").inner_text() == "echo:first\nsecond"
    assert box.input_value() == ""


def test_model_output_is_text_never_markup_or_a_request(page: Page) -> None:
    hostile = (
        "echo:<script>window.hacked=1</script> <img src=x onerror=window.hacked=1> "
        "![p](http://example.com/a.png) [x](javascript:window.hacked=1) <b>bold</b> [ok](https://example.org/)"
    )
    page.send(hostile)
    page.wait_for_end()
    body = page.page.locator(".message.assistant .body").last
    assert page.page.evaluate("window.hacked") is None
    assert body.locator("img, script, b").count() == 0
    assert body.locator("a").evaluate_all("all => all.map(a => a.href)") == [
        "http://example.com/a.png",
        "https://example.org/",
    ]
    assert "<b>bold</b>" in body.inner_text() and "javascript:" in body.inner_text()
    page.assert_local_and_quiet()


def test_unknown_conversation_says_so(page: Page) -> None:
    page.open("?c=0000000000000000")
    page.page.wait_for_selector(".notice:has-text('not here any more')")
    page.send("echo:still works")
    page.wait_for_end()
    assert page.answer() == "still works"


@pytest.mark.parametrize("width", [390, 1280, 1920, 2560])
def test_page_fits_its_window_and_parts_have_names(chromium: Any, address: str, width: int) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme="dark")
    page = Page(context.new_page(), address).open()
    sizes = page.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert sizes == [width, 844]
    assert page.page.get_by_role("textbox", name="Message").is_visible()
    assert page.page.get_by_role("checkbox", name="Medusa").is_visible()
    assert page.page.get_by_role("button", name="Send", exact=True).is_visible()
    nameless = page.page.locator("button:visible").evaluate_all(
        "all => all.filter(b => !(b.textContent.trim() || b.getAttribute('aria-label'))).map(b => b.outerHTML)"
    )
    assert nameless == []
    context.close()


def test_missing_heads_and_failures_are_told_where_one_looks(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, no_heads=True, fail_after=6) as (url, _):
        page = Page(chromium.new_page(), url).open()
        page.page.wait_for_selector(".badge.warn:has-text('Medusa unavailable: the heads do not fit this model')")
        page.send("Why?")
        page.page.wait_for_selector(".answer-error:has-text('The engine failed unexpectedly')")
        assert page.answer() != ""


def test_loading_is_told_and_a_message_sent_meanwhile_is_answered(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, load_s=4) as (url, _):
        page = Page(chromium.new_page(), url).open()
        page.page.wait_for_selector("#status .facts:has-text('Reading Fake-135M…')")
        page.send("echo:sent before the model was there")
        page.page.wait_for_selector(".message.assistant[data-status='waiting']")
        page.wait_for_end()
        assert page.answer() == "sent before the model was there"
        page.page.wait_for_selector(".facts .model:text-is('Fake-135M')")
        page.assert_local_and_quiet()
        page.page.context.close()


def test_model_that_does_not_load_is_told_with_its_remedy(chromium: Any, tmp_path: Path) -> None:
    sentence = "The file model.gguf is damaged; run launcher.py --repair."
    with running_server(tmp_path, load_error=sentence) as (url, _):
        page = Page(chromium.new_page(), url).open()
        page.page.wait_for_selector(f".badge.bad:has-text('The model did not load. {sentence}')")
        page.send("Anybody there?")
        page.page.wait_for_selector(f".answer-error:has-text('{sentence}')")
        page.page.context.close()


def test_stale_tab_goes_on_after_a_restart(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, pace_s=0.02) as (url, process):
        page = Page(chromium.new_page(), url).open()
        page.send("Tell me about dragons")
        partial = page.wait_for_answer(60)
        process.terminate()
        assert process.wait(20) == 0
    with running_server(tmp_path, port=int(url.rsplit(":", 1)[1].strip("/"))) as (again, _):
        assert again == url
        page.page.reload()
        page.wait_for_answer(60)
        assert page.answer()[:50] == partial[:50]
        assert page.figures().endswith("interrupted when the app ended")
        page.send("echo:back again")
        page.page.wait_for_selector(".message.assistant .body p:text-is('back again')")


@pytest.mark.slow
def test_real_model_answers_the_same_with_the_switch_on_and_off(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, engine="real") as (url, _):
        page = Page(chromium.new_page(), url).open()
        page.page.wait_for_selector(".facts .badge", timeout=120_000)
        page.send("Name three colours.")
        page.wait_for_end(120)
        page.page.click("#medusa-switch input")
        page.page.click(".new-chat")
        page.page.wait_for_selector(".empty")
        page.send("Name three colours.")
        page.wait_for_end(120)
        plain = page.answer()
        page.page.click(".conversation-list li:last-child button")
        page.page.wait_for_selector(".message.assistant .tag:text-is('Medusa')")
        assert page.answer() == plain != ""
        page.assert_local_and_quiet()
