"""Medusa as it can be seen in a browser: tokens by step, the tree, going through the steps, the gauges."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, running_server
from fake_engine import MEASURED, PATTERN

pytestmark = pytest.mark.browser

LABEL_BOXES = """all => all.filter(t => t.textContent && getComputedStyle(t).visibility === "visible").map(t => {
    const box = t.getBoundingClientRect();
    return [box.left, box.top, box.right, box.bottom, parseFloat(getComputedStyle(t).fontSize)];
})"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("tree data"), pace_s=0.015) as (url, _):
        yield url


def words(count: int) -> str:
    return "echo:" + " ".join(f"word{number}" for number in range(count))


def answered(page: Page, count: int = 60) -> Any:
    """The row of a whole answer of `count` words."""
    page.send(words(count))
    page.wait_for_end()
    return page.page.locator(".message.assistant").last


def shown_step(page: Page) -> int:
    return int(page.page.locator(".step-count").inner_text().split(" / ")[0])


def test_tokens_view_has_tints_ticks_and_words_for_each_step(page: Page) -> None:
    row = answered(page, 60)
    text = row.locator(".body").inner_text()
    row.get_by_role("button", name="Tokens", exact=True).click()
    row.locator(".tokens .step").first.wait_for()
    assert row.locator(".body").is_hidden()
    assert row.locator(".tokens").text_content() == text
    tints = row.locator(".tokens .token.drafted").evaluate_all(
        "all => all.map(t => [t.parentNode.dataset.step % 2, getComputedStyle(t).backgroundColor])"
    )
    assert len({tuple(tint) for tint in tints}) == 2, "one tint for odd steps, another for even ones"
    plain = row.locator(".tokens .token.own").first
    assert plain.evaluate("t => getComputedStyle(t).backgroundImage + getComputedStyle(t).backgroundColor") == (
        "nonergba(0, 0, 0, 0)"
    )
    heads = row.locator(".tokens .step").nth(4).locator(".token").evaluate_all("all => all.map(t => t.dataset.head)")
    assert heads == ["1", "2", "3", None] and PATTERN[4] == 3
    sizes = (
        row.locator(".tokens .step")
        .nth(4)
        .locator(".drafted")
        .evaluate_all("all => all.map(t => getComputedStyle(t).backgroundSize)")
    )
    assert len(set(sizes)) == 3, "each head has its own number of ticks, so colour is not alone"
    row.locator(".tokens .step").nth(4).hover()
    assert row.locator(".step-tip").inner_text() == "step 5: 3 of 3 drafted tokens accepted"
    assert page.page.locator(".step-caption").inner_text().startswith("Step 5: 3 of 3")
    row.get_by_role("button", name="Answer", exact=True).click()
    assert row.locator(".body").is_visible() and row.locator(".tokens").is_hidden()
    page.assert_local_and_quiet()


def test_tokens_view_grows_with_a_running_answer(page: Page) -> None:
    page.send("A story that goes on")
    page.wait_for_answer(40)
    row = page.page.locator(".message.assistant").last
    row.get_by_role("button", name="Tokens", exact=True).click()
    row.locator(".tokens .step").nth(40).wait_for()
    page.page.click("#stop")
    page.wait_for_end()
    page.page.wait_for_function(
        "([...document.querySelectorAll('.tokens .step')].at(-1)?.dataset.step ?? '') === "
        "document.querySelector('.step-count').textContent.split(' / ')[1]"
    )
    numbers = row.locator(".tokens .step").evaluate_all("all => all.map(s => Number(s.dataset.step))")
    assert numbers == list(range(1, len(numbers) + 1))


def test_steps_of_an_old_answer_are_gone_through_by_keys_slider_and_replay(page: Page) -> None:
    answered(page, 60)
    answered(page, 30)
    page.page.reload()
    old = page.page.locator(".message.assistant").first
    old.get_by_role("button", name="Tokens", exact=True).click()
    old.locator(".tokens .step").nth(2).click()
    page.page.wait_for_function("document.querySelector('.step-count').textContent.startsWith('3 / ')")
    total = old.locator(".tokens .step").count()
    assert page.page.locator(".step-count").inner_text() == f"3 / {total}"
    page.page.locator(".tree-scroll").focus()
    page.page.keyboard.press("ArrowRight")
    page.page.wait_for_function("document.querySelector('.step-count').textContent.startsWith('4 / ')")
    page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("ArrowLeft")
    page.page.wait_for_function("document.querySelector('.step-count').textContent.startsWith('2 / ')")
    assert old.locator(".tokens .is-current").get_attribute("data-step") == "2"
    slider = page.page.get_by_role("slider", name="Step")
    slider.fill("7")
    page.page.wait_for_function("document.querySelector('.step-count').textContent.startsWith('7 / ')")
    assert page.page.locator("#live .tree-scroll .edge.accepted").count() == PATTERN[6]
    page.page.get_by_label("Speed of the replay").select_option("0.25")
    page.page.get_by_role("button", name="Replay").click()
    page.page.wait_for_selector(".transport button[aria-label='Pause']")
    page.page.wait_for_function("parseInt(document.querySelector('.step-count').textContent) > 9")
    page.page.wait_for_function(f"document.querySelector('.step-count').textContent === '{total} / {total}'")
    page.page.wait_for_selector(".transport button[aria-label='Replay']")
    page.assert_local_and_quiet()


