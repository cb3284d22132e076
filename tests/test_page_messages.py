"""Messages in a browser: versions, settings, context, drafts, titles, copies, code and formulas."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, running_server

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("messages"), pace_s=0.002) as (url, _):
        yield url


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown = Page(context.new_page(), address)
    yield shown.open()
    context.close()


def act(page: Page, name: str, message: str = ".message.assistant") -> None:
    row = page.page.locator(message).last
    row.hover()
    row.locator(f"[data-act='{name}']").click()


def count(page: Page, message: str = ".message.assistant") -> str:
    return page.page.locator(f"{message} .branch-count").last.inner_text()


def test_edit_regenerate_and_steps_between_versions(page: Page) -> None:
    page.send("echo:one")
    page.wait_for_end()
    act(page, "edit", ".message.user")
    page.page.fill(".edit-box textarea", "echo:two")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector(".message.assistant .body p:text-is('two')")
    page.wait_for_end()
    assert count(page, ".message.user") == "2/2"
    act(page, "regenerate")
    page.page.wait_for_selector(".message.assistant .branch-count:text-is('2/2')")
    page.page.wait_for_selector(".notice.calm:has-text('At temperature 0')")
    page.wait_for_end()
    page.page.locator(".message.user [data-step='-1']").click()
    page.page.wait_for_selector(".message.assistant .body p:text-is('one')")
    page.page.reload()
    page.page.wait_for_selector(".message.assistant .body p:text-is('one')")
    page.page.keyboard.press("Alt+ArrowRight")
    page.page.wait_for_selector(".message.assistant .body p:text-is('two')")
    assert count(page) == "2/2" and count(page, ".message.user") == "2/2"
    page.assert_local_and_quiet()


def test_continue_keeps_the_first_answer_and_goes_on_from_it(page: Page) -> None:
    page.page.keyboard.press("Alt+Comma")
    page.page.fill("#setting-max_tokens", "6")
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Escape")
    page.send("Tell me about dragons")
    page.wait_for_end()
    first = page.answer()
    assert page.figures().endswith("cut at the length limit")
    act(page, "continue")
    page.page.wait_for_selector(".message.assistant .branch-count:text-is('2/2')")
    page.wait_for_end()
    assert page.answer().startswith(first) and len(page.answer()) > len(first)
    page.page.locator(".message.assistant [data-step='-1']").click()
    page.page.wait_for_selector(".message.assistant .branch-count:text-is('1/2')")
    assert page.answer() == first
    page.assert_local_and_quiet()


def test_settings_are_kept_with_the_conversation_and_with_the_answer(page: Page) -> None:
    page.page.click(".tool-button[aria-haspopup=dialog]")
    page.page.get_by_role("button", name="Creative").click()
    page.page.wait_for_selector(".preset[aria-pressed=true]:text-is('Creative')")
    page.page.fill("#setting-system", "Answer in rhymes.")
    page.page.fill("#setting-seed", "41")
    page.page.fill("#setting-stop", "END\\n")
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Escape")
    page.send("echo:kept")
    page.wait_for_end()
    page.page.reload()
    page.page.wait_for_selector(".tool-button:has-text('Creative')")
    act(page, "details")
    made = page.page.locator(".made-with").inner_text()
    for part in ("Creative", "1.1", "41", "Answer in rhymes.", "END"):
        assert part in made
    assert "ask --from-message" in page.page.locator(".message-id").inner_text()
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("Alt+n")
    page.page.wait_for_selector(".tool-button:has-text('Precise')")
    page.assert_local_and_quiet()


def test_impossible_setting_is_refused_with_its_range(page: Page) -> None:
    page.page.keyboard.press("Alt+Comma")
    page.page.fill("#setting-temperature", "9")
    page.page.keyboard.press("Tab")
    page.page.wait_for_selector(".dialog-said:has-text('temperature is 9; allowed is 0 to 5')")
    page.page.wait_for_function("document.querySelector('#setting-temperature').value === '0'")


def test_full_context_is_told_above_the_answer(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, max_context=60, pace_s=0) as (url, _):
        page = Page(chromium.new_page(), url).open()
        for number in range(5):
            page.send(f"echo:{number} one two three four five six")
            page.wait_for_end()
        line = page.page.locator(".left-out:visible").last.inner_text()
        assert line.startswith("The context is full: the oldest") and "left out of the prompt" in line
        used, size = page.page.locator(".context-meter > span:last-child").inner_text().split(" / ")
        assert 0 < int(used) <= int(size) == 60
        page.page.reload()
        page.page.wait_for_selector(".left-out:visible")
        page.page.context.close()


def test_drafts_survive_reloads_by_conversation(page: Page) -> None:
    page.page.fill("#composer-text textarea", "echo:half a thought")
    page.page.reload()
    page.page.wait_for_function("document.querySelector('#composer-text textarea')?.value === 'echo:half a thought'")
    page.page.press("#composer-text textarea", "Enter")
    page.page.wait_for_selector(".message.user .body:text-is('echo:half a thought')")
    page.wait_for_end()
    page.page.fill("#composer-text textarea", "the other half")
    page.page.click(".new-chat")
    page.page.wait_for_selector(".empty")
    assert page.page.input_value("#composer-text textarea") == ""
    page.page.go_back()
    page.page.wait_for_function("document.querySelector('#composer-text textarea').value === 'the other half'")
    page.assert_local_and_quiet()


def test_model_gives_the_title_after_the_first_answer(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, titles=True, pace_s=0, reply="Tidy dragon hoards") as (url, _):
        page = Page(chromium.new_page(), url).open()
        page.send("Would you please tell me something about dragons")
        page.page.wait_for_selector(".conversation:text-is('Tidy dragon hoards')")
        page.page.context.close()


def test_copies_are_the_source(page: Page) -> None:
    page.send("echo:Say **bold**\n\n```python\nx = 1\n```")
    page.wait_for_end()
    act(page, "copy")
    page.page.wait_for_selector("[data-act='copy'].done")
    assert page.page.evaluate("navigator.clipboard.readText()") == "Say **bold**\n\n```python\nx = 1\n```"
    page.page.get_by_role("button", name="Copy code").click()
    page.page.wait_for_function("navigator.clipboard.readText().then(text => text === 'x = 1')")


def test_growing_text_keeps_its_nodes_and_what_is_selected_in_it(page: Page) -> None:
    page.send("echo:" + " ".join(f"word{number} *soft{number}*" for number in range(200)))
    page.wait_for_answer(60)
    page.page.evaluate(
        """() => {
            window.paragraph = document.querySelector(".message.assistant .body p");
            getSelection().setBaseAndExtent(paragraph.firstChild, 0, paragraph.childNodes[2], 4);
        }"""
    )
    selected = page.page.evaluate("getSelection().toString()")
    page.wait_for_end()
    assert page.page.evaluate("paragraph.isConnected && getSelection().toString()") == selected != ""
    assert page.answer() == " ".join(f"word{number} soft{number}" for number in range(200))
    assert page.page.locator(".message.assistant .body em").count() == 200


def test_text_that_grew_is_the_same_as_text_that_came_at_once(page: Page) -> None:
    page.send("Tell me about dragons")  # lists, code and emphasis, over and over
    page.wait_for_end()
    body = page.page.locator(".message.assistant .body")
    grown = body.inner_html()
    page.page.reload()
    page.wait_for_answer(len("Dragons keep"))
    assert body.inner_html() == grown


def test_code_is_coloured_and_formulas_are_set_by_what_is_bundled(page: Page) -> None:
    page.send(
        "echo:Inline $a^2$ and \\(b^2\\), not $5 or $6.\n\n$$\n\\frac{1}{2}\n$$\n\nand \\[ c^2 \\]\n\n"
        "```python\n# note\ndef f(x):\n    return 'é' + str(1.5)\n```"
    )
    page.wait_for_end()
    page.page.wait_for_function("document.querySelectorAll('.message.assistant .katex').length === 4")
    assert page.page.locator(".katex-display").count() == 2
    assert "not $5 or $6." in page.answer()
    kinds = page.page.locator(".code-block code span").evaluate_all("all => all.map(s => [s.className, s.textContent])")
    assert ["code-comment", "# note"] in kinds and ["code-word", "def"] in kinds and ["code-string", "'é'"] in kinds
    assert page.page.locator(".code-block code").inner_text() == "# note\ndef f(x):\n    return 'é' + str(1.5)"
    page.assert_local_and_quiet()


def test_formulas_of_the_model_cannot_link_load_or_run(page: Page) -> None:
    page.send(
        "echo:$\\href{javascript:window.hacked=1}{x}$ $\\includegraphics{http://example.com/a.png}$ "
        "$\\htmlStyle{background:url(http://example.com/b.png)}{y}$ $\\unicode{<img src=x onerror=window.hacked=1>}$ "
        "$\\def\\a{\\a\\a}\\a$ $z$"
    )
    page.wait_for_end()
    page.page.wait_for_selector(".message.assistant .katex")
    body = page.page.locator(".message.assistant .body").last
    assert body.locator("a, img, script").count() == 0
    assert page.page.evaluate("window.hacked") is None
    page.assert_local_and_quiet()
