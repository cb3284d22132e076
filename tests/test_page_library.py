"""The sidebar in a browser: groups, search, menus, folders, the bin, files in and out, on a phone and by keyboard."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, running_server

from app.storage import ConversationStore

pytestmark = pytest.mark.browser

DAY_MS = 86_400_000
AGES = {"Fresh talk": 0, "Day before": 1, "Some days ago": 4, "Weeks ago": 20, "Long ago": 400}


def fill(folder: Path) -> None:
    """Conversations of several ages, one with a second branch."""
    now = time.time_ns() // 1_000_000
    store = ConversationStore(folder / "conversations.db")
    for title, days in AGES.items():
        time_ms = now - days * DAY_MS
        conversation = store.create_conversation(title, updated_ms=time_ms)
        user = store.append(conversation.id, "user", f"Question of {title}", parent_id=None)
        for text in ("First version, about walruses", "Second version, about penguins"):
            store.append(conversation.id, "assistant", text, parent_id=user.id)
        store.change("UPDATE conversations SET updated_ms = ? WHERE id = ?", [time_ms, conversation.id])
    store.close()


@pytest.fixture
def page(chromium: Any, tmp_path: Path) -> Iterator[Page]:
    fill(tmp_path)
    with running_server(tmp_path, pace_s=0.001) as (url, _):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        shown = Page(context.new_page(), url).open()
        shown.page.wait_for_selector(".conversation-list .conversation")
        yield shown
        context.close()


def titles(page: Page) -> list[str]:
    return page.page.locator(".conversation-list .conversation").all_inner_texts()


def choose(page: Page, title: str, entry: str) -> None:
    """Open a conversation's menu and take an entry of it."""
    row = page.page.locator(f".conversation-list li:has(.conversation:text-is('{title}'))")
    row.hover()
    row.locator(".more").click()
    page.page.get_by_role("menuitem", name=entry).click()


def wait_for_titles(page: Page, expected: list[str]) -> None:
    page.page.wait_for_function(
        "want => JSON.stringify([...document.querySelectorAll('.conversation-list .conversation')]"
        ".map(b => b.textContent)) === JSON.stringify(want)",
        arg=expected,
    )


def test_list_is_grouped_by_the_readers_days(page: Page) -> None:
    groups = page.page.locator(".conversation-list h2").all_inner_texts()
    assert groups[:4] == ["Today", "Yesterday", "Previous 7 days", "Previous 30 days"]
    assert len(groups) == 5 and groups[4][-4:].isdigit()
    assert titles(page) == list(AGES)
    page.assert_local_and_quiet()


def test_rename_pin_and_folder_stay_after_a_reload(page: Page) -> None:
    choose(page, "Weeks ago", "Rename…")
    page.page.fill("#dialog-text", "  A better name ")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector(".conversation:text-is('A better name')")
    choose(page, "A better name", "Pin to the top")
    page.page.wait_for_selector("h2:text-is('Pinned')")
    choose(page, "Long ago", "Put into a folder…")
    page.page.fill("#dialog-text", "Travel")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("summary:has-text('Travel')")
    expected = ["A better name", "Long ago", "Fresh talk", "Day before", "Some days ago"]
    wait_for_titles(page, expected)
    page.open()
    wait_for_titles(page, expected)
    choose(page, "Long ago", "Take out of the folder")
    page.page.wait_for_selector("summary", state="detached")
    page.assert_local_and_quiet()


def test_delete_can_be_undone_and_only_the_bin_removes_for_good(page: Page) -> None:
    choose(page, "Fresh talk", "Delete")
    page.page.get_by_role("button", name="Undo").click()
    wait_for_titles(page, list(AGES))
    page.page.focus(".conversation:text-is('Fresh talk')")
    page.page.keyboard.press("Delete")
    wait_for_titles(page, [title for title in AGES if title != "Fresh talk"])
    page.page.click(".sidebar-foot button:has-text('Deleted')")
    page.page.wait_for_selector(".bin li:has-text('30 days left')")
    page.page.get_by_role("button", name="Restore").click()
    wait_for_titles(page, list(AGES))
    page.page.keyboard.press("Escape")
    choose(page, "Fresh talk", "Delete")
    page.page.click(".sidebar-foot button:has-text('Deleted')")
    page.page.get_by_role("button", name="Remove Fresh talk for good").click()
    page.page.get_by_role("button", name="Cancel").click()
    assert page.page.locator(".bin li").count() == 1
    page.page.get_by_role("button", name="Remove Fresh talk for good").click()
    page.page.get_by_role("button", name="Remove for good", exact=True).click()
    page.page.wait_for_selector(".sheet:has-text('Nothing is here')")
    page.assert_local_and_quiet()


def test_search_marks_words_and_opens_the_branch_that_holds_them(page: Page) -> None:
    page.page.keyboard.press("Alt+s")
    page.page.keyboard.type("walrus weeks")
    page.page.wait_for_selector(".list-note:has-text('Nothing was found')")
    page.page.fill("#search", 'walrus "')
    page.page.wait_for_selector(".hit")
    assert page.page.locator(".hit").count() == len(AGES)
    assert set(page.page.locator(".hit mark").all_inner_texts()) == {"walruses"}
    page.page.click(".hit:has-text('Weeks ago')")
    page.page.wait_for_selector(".message.found .body:has-text('walruses')")
    assert page.page.locator(".message.assistant .branch-count").inner_text() == "1/2"
    page.page.fill("#search", "")
    wait_for_titles(page, list(AGES))
    page.assert_local_and_quiet()