def test_tree_is_laid_out_once_and_drawn_at_most_ten_times_a_second(page: Page) -> None:
    page.page.evaluate(
        """() => {
          window.drawn = [];
          window.builds = new Set();
          new MutationObserver(() => {
            const caption = document.querySelector(".step-caption")?.textContent;
            window.builds.add(document.querySelector("#live .tree-scroll svg"));
            if (caption && caption !== window.drawn.at(-1)?.[1]) window.drawn.push([performance.now(), caption]);
          }).observe(document.querySelector("#live"), {subtree: true, childList: true, characterData: true});
        }"""
    )
    page.send("A story that goes on")
    page.wait_for_answer(80)
    quiet = page.page.locator("#live .tree-scroll.is-quiet .label").first
    assert quiet.evaluate("t => getComputedStyle(t).visibility") == "hidden"
    page.page.locator(".tree-scroll").hover()
    page.page.wait_for_selector("#live .tree-scroll:not(.is-quiet)")
    page.page.get_by_role("button", name="Pause").click()
    page.page.wait_for_selector(".follow-live:visible")
    held = shown_step(page)
    page.wait_for_answer(len(page.answer()) + 80)
    assert shown_step(page) == held, "a held step stays while the answer goes on"
    page.page.click(".follow-live")
    page.page.wait_for_function(f"parseInt(document.querySelector('.step-count').textContent) > {held + 5}")
    page.wait_for_end()
    times = [time for time, _ in page.page.evaluate("window.drawn")]
    busiest = max(sum(start <= time < start + 1000 for time in times) for start in times)
    assert len(times) > 5 and busiest <= 13, "ten a second, and the few that a person asked for"
    # One shape: the sample's drawing, then one for all steps.
    assert page.page.evaluate("window.builds.size") <= 2


@pytest.mark.parametrize("nodes", [2, 64])
def test_small_and_large_trees_are_legible_at_1280(chromium: Any, tmp_path: Path, nodes: int) -> None:
    with running_server(tmp_path, pace_s=0.001, tree=nodes, depth=2 if nodes == 2 else 5) as (url, _):
        page = Page(chromium.new_page(viewport={"width": 1280, "height": 800}), url).open()
        answered(page, 40)
        assert page.page.locator("#live .tree-scroll .node").count() == nodes + 1
        boxes = page.page.locator("#live .tree-scroll .label").evaluate_all(LABEL_BOXES)
        assert len(boxes) >= nodes + 1 and min(box[4] for box in boxes) >= 10
        room = page.page.locator("#live .tree-scroll").evaluate("t => [t.scrollWidth, t.clientWidth]")
        assert room[0] <= room[1], "no sideways scrolling at 1280"
        for index, (left, top, right, bottom, _) in enumerate(boxes):
            for other in boxes[index + 1 :]:
                apart = right <= other[0] or other[2] <= left or bottom <= other[1] + 2 or other[3] <= top + 2
                assert apart, "labels overlap"
        # The model's own token stands beside the drafts, so that even a chain of drafts is seen as a choice.
        assert page.page.locator("#live .tree-scroll .slot.shown .label").text_content() != ""
        assert page.page.locator("#live .tree-scroll .way.shown").count() == 1


def test_accepted_is_solid_rejected_is_hollow_and_paler_the_less_likely(page: Page) -> None:
    answered(page, 60)
    page.page.get_by_role("slider", name="Step").fill("5")
    page.page.wait_for_selector("#live .edge.accepted", state="attached")
    looks = page.page.locator("#live .tree-scroll .node circle").evaluate_all(
        """all => all.map(c => {
            const look = getComputedStyle(c);
            return [c.parentNode.classList[1], look.fill === look.stroke, Number(look.opacity)];
        })"""
    )
    assert all(filled is (kind != "rejected") for kind, filled, _ in looks if kind != "root")
    assert {opacity for kind, _, opacity in looks if kind == "accepted"} == {1}
    step = page.page.evaluate("document.querySelector('#live .tree-scroll').shown.step")
    paler = sorted((step["probabilities"][node], looks[node][2]) for node in range(9) if looks[node][0] == "rejected")
    assert [opacity for _, opacity in paler] == sorted(opacity for _, opacity in paler) and paler[0][1] < paler[-1][1]
    widths = page.page.locator("#live .edge").evaluate_all(
        "all => all.map(e => [e.classList.contains('accepted'), parseFloat(getComputedStyle(e).strokeWidth)])"
    )
    assert min(width for kept, width in widths if kept) > max(width for kept, width in widths if not kept)
    texts = page.page.locator("#live .tree-scroll .node .label").all_text_contents()
    assert texts[0] == step["labels"][0].strip() and all(texts)


