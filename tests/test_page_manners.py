"""The page's manners: no serious finding of axe-core in light and dark, and nothing asked for outside this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe import axe_script
from browser import Page, running_server
from page_cost import measure_frames

pytestmark = pytest.mark.browser

# What is fading in, such as the colours of a theme just chosen, is judged when it is there; what never ends, as it is.
RUN_AXE = """async () => {
    const fading = document.getAnimations().filter(a => a.effect.getComputedTiming().endTime < Infinity);
    await Promise.allSettled(fading.map(a => a.finished));
    const found = await axe.run(document, {resultTypes: ["violations"]});
    return found.violations.filter(v => ["serious", "critical"].includes(v.impact))
        .map(v => `${v.id}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(" | ")}`);
}"""


WIDEST = """() => Math.max(document.documentElement.scrollWidth, ...[...document.querySelectorAll(
    "#status *, #thread .message, #composer *, #panel, dialog[open], dialog[open] *")]
    .filter(n => n.checkVisibility({visibilityProperty: true}))
    .filter(n => !n.closest(".only-spoken, pre, .table-scroll, .formula"))
    .map(n => Math.round(n.getBoundingClientRect().right)))"""

FOCUSED = """() => {
    const node = document.activeElement;
    const box = node.closest("#composer-card, .search") || node;
    const look = getComputedStyle(box);
    const name = node.getAttribute("aria-label") || node.labels?.[0]?.innerText || node.innerText || node.tagName;
    const accent = getComputedStyle(document.querySelector("#send")).borderColor;
    const isSeen = look.outlineStyle === "solid" || look.borderColor === accent;
    return [node === document.body ? "BODY" : name.trim(), isSeen];
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("manners data"), pace_s=0.001) as (url, _):
        yield url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_serious(chromium: Any, address: str, width: int, scheme: str) -> None:
    script = axe_script()
    # A context of its own, without the page's content policy, so that the checker may be put into it.
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page = Page(context.new_page(), address).open()
    page.page.add_script_tag(content=script)
    found = {"empty page": page.page.evaluate(RUN_AXE)}
    page.send("Tell me about dragons")
    page.wait_for_end()
    page.page.wait_for_selector(".badge:has-text('Medusa')")
    found["answer"] = page.page.evaluate(RUN_AXE)
    page.page.locator(".views button").last.click()
    page.page.locator(".tokens .step").nth(4).click()
    if width < 1000:
        page.page.get_by_role("button", name="Medusa at work").click()
        page.page.wait_for_selector("#live .step-caption")
    found["tokens and panel"] = page.page.evaluate(RUN_AXE)
    if width > 1000:
        page.page.get_by_role("button", name="Race", exact=True).click()
        page.page.wait_for_selector(".race-result:visible")
        found["race"] = page.page.evaluate(RUN_AXE)
    found.update(dialogs(page))
    context.close()
    assert not any(found.values()), found


def dialogs(page: Page) -> dict[str, list[str]]:
    """What the checker finds in the list's search and menu, and in each dialog."""
    found = {}
    if page.page.locator("dialog[open]").count():
        page.page.keyboard.press("Escape")
    if page.page.evaluate("document.documentElement.dataset.panel") == "open":
        page.page.keyboard.press("Alt+p")
    page.page.keyboard.press("Alt+s")
    page.page.keyboard.type("dragon")
    page.page.wait_for_selector(".hit")
    found["search"] = page.page.evaluate(RUN_AXE)
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector(".conversation-list .conversation:not(.hit)")
    page.page.locator(".conversation-list .more").first.click()
    found["menu"] = page.page.evaluate(RUN_AXE)
    page.page.keyboard.press("Escape")
    for name in ("Import and export", "Deleted", "Shortcuts"):
        page.page.click(f".sidebar-foot button:has-text('{name}')")
        page.page.wait_for_selector("dialog[open] .sheet > *")
        found[name] = page.page.evaluate(RUN_AXE)
        page.page.keyboard.press("Escape")
    page.page.keyboard.press("Alt+Comma")
    page.page.wait_for_selector("dialog[open] .settings")
    found["settings"] = page.page.evaluate(RUN_AXE)
    return found