def test_files_go_out_and_come_back_without_doubles(page: Page, tmp_path: Path) -> None:
    page.page.click(".sidebar-foot button:has-text('Import and export')")
    with page.page.expect_download() as download:
        page.page.get_by_role("button", name="Save as JSON").click()
    saved = tmp_path / "all.json"
    download.value.save_as(saved)
    assert len(json.loads(saved.read_text())["conversations"]) == len(AGES)
    page.page.set_input_files("#import-file", saved)
    page.page.wait_for_selector(".sheet [role=status]:has-text('5 conversations already here (0 new messages)')")
    bad = tmp_path / "bad.json"
    bad.write_text("{oops")
    page.page.set_input_files("#import-file", bad)
    page.page.wait_for_selector(".sheet .refused:has-text('Nothing was imported.')")
    foreign = tmp_path / "share.json"
    foreign.write_text(json.dumps([{"conversations": [{"from": "human", "value": "From <b>elsewhere</b>"}]}]))
    page.page.set_input_files("#import-file", foreign)
    page.page.wait_for_selector(".conversation:text-is('From <b>elsewhere</b>')")
    page.page.keyboard.press("Escape")
    choose(page, "Fresh talk", "Export as Markdown")
    assert [error for error in page.errors if "400" not in error] == []


@pytest.mark.parametrize("name", ["JSON", "Markdown", "ShareGPT"])
def test_one_or_all_conversations_are_exported(page: Page, tmp_path: Path, name: str) -> None:
    with page.page.expect_download() as one:
        choose(page, "Fresh talk", f"Export as {name}")
    page.page.click(".sidebar-foot button:has-text('Import and export')")
    with page.page.expect_download() as all_of_them:
        page.page.get_by_role("button", name=f"Save as {name}").click()
    texts = []
    for number, download in enumerate((one, all_of_them)):
        download.value.save_as(tmp_path / str(number))
        texts.append((tmp_path / str(number)).read_text(encoding="utf-8", errors="replace"))
    assert "Question of Fresh talk" in texts[0] and "Question of Long ago" not in texts[0]
    if name != "Markdown":  # all as Markdown is a zip, a file each
        assert all(f"Question of {title}" in texts[1] for title in AGES)
    assert one.value.suggested_filename != all_of_them.value.suggested_filename
    page.assert_local_and_quiet()


FOREIGN = {
    "sharegpt.json": [{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]}],
    "conversations.json": [
        {
            "title": "Hello",
            "create_time": 1700000000.0,
            "current_node": "b",
            "mapping": {
                "root": {"id": "root", "message": None, "parent": None, "children": ["a"]},
                "a": {
                    "id": "a",
                    "parent": "root",
                    "children": ["b"],
                    "message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hello"]}},
                },
                "b": {
                    "id": "b",
                    "parent": "a",
                    "children": [],
                    "message": {
                        "author": {"role": "assistant"},
                        "content": {"content_type": "text", "parts": ["Good day"]},
                    },
                },
            },
        }
    ],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_come_in_once(page: Page, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(FOREIGN[name]))
    page.page.click(".sidebar-foot button:has-text('Import and export')")
    for said in ("1 conversation imported", "1 conversation already here (0 new messages)"):
        page.page.set_input_files("#import-file", tmp_path / name)
        page.page.wait_for_selector(f".sheet [role=status]:has-text('{said}')")
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector(".conversation:text-is('Hello')")
    assert sorted(titles(page)) == sorted(["Hello", *AGES]), "once"
    page.page.click(".conversation:text-is('Hello')")
    page.page.wait_for_selector(".message.assistant .body:has-text('Good day')")
    page.assert_local_and_quiet()


def test_list_is_a_drawer_on_a_phone(chromium: Any, tmp_path: Path) -> None:
    fill(tmp_path)
    with running_server(tmp_path) as (url, _):
        context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
        page = Page(context.new_page(), url).open()
        page.page.locator(".conversation").first.wait_for(state="hidden")
        page.page.get_by_role("button", name="Conversations").click()
        page.page.click(".conversation:text-is('Day before')")
        page.page.wait_for_selector(".message.user .body:has-text('Question of Day before')")
        page.page.wait_for_function("document.documentElement.dataset.sidebar === 'closed'")
        assert page.page.evaluate("document.documentElement.scrollWidth") == 390
        context.close()


def test_keys_open_a_new_chat_and_their_own_list(page: Page) -> None:
    page.page.click(".conversation:text-is('Day before')")
    page.page.wait_for_selector(".message.user")
    page.page.keyboard.press("Alt+n")
    page.page.wait_for_selector(".empty")
    assert page.page.evaluate("document.activeElement.closest('#composer-text') !== null")
    page.page.keyboard.type("what?")
    assert page.page.locator("dialog[open]").count() == 0, "a question mark in a message is a question mark"
    page.page.locator(".new-chat").focus()
    page.page.keyboard.press("?")
    keys = page.page.locator(".shortcuts dt").all_inner_texts()
    assert {"Alt+N", "?", "Escape", "Alt+S"} <= set(keys)
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector("dialog", state="detached")
    outline = page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "focus came back, and can be seen"


def test_menu_works_by_keyboard(page: Page) -> None:
    page.page.focus(".conversation:text-is('Fresh talk')")
    page.page.keyboard.press("F2")
    page.page.wait_for_selector("[role=menu]")
    page.page.keyboard.press("ArrowDown")
    assert page.page.evaluate("document.activeElement.textContent") == "Pin to the top"
    page.page.keyboard.press("ArrowUp")
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector("[role=menu]", state="detached")
    assert page.page.evaluate("document.activeElement.getAttribute('aria-label')") == "More for Fresh talk"
