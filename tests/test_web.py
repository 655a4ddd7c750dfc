"""A visitor of the page (needs gradio, selenium and Chromium).

The README's picture of it: T2L_PAGE=assets/web.png python -m pytest tests/test_web.py
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from extras import web
from tests.helpers import DESC, HERE, refused


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("there is no Chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    flags = "headless=new no-sandbox disable-gpu disable-background-networking disable-sync"
    for flag in f"{flags} window-size=1500,680".split():
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield browser
    browser.quit()


def test_a_missing_hypernetwork_is_named():
    args = argparse.Namespace(hypernet="/nope", base_model=None, encoder=None)
    refused("/nope is neither a folder", web.load_nets, args, "cpu")
    args.hypernet = None
    assert [net.reads for net in web.load_nets(args, "cpu")] == ["descriptions", "documents"]


def test_the_page_in_a_browser(browser, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "extras.web", "--port", str(port)]
    server = subprocess.Popen(start, cwd=HERE, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "0"})

    def wait_for(find):
        for _ in range(300):
            with contextlib.suppress(Exception):
                if found := find():
                    return found
            time.sleep(0.1)
        raise AssertionError("not found in the page")

    def shown(selector: str) -> list:
        return [found for found in browser.find_elements("css selector", selector) if found.is_displayed()]

    def ask(text: str, inputs: str, answer: str):
        for box, typed in zip(wait_for(lambda: shown("textarea")), (text, inputs)):
            box.clear()
            box.send_keys(typed)
        wait_for(lambda: [b for b in shown("button") if "Write an adapter" in b.text])[0].click()
        wait_for(lambda: answer in browser.page_source)

    try:
        wait_for(lambda: browser.get(f"http://127.0.0.1:{port}") is None)
        inputs = "skirt cat bird shirt\nflower bear mouse stone\nbird knee horse nose"
        ask("Write the animals in Spanish, back to front.", inputs, "pájaro gato")
        assert "Written in" in browser.page_source and "adapter.zip" in browser.page_source
        if "T2L_PAGE" in os.environ:
            browser.save_screenshot(os.environ["T2L_PAGE"])
        ask(DESC, "a unicorn", "no token for")  # an error is shown in the page
        wait_for(lambda: [b for b in shown("button") if b.text == "Document"])[0].click()
        ask("cat lamp <eos>", "cat", "lamp")
    finally:
        server.kill()