def test_page_at_rest_draws_nothing(chromium: Any, address: str) -> None:
    """A page that asks for frames takes the processor from the engine, also while nothing is to be seen."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.add_init_script(
        """window.asked = 0;
        const own = window.requestAnimationFrame;
        window.requestAnimationFrame = (callback) => { window.asked += 1; return own(callback); };"""
    )
    page = Page(context.new_page(), address).open()
    page.send("echo:a short answer")
    page.wait_for_end()
    page.page.evaluate("new Promise(done => setTimeout(done, 7000))")  # Gradio's picture of loading moves on a while
    page.page.evaluate("window.asked = 0")
    page.page.evaluate("new Promise(done => setTimeout(done, 1000))")
    assert page.page.evaluate("window.asked") == 0
    moving = page.page.evaluate("document.getAnimations().filter(a => a.playState === 'running').length")
    assert moving == 0
    context.close()


def test_streaming_keeps_frames_short(chromium: Any) -> None:
    frames = measure_frames(chromium)
    assert frames["messages"] == 40 and "512 tokens" in frames["answer"] and frames["frames"] > 60
    assert frames["p95_ms"] < 50, frames


def test_empty_page_teaches_in_three_sentences_with_four_examples(chromium: Any, address: str) -> None:
    page = Page(chromium.new_page(), address).open()
    words = page.page.locator(".empty > p").inner_text()
    assert len([part for part in words.split(". ") if part.strip()]) == 3 and words.endswith(".")
    assert page.page.locator(".examples button").count() == 4
    page.page.locator(".examples button").first.click()
    asked = page.page.input_value("#composer-text textarea")
    assert asked == page.page.locator(".examples button span").first.inner_text()
    assert page.page.evaluate("document.activeElement.closest('#composer-text') !== null")
    page.page.context.close()


@pytest.mark.parametrize("width", [390, 640, 820, 1099, 1100, 1600, 2560])
def test_nothing_is_wider_than_the_window(chromium: Any, address: str, width: int) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 800})
    page = Page(context.new_page(), address).open()
    page.send(f"echo:{'long' * 60} `code{'x' * 90}` $a+b$\n\n```\n{'wide ' * 60}\n```\n\n|a|b|\n|-|-|\n|{'y' * 300}|z|")
    page.wait_for_end()
    for state in ("answer", "panel"):
        assert page.page.evaluate(WIDEST) <= width, state
        page.page.get_by_role("button", name="Medusa at work").click()
    page.page.keyboard.press("Alt+Comma")
    page.page.wait_for_selector("dialog[open]")
    assert page.page.evaluate(WIDEST) <= width
    context.close()


def test_every_part_can_be_reached_and_seen_by_keyboard(chromium: Any, address: str) -> None:
    """Tab goes through the whole page, and whatever has the focus shows it."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = Page(context.new_page(), address).open()
    page.send("echo:an answer to walk over")
    page.wait_for_end()
    page.page.evaluate("document.activeElement.blur()")
    reached, unseen = set(), set()
    for _ in range(60):
        page.page.keyboard.press("Tab")
        name, is_seen = page.page.evaluate(FOCUSED)
        reached.add(name)
        if not is_seen:
            unseen.add(name)
    assert unseen <= {"BODY"}, unseen
    expected = {"New chat", "Search titles and messages", "Message", "Send", "Answer", "Tokens", "Candidate tree"}
    expected |= {"Step", "Replay"}
    assert {name for name in expected if any(there.startswith(name) for there in reached)} == expected
    context.close()


def test_a_whole_visit_asks_for_nothing_outside(chromium: Any, address: str) -> None:
    """Every request of the browser, seen below the page: workers, fonts and prefetches too."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = Page(context.new_page(), address).open()
    page.send("echo:![p](https://example.com/x.png) <img src=https://example.com/y.png> https://example.com/z $x^2$")
    page.wait_for_end()
    page.page.locator(".views button").last.click()
    page.page.locator(".tokens .step").first.click()
    page.page.get_by_role("button", name="Race", exact=True).click()
    page.page.wait_for_selector(".race-result:visible")
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    page.assert_local_and_quiet()
    context.close()


def test_reduced_motion_is_honoured(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, pace_s=0.02) as (url, _):
        for calm in (True, False):
            motion = "reduce" if calm else "no-preference"
            page = Page(chromium.new_page(reduced_motion=motion), url).open()
            page.send("A story that goes on")
            page.page.wait_for_selector(".message.assistant[data-status='running'] .body p")
            duration = page.page.locator("#medusa-switch input").evaluate(
                "input => parseFloat(getComputedStyle(input, '::after').transitionDuration)"
            )
            assert (duration < 0.01) is calm
            page.page.click("#stop")
            page.wait_for_end()
            page.page.close()
