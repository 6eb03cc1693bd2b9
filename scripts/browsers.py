"""A real Chromium without a window, for what opens a page: Debian's, or one that is named, through Playwright."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["chromium", "open_page", "why_none"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The browser's path: that of ``CHROMIUM`` if it is set; ``None`` where there is none, or no Playwright."""
    if importlib.util.find_spec("playwright") is None:
        return None
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in _NAMES if (found := shutil.which(name))), None)


def why_none() -> str:
    """What is missing, and what brings it."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed: pip install playwright"
    return "Chromium is not installed: apt-get install chromium, or set CHROMIUM to the path of a browser"


@contextmanager
def open_page(file: Path, **context: Any) -> Iterator[Any]:
    """A page with a file, loaded.

    Args:
        context: For the browser's context, such as ``color_scheme="dark"``.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A sandbox of its own is not allowed in most containers, and the page is ours.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            page = browser.new_context(**context).new_page()
            page.goto(file.resolve().as_uri(), wait_until="load")
            yield page
        finally:
            browser.close()
