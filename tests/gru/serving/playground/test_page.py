"""What the page may load and send, and how it deals with keys, addresses and models."""

import base64
import hashlib
import json
import re

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from gru.serving.playground import FOLDER, page_html
from tests.gru.serving.playground.browser import Page, Reciter, Site
from tests.gru.serving.server import wait_until


def test_the_page_loads_nothing_and_talks_to_its_server_only(site: Site) -> None:
    answer = httpx.get(site.url)
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.text == page_html()
    for path in (FOLDER / "playground.css", *FOLDER.glob("*.js")):
        assert path.read_text() in answer.text and f'"{path.name}"' not in answer.text
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-cache"
    allowed = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    digests = {}
    for tag in ("style", "script"):
        contents = re.findall(f"<{tag}.*?>(.*?)</{tag}>", answer.text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
        digests[f"{tag}-src"] = " ".join(f"'sha256-{each}'" for each in hashes)
    nothing = dict.fromkeys(["default-src", "base-uri", "form-action", "frame-ancestors"], "'none'")
    assert allowed == {**nothing, **digests, "connect-src": "'self'"}


@pytest.mark.browser
@pytest.mark.parametrize("api_key", ["sesame"])
def test_a_key_is_asked_for_and_stored_for_the_tab(page: Page, api_key: str) -> None:
    page.expected_errors = ["401 (Unauthorized)"]
    page.site.serve(Reciter("abc"))
    page.open()
    assert page["key"].is_displayed() and page["key"].get_attribute("type") == "password"
    page.generate(temperature=0)
    assert page["error"].text == page["model"].text and page["error"].text.startswith("an API key is required")
    assert page.focused == page["key"]
    page.press("wrong", Keys.ENTER)
    wait_until(lambda: page["error"].text == "this API key is unknown")
    page["key"].clear()
    page["key"].send_keys(api_key, Keys.ENTER)
    wait_until(lambda: page.text == "abc")
    assert page.finished() == "abc" and page["error"].text == ""
    page.open()
    assert page["model"].text.startswith("poet, version 3")
    assert page.generate(temperature=0) == "abc"
    assert page.js("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


@pytest.mark.browser
def test_no_key_is_asked_for_where_none_is_needed(page: Page) -> None:
    page.site.serve(Reciter("abc"))
    page.open()
    assert page.generate(temperature=0) == "abc" and not page["key"].is_displayed()


@pytest.mark.browser
def test_a_new_version_is_shown(page: Page) -> None:
    page.site.serve(Reciter("abc"))
    page.open()
    page.site.serve(Reciter("def"), version="4")
    assert page.generate(temperature=0) == "def"
    wait_until(lambda: "version 4" in page["model"].text)


@pytest.mark.browser
def test_addresses_are_relative(page: Page) -> None:
    page.site.serve(Reciter("abc"))
    page.site.network.prefix = "/some/where"
    page.open("/some/where")
    assert "version 3" in page["model"].text and page.generate(temperature=0) == "abc"
    requested = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in requested if e["method"] == "Network.requestWillBeSent"]
    assert {url.removeprefix(page.site.url) for url in urls} == {
        f"/some/where/{path}" for path in ("", "v1/models", "v1/completions")
    }


@pytest.mark.browser
def test_markup_in_the_text_stays_text(page: Page) -> None:
    text = "<script>document.title = 'x'</script><img src=x onerror=alert(1)><b>"
    page.site.serve(Reciter(text))
    page.open()
    assert page.generate(temperature=0) == text
    assert page.js("document.title") == "Playground"
    assert page.js("document.querySelectorAll('#text :not(span)').length") == 0
    page.driver.find_element("css selector", "#text span").click()
    assert page["tip"].text.startswith("<: ")
