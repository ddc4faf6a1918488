"""TensorBoard in a headless browser: what is on the page, shadow trees and frames included."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

ROOT = pathlib.Path(__file__).parents[1]
#: A folder for the pictures of the README, or nothing.
PICTURES = os.environ.get("RUNNER_TEST_PICTURES")
_TIMEOUT_S = 120.0
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,760",
)
#: All text below an element.
_TEXT = """
const found = [];
const walk = (node) => {
  if (node.nodeType === 3 && node.textContent.trim()) found.push(node.textContent.trim());
  if (['STYLE', 'SCRIPT', 'TEMPLATE', 'NOSCRIPT'].includes(node.nodeName)) return;
  if (node.shadowRoot) walk(node.shadowRoot);
  if (node.nodeName === 'IFRAME' && node.contentDocument) walk(node.contentDocument.body);
  node.childNodes.forEach(walk);
};
walk(document.body);
return found;
"""
#: The place of the first element whose own text is the argument.
_PLACE = """
const wanted = arguments[0];
const walk = (node) => {
  if (node.nodeType === 3 && node.textContent.trim() === wanted) return node.parentElement;
  for (const next of [node.shadowRoot, ...node.childNodes]) {
    const found = next && walk(next);
    if (found) return found;
  }
};
const box = walk(document.body).getBoundingClientRect();
return [box.left, box.top];
"""


class Browser:
    """A browser on one TensorBoard.

    Args:
        driver: Selenium's.
        address: Of TensorBoard.
    """

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        self._address = address

    def open(self, tab: str, *, query: str = "") -> None:
        """Load a dashboard anew."""
        self.driver.get("about:blank")
        self.driver.get(f"{self._address}{query}#{tab}")

    def text(self) -> list[str]:
        """Every piece of text of the page."""
        found: list[str] = self.driver.execute_script(_TEXT)
        return found

    def place(self, text: str) -> tuple[float, float]:
        """Where a text is, from the left and from the top."""
        left, top = self.driver.execute_script(_PLACE, text)
        return left, top

    def wait(self, shown: Callable[[list[str]], Any]) -> list[str]:
        """The page's text as soon as `shown` is true of it."""
        deadline, text = time.monotonic() + _TIMEOUT_S, list[str]()
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # The page may be half made.
                text = self.text()
                if shown(text):
                    return text
        raise AssertionError(f"not on the page within {_TIMEOUT_S} s: {text}")

    def choose(self, label: str, option: str) -> None:
        """Pick an option of a drop-down of the profile page, which shows `label` now."""
        self.driver.switch_to.frame(self.driver.find_element(By.TAG_NAME, "iframe"))
        lists = self.driver.find_elements(By.CSS_SELECTOR, "mat-select")
        next(each for each in lists if label in each.text).click()
        options = self.driver.find_elements(By.CSS_SELECTOR, "mat-option")
        next(each for each in options if option in each.text).click()
        self.driver.switch_to.default_content()

    def picture(self, name: str) -> None:
        """Keep what is seen, if somebody wants pictures."""
        if PICTURES:
            self.driver.save_screenshot(str(pathlib.Path(PICTURES) / f"{name}.png"))


@contextlib.contextmanager
def browser(folder: pathlib.Path, profile: pathlib.Path) -> Iterator[Browser]:
    """`python -m runner tensorboard FOLDER` and a browser on it."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=chromedriver)
    with serving(folder) as address:
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield Browser(driver, address)
        finally:
            driver.quit()


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[str]:
    """The address of a TensorBoard on the folder."""
    command = [sys.executable, "-m", "runner", "tensorboard", "--port=0", str(folder)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, "TensorBoard ended"
            found = re.search(r"http://localhost:\d+/", line)
        reader = threading.Thread(target=process.stdout.read)
        reader.start()
        try:
            yield found[0]
        finally:
            process.terminate()
            process.wait(timeout=60)
            reader.join()
