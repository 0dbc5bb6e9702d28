"""A real server and a headless Chromium, for the page at /.

Nothing here imports sagellm: `make page` runs these tests in an environment of their own, with
Debian's chromium and chromium-driver. `make test` leaves them out.
"""

import os
import re
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import axe_core_python
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

KEY = "sk-of-the-tests"
START_S, WAIT_S = 60.0, 20.0
AUDIT_S = 100.0  # axe-core takes half a minute for the reference of the API on a busy machine
CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (  # without these, Chromium connects to hosts outside this machine
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1200,800",
)  # fmt: skip
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()


@contextmanager
def serving(folder, *options):
    """The URL of a server that runs in a process."""
    log = folder / "server.log"
    command = [os.environ["SAGELLM_BIN"], "serve", *options, "--port", "0"]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors)
    try:
        yield _started(process, log)
    finally:
        process.terminate()
        process.wait(30)


def _started(process, log):
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"(http://127\.0\.0\.1:\d+)", log.read_text())
        if found and _is_ready(found[1]):
            return found[1]
        time.sleep(0.1)
    process.kill()
    return pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def _is_ready(url):
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def url(tmp_path_factory):
    """The URL of sage-tiny without a key."""
    with serving(tmp_path_factory.mktemp("plain"), "sage-tiny") as url:
        yield url


@pytest.fixture(scope="session")
def closed_url(tmp_path_factory):
    """The URL of a server that requires a key."""
    with serving(tmp_path_factory.mktemp("closed"), "sage-tiny", "--api-key", KEY) as url:
        yield url


@pytest.fixture(scope="session")
def slow_url(tmp_path_factory):
    """The URL of a slow model without a chat template."""
    options = ("joint", "--model", "null", "--set", "g.device=null", "--set", "g.decode_step_s=0.1")
    with serving(tmp_path_factory.mktemp("slow"), *options) as url:
        yield url


class Page:
    """Actions of a user on the page, and the contents that the user sees."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, url):
        self.browser.get(url)
        self.until(lambda: self.all("#models input") or self.one("#key-form").is_displayed())

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return [found.text for found in self.all(selector)]

    @property
    def focused(self):
        return self.browser.switch_to.active_element

    def type(self, *keys):
        self.focused.send_keys(*keys)

    def until(self, holds):
        """Wait until a condition holds. Replaced elements are read again."""
        replaced = (StaleElementReferenceException,)
        WebDriverWait(self.browser, WAIT_S, 0.05, replaced).until(lambda _: holds())

    def answered(self, number):
        """Wait until so many turns have ended."""
        self.until(lambda: len(self.all(".turn")) == number and self.one("#send").is_displayed())

    def run(self, script):
        return self.browser.execute_script(f"return {script}")

    def emulate(self, theme):
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def findings(self):
        """The findings of axe-core: impact and rule."""
        self.browser.execute_script(AXE)
        script = "axe.run(document).then((found) => arguments[0](found.violations))"
        return [(one["impact"], one["id"]) for one in self.browser.execute_async_script(script)]

    def console(self):
        """The console's messages, except for status codes that a test provokes."""
        said = [one["message"] for one in self.browser.get_log("browser")]
        return [text for text in said if "Failed to load resource" not in text]


@pytest.fixture
def page():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    browser.set_script_timeout(AUDIT_S)
    page = Page(browser)
    page.emulate("light")
    yield page
    said = page.console()
    browser.quit()
    assert said == []  # no violation of the content security policy, and no script error
