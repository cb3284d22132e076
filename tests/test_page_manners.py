"""The page's manners: no serious finding of axe-core in light and dark, and nothing asked for outside this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe import axe_script
from browser import Page, running_server

pytestmark = pytest.mark.browser

# What is fading in, such as the colours of the theme just chosen, is judged when it is there; what never ends, as it is.
RUN_AXE = """async () => {
    const fading = document.getAnimations().filter(a => a.effect.getComputedTiming().endTime < Infinity);
    await Promise.allSettled(fading.map(a => a.finished));
    const found = await axe.run(document, {resultTypes: ["violations"]});
    return found.violations.filter(v => ["serious", "critical"].includes(v.impact))
        .map(v => `${v.id}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(" | ")}`);
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
    context.close()
    assert not any(found.values()), found


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
