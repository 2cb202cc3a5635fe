"""For the tests of pages: a server in a thread, requests to it, programs, and a real browser.

The browser needs Debian's chromium and chromium-driver, and selenium; skipped elsewhere.
"""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nanorlhf.people.page import make_server

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
STRANGERS = [
    dict(Host="evil.example"),  # a name of theirs that leads to this machine
    dict(Host="127.0.0.1"),
    dict(Host="127.0.0.1.evil.example:{port}"),
    dict(Host=""),
    dict(Origin="http://evil.example"),
    dict(Origin="https://127.0.0.1:{port}"),
    dict(Origin="http://127.0.0.1:1"),
    dict(Origin="http://localhost:{port}"),  # the page has the name of the host it was asked for
    dict(Origin="null"),
]


@contextlib.contextmanager
def serving(html, actions, port=0):
    server = make_server(html, actions, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def request(port, method, path, fields=None, **headers):
    """-> status, text"""
    body = fields if isinstance(fields, bytes | None) else json.dumps(fields).encode()
    kind = {"Content-Type": "application/json"} if body is not None else {}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"http://127.0.0.1:{port}{path}"
    asked = urllib.request.Request(url, body, kind | headers, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def running(folder, *words):
    """A program, until it says where its page is; killed in the end. -> process, port"""
    process = subprocess.Popen([*words], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
                               text=True)  # fmt: skip
    try:
        lines = iter(process.stdout.readline, "")
        line = next((line for line in lines if line.startswith("page")), "no page")
        assert line.startswith("page      http://127.0.0.1:"), line
        yield process, int(line.split(":")[2].split()[0])
    finally:
        process.kill()
        process.communicate()


def start_browser(**emulation):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # which root has to do without
    options.add_argument("--disable-dev-shm-usage")  # it is small in a container
    options.add_argument("--window-size=1200,760")
    if emulation:
        options.add_experimental_option("mobileEmulation", dict(deviceMetrics=emulation))
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Page:
    """What a person sees, and can do."""

    def __init__(self, driver):
        self.driver, self.run = driver, driver.execute_script

    def actions(self):
        from selenium.webdriver import ActionChains

        return ActionChains(self.driver)

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def until(self, ready, said=lambda: ""):
        ends = time.monotonic() + 60  # where many tests share the machine
        while not ready():
            assert time.monotonic() < ends, said()
            time.sleep(0.02)

    def wait(self, *beginnings, name="progress"):
        """Until this element's text begins so."""
        self.until(lambda: self.text(name).startswith(beginnings),
                   lambda: f"{self.text(name)!r} and not {beginnings}")  # fmt: skip
