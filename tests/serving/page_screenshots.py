"""Takes the pictures of the page in ``docs/images``, from a server that runs.

Example: ``python -m tests.serving.page_screenshots http://127.0.0.1:8080 14911 docs/images``
"""

import argparse
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, expect

from tests.serving.chromium import chromium

PICTURES: dict[str, tuple[int, int, Literal["light", "dark"]]] = {
    "page-light": (1280, 1200, "light"),
    "page-dark": (1280, 1200, "dark"),
    "page-narrow": (360, 1200, "light"),
}
"""Name -> width and height in pixels, colours."""


def take(browser: Browser, url: str, user_id: str, path: Path) -> None:
    """Open a user, leave the newest behaviours out, open the first item, and take the picture."""
    width, height, scheme = PICTURES[path.stem]
    viewport = {"width": width, "height": height}
    with browser.new_context(
        viewport=viewport,  # type: ignore[arg-type]  # a TypedDict of these two
        color_scheme=scheme,
        reduced_motion="reduce",
    ) as context:
        page = context.new_page()
        page.goto(f"{url}/?user={user_id}")
        told = page.locator("#announcement")
        expect(told).to_contain_text("ranked for", timeout=30_000)
        page.locator(".moment button").first.click()
        expect(told).to_contain_text("The ranking", timeout=30_000)
        page.locator(".ranked-item summary").first.click()
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        page.screenshot(path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the server, without a slash at the end")
    parser.add_argument("user_id")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name in PICTURES:
            path = arguments.folder / f"{name}.png"
            take(browser, arguments.url, arguments.user_id, path)


if __name__ == "__main__":
    main()