def test_labels_say_the_shown_step_when_they_come_back(page: Page) -> None:
    page.send("A story that goes on")
    page.page.wait_for_selector("#live .tree-scroll.is-quiet")
    page.wait_for_end()
    page.page.wait_for_selector("#live .tree-scroll:not(.is-quiet)")
    shown = page.page.evaluate("document.querySelector('#live .tree-scroll').shown.step.labels.map(l => l.trim())")
    texts = page.page.locator("#live .tree-scroll .node .label").all_text_contents()
    pairs = [(label, text.rstrip("…")) for label, text in zip(shown, texts, strict=True) if label.isalnum()]
    assert len(pairs) > 4 and all(text and label.startswith(text) for label, text in pairs)


def test_replay_goes_from_a_quarter_to_full_speed(page: Page) -> None:
    answered(page, 30)
    speeds = page.page.get_by_label("Speed of the replay").locator("option").all_inner_texts()
    assert speeds[:3] == ["1×", "½×", "¼×"]


def test_tree_scrolls_on_a_phone(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, pace_s=0.001, tree=64) as (url, _):
        page = Page(chromium.new_page(viewport={"width": 390, "height": 844}), url).open()
        answered(page, 20)
        page.page.get_by_role("button", name="Medusa at work").click()
        tree = page.page.locator("#live .tree-scroll")
        tree.wait_for()
        assert tree.evaluate("t => t.scrollHeight > t.clientHeight && getComputedStyle(t).overflowY === 'auto'")
        assert page.page.evaluate("document.documentElement.scrollWidth") == 390


def test_gauges_show_speeds_depths_and_the_measured_curve(page: Page) -> None:
    answered(page, 120)
    numbers = page.page.locator("#live .gauge strong").all_inner_texts()
    assert len(numbers) == 3 and float(numbers[0]) > 50 and float(numbers[1]) > 50 and 1.5 < float(numbers[2]) < 3
    texts = page.page.locator("#live .depth > :last-child").all_inner_texts()
    shares = [int(text.removesuffix(" %")) for text in texts]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and shares[2] > 0
    bars = page.page.locator("#live .recent path").evaluate_all(
        "all => all.map(p => p.getAttribute('d').split('M').length - 1)"
    )
    recent = page.page.evaluate("import('/medusa/shared.js').then(m => m.shared.live.recent)")
    assert bars == [sum(count > 0 for count in recent), sum(count == 0 for count in recent)] and all(bars)
    page.page.wait_for_selector("#live .curve .chosen")
    assert page.page.locator("#live .curve .point").count() == len(MEASURED["nodes"])
    assert page.page.locator("#live .chosen-name").text_content() == "8 · 9.1 ms"
    assert page.page.locator("#live .why").inner_text() == MEASURED["reason"]


def test_a_head_that_never_hits_shows_zero(page: Page) -> None:
    page.send("echo:only three words")
    page.wait_for_end()
    shares = page.page.locator("#live .depth > :last-child").all_inner_texts()
    assert len(shares) == 3 and shares[-1] == "0 %"


def test_status_line_says_what_medusa_gains_here(page: Page) -> None:
    page.page.wait_for_selector(".badge[title='3 heads draft']:has-text('Medusa on')")
    assert page.page.locator(".facts .fact").all_inner_texts() == ["Fake-135M", "CPU · 129 MB · 4-bit"]
    for _ in range(2):
        answered(page, 120)
    page.page.click("#medusa-switch input")
    page.page.wait_for_selector(".badge:has-text('Medusa off')")
    for _ in range(2):
        answered(page, 120)
    page.page.wait_for_selector(".badge:has-text('faster, measured here')")
    page.page.click(".new-chat")
    page.page.wait_for_selector(".badge:has-text('Medusa on')")
    gain = page.page.evaluate("fetch('/medusa/engine').then(r => r.json())")["measured"]
    assert json.dumps(gain["gain"]) and gain["gain"] > 1.5
    assert f"×{gain['gain']:.1f} faster, measured here" in page.page.locator(".facts").inner_text()


def test_status_line_says_that_medusa_is_slower_here(page: Page) -> None:
    def slower(route: Any) -> None:
        view = route.fetch().json()
        view["measured"] = {"gain": 0.82, "medusa": 82, "plain": 100, "answers": [3, 4]}
        route.fulfill(json=view)

    page.page.route("**/medusa/engine", slower)
    page.open()
    page.page.wait_for_selector(".badge.warn:has-text('×0.82: slower, measured here')")
