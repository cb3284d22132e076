"""Make the README's pictures with the bundled model: `python tests/screenshots.py [--out assets/screenshots]`.

The page at 390, 1280 and 1920 px in light and dark, the race, and a short animated picture of the tree at work. Needs
Chromium (CHROMIUM names one), Playwright and Pillow.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import CHROMIUM_FLAGS, Page, find_chromium, running_server  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

SIZES = {390: 844, 1280: 800, 1920: 1080}
QUESTIONS = ("What is photosynthesis?", "Explain how rainbows form, step by step.")
FRAMES, FRAME_MS = 34, 330
COLOURS = 96  # flat areas and text: enough, and a third of the size


def main(out: Path) -> None:
    """Write all pictures into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as data,
        running_server(Path(data), engine="real") as (url, _),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(CHROMIUM_FLAGS))
        address = _talk(browser, url)
        for width in SIZES:
            for scheme in ("light", "dark"):
                _page_pictures(browser, url, address, width, scheme, out)
        _race_picture(browser, url, address, out)
        _animation(browser, url, address, out)
        browser.close()


@contextmanager
def _opened(browser: Any, url: str, address: str, width: int, scheme: str) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": width, "height": SIZES.get(width, 800)}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = Page(context.new_page(), url).open(address)
    page.page.wait_for_selector(".facts .badge", timeout=120_000)
    yield page
    context.close()


def _talk(browser: Any, url: str) -> str:
    """Hold the conversation that is shown, with and without Medusa; return its ?c=."""
    with _opened(browser, url, "", 1280, "light") as page:
        for switched in (False, True):
            for question in QUESTIONS:
                page.page.click(".new-chat")
                page.page.wait_for_selector(".empty")
                page.page.locator("#medusa-switch input").set_checked(switched)
                page.send(question)
                page.wait_for_end(120)
        page.page.wait_for_selector(".badge:has-text('measured here')")
        return "?" + page.page.url.split("?")[1]


def _page_pictures(browser: Any, url: str, address: str, width: int, scheme: str, out: Path) -> None:
    with _opened(browser, url, address, width, scheme) as page:
        page.page.wait_for_selector("#live .curve .chosen" if width > 1000 else ".tokens", state="attached")
        if width > 1000:
            _to_step(page, 12)
            _save(page, out / f"page-{width}-{scheme}.png")
        page.page.locator(".views button").last.click()
        page.page.locator(".tokens .step").nth(11).click()
        page.page.locator("#thread").evaluate("thread => thread.scrollTo(0, 0)")
        if width < 1000:
            page.page.get_by_role("button", name="Medusa at work").click()
            page.page.wait_for_selector("#live .step-caption")
        page.page.mouse.move(0, 0)
        _save(page, out / (f"tokens-{width}-{scheme}.png" if width > 1000 else f"page-{width}-{scheme}.png"))


def _to_step(page: Page, number: int) -> None:
    page.page.get_by_role("slider", name="Step").evaluate(
        "(slider, number) => { slider.value = number; slider.dispatchEvent(new Event('input')); }", number
    )
    page.page.wait_for_function(f"document.querySelector('.step-count').textContent.startsWith('{number} / ')")


def _race_picture(browser: Any, url: str, address: str, out: Path) -> None:
    with _opened(browser, url, address, 1280, "light") as page:
        page.page.get_by_role("button", name="Race", exact=True).click()
        page.page.wait_for_selector(".race-result:visible", timeout=120_000)
        _save(page, out / "race-1280-light.png")


def _animation(browser: Any, url: str, address: str, out: Path) -> None:
    """The tree and the tokens, one step a frame."""
    with _opened(browser, url, address, 1440, "dark") as page:
        page.page.locator(".views button").last.click()
        page.page.locator(".tokens .step").first.click()
        page.page.locator("#thread").evaluate("thread => thread.scrollTo(0, 0)")
        page.page.mouse.move(0, 0)
        frames = []
        for number in range(1, FRAMES + 1):
            _to_step(page, number)
            shot = page.page.screenshot(clip={"x": 272, "y": 53, "width": 1168, "height": 430})
            frames.append(Image.open(io.BytesIO(shot)).convert("RGB").resize((934, 344), Image.Resampling.LANCZOS))
    # One palette for all frames: colours that change between frames would flicker.
    palette = frames[FRAMES // 2].quantize(COLOURS, method=Image.Quantize.MEDIANCUT)
    flat = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options: dict[str, Any] = {"duration": FRAME_MS, "loop": 0, "optimize": True}
    flat[0].save(out / "tree-at-work.gif", save_all=True, append_images=flat[1:], **options)


def _save(page: Page, path: Path) -> None:
    shot = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
    shot.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the README's pictures.")
    parser.add_argument("--out", type=Path, default=ROOT / "assets/screenshots")
    main(parser.parse_args().out)
