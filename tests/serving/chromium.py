"""A real Chromium, for what only a browser shows."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Error, sync_playwright

VARIABLE = "LONGTRAIL_CHROMIUM"
_USUAL = Path("/usr/bin/chromium")


def executable() -> str | None:
    """Named by the variable, in the usual place or on the PATH; None for playwright's own."""
    if named := os.environ.get(VARIABLE):
        return named
    return str(_USUAL) if _USUAL.exists() else shutil.which("chromium")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; it ends with the block, and with this process if that is killed.

    Raises:
        RuntimeError: If there is no Chromium.
    """
    with sync_playwright() as playwright:
        try:
            # A container's root has no sandbox; the browser only sees our own pages.
            browser = playwright.chromium.launch(
                executable_path=executable(), args=["--no-sandbox"]
            )
        except Error as error:
            raise RuntimeError(
                f"Chromium does not start ({executable() or 'none was found'}): install it with "
                "`apt-get install chromium` or `playwright install chromium`, or name one in "
                f"{VARIABLE}"
            ) from error
        with browser:
            yield browser
