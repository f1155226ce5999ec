"""The playground's request: to two versions at once, and copied for other clients."""

import json
import os
import subprocess
import sys

import pytest
from selenium.webdriver.common.keys import Keys

from tests.gru.serving.playground.browser import Page, Reciter
from tests.gru.serving.server import tiny_bundle, wait_until


def pasted(page: Page, button: str) -> str:
    """Press the button and return what it has copied."""
    page[button].click()
    wait_until(lambda: page["status"].text == "Copied.")
    page.js("document.querySelector('#stop').value = ''")
    page["stop"].send_keys(Keys.CONTROL, "v")
    text: str = page["stop"].get_property("value")  # type: ignore[assignment]
    return text


@pytest.mark.browser
def test_two_versions_side_by_side_with_one_seed(page: Page) -> None:
    page.site.serve(tiny_bundle().model)
    page.open()
    assert not page["compare"].is_displayed()
    page.site.serve(Reciter("abcdef" * 50), "4", "challenger")
    page.open()
    page["compare"].click()
    fields = {"prompt": "ab", "temperature": 0.1, "max_tokens": 40}
    page.enter(**fields)
    page["go"].click()
    page.finished()
    titles = [page["title"].text, page["title-2"].text]
    assert titles == ["poet, version 3, 2.500 bits per byte", "poet@challenger, version 4, 2.500 bits per byte"]
    seed = int(page["used"].text)
    texts = [page.text, page["text-2"].text]
    assert texts == [page.site.answer(model=f"poet:{n}", seed=seed, **fields) for n in (3, 4)]
    assert texts[0] != texts[1] == ("abcdef" * 50)[2:42] and page["used-2"].text == str(seed)
    boxes = [page[name].rect for name in ("text", "text-2")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert not page["more"].is_enabled()
    assert pasted(page, "copy") == "\n".join(f"{t}\n\nab{x}\n" for t, x in zip(titles, texts, strict=True))
    page.driver.find_element("css selector", "#text-2 span").click()
    assert page["tip"].text.startswith("c: ")
    page["compare"].click()
    assert not page["text-2"].is_displayed() and page["title"].text == "" == page.text


@pytest.mark.browser
def test_a_version_that_has_gone_is_no_longer_compared(page: Page) -> None:
    page.site.serve(Reciter("abc"))
    engine = page.site.serve(Reciter("abcd"), "4", "challenger")
    page.open()
    page["compare"].click()
    engine.close(drain=False)
    page.expected_errors = ["503 (Service Unavailable)"]
    assert page.generate(temperature=0) == "abc"
    assert page["error"].text == "poet:4: the engine is closed" and page["finish-2"].text == "error"
    page.site.serve(Reciter("abcd"), "4")
    page.site.withdraw("challenger")
    assert page.generate() == "abcd" and not page["text-2"].is_displayed()
    assert page["error"].text == "" and not page["compare"].is_displayed()


@pytest.mark.browser
@pytest.mark.parametrize("api_key", ["", "sesame"])
def test_the_request_as_curl_and_as_python(page: Page, api_key: str) -> None:
    page.expected_errors = ["401 (Unauthorized)"] if api_key else []
    page.site.serve(tiny_bundle().model)
    page.open()
    if api_key:
        page["key"].send_keys(api_key, Keys.ENTER)
        page.finished()
    prompt = """It's "$HOME" \\n `é明` 𝄞\nand 100 %"""
    page.js("document.querySelector('#prompt').value = arguments[0]", prompt)
    for fields in ({"max_tokens": 30}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}):
        page.js("document.querySelector('#stop').value = arguments[0]", "\\n\nzz'z")
        text = page.generate(**fields)
        stops = page["stop"].get_property("value")
        for button, command in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
            code = pasted(page, button)
            page.js("document.querySelector('#stop').value = arguments[0]", stops)
            assert api_key == "" or api_key not in code
            environment = {**os.environ, "GRU_API_KEY": api_key}
            answer = subprocess.run([*command, code], env=environment, capture_output=True, text=True, timeout=60)
            assert answer.returncode == 0, answer.stderr
            output = answer.stdout.removesuffix("\n")
            assert text == (json.loads(output)["choices"][0]["text"] if button == "curl" else output), code
