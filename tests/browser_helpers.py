"""Debian's Chromium without a screen, driven by selenium; nothing is downloaded."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def installed() -> bool:
    return os.path.exists(CHROMIUM) and os.path.exists(DRIVER)


@contextlib.contextmanager
def chromium(downloads: Path | None = None) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own, which notes what it says on its console and what it asks the network for."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        if downloads:
            options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            yield browser
        finally:
            browser.quit()


def console(browser: webdriver.Chrome) -> list[str]:
    """What the page has said since the last call: errors and warnings."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: webdriver.Chrome) -> list[str]:
    """Addresses asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
