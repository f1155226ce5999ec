"""What a person sees and does while the playground generates, in a real browser on a real server."""

import math
import time
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.gru.serving.playground.browser import LIKELY, OTHER, Page, Reciter
from tests.gru.serving.server import tiny_bundle, wait_until


@pytest.mark.browser
@pytest.mark.parametrize("cut", [1 << 20, 1, 7])
def test_the_text_is_the_one_that_the_api_gives_for_that_seed(page: Page, cut: int) -> None:
    page.site.serve(tiny_bundle().model)
    page.site.network.cut = cut
    page.open()
    assert page["model"].text == "poet, version 3, 2.500 bits per byte"
    sampling = {"temperature": 1.1, "top_p": 0.95, "top_k": 50, "max_tokens": 150, "seed": 5}
    expected = page.site.answer(prompt="Once", **sampling)
    assert page.generate(prompt="Once", **sampling) == expected
    assert (page["tokens"].text, page["finish"].text, page["used"].text) == ("150", "length", "5")
    assert float(page["rate"].text) > 0 and float(page["first"].text.removesuffix(" s")) > 0
    assert page.generate(seed="") != expected
    assert page.text == page.site.answer(prompt="Once", **{**sampling, "seed": int(page["used"].text)})


@pytest.mark.browser
@pytest.mark.parametrize(
    ("request_patch", "response_patch"),
    [((b'"logprobs":5', b'"ignored":5'), (b"", b"")), ((b"", b""), (b'"text_offset":[', b'"text_offset":[-1,'))],
    ids=["null", "misplaced"],
)
def test_without_token_offsets_each_chunk_is_a_span(
    page: Page, request_patch: tuple[Any, Any], response_patch: tuple[Any, Any]
) -> None:
    page.site.serve(Reciter("The moon, 明月, is up. " * 10, pause=0.002))
    page.site.network.request_patch, page.site.network.response_patch = request_patch, response_patch
    page.open()
    assert page.generate(temperature=0, max_tokens=1000) == "".join(page.spans) == "The moon, 明月, is up. " * 10
    assert 1 < len(page.spans) < 200
    assert page["tokens"].text == "250" and page["finish"].text == "stop"
    page.hover(page.driver.find_element("css selector", "#text span"))
    assert not page["tip"].is_displayed()


@pytest.mark.browser
def test_text_appears_as_it_is_generated(page: Page) -> None:
    page.site.serve(Reciter("word " * 100, pause=0.01))
    page.open()
    page.enter(temperature=0)
    page["go"].click()
    lengths = set()
    while page["go"].text == "Stop":
        lengths.add(len(page.text))
        time.sleep(0.02)
    assert len(lengths) > 10 and page.finished() == "word " * 40
    assert 10 < float(page["rate"].text) < 100


@pytest.mark.browser
def test_probabilities_show_under_the_pointer_and_the_focus(page: Page) -> None:
    page.site.serve(Reciter("é明 a\nb"))
    page.open()
    page.generate(temperature=0)
    assert page.spans == list("é明 a\nb")
    total = math.exp(LIKELY) + math.exp(OTHER) + 255
    likely, other = (f"{100 * math.exp(logit) / total:.1f} %" for logit in (LIKELY, OTHER))
    spans = page.driver.find_elements("css selector", "#text span")
    page.hover(spans[3])
    wait_until(page["tip"].is_displayed)
    lines = page["tip"].text.splitlines()
    assert lines[:3] == [f"a: {likely}", f"a {likely}", f"x {other}"] and len(lines) == 6
    page.hover(spans[1])  # a character of three tokens
    wait_until(lambda: page["tip"].text.startswith(f"明: {100 * (math.exp(LIKELY) / total) ** 3:.1f} %"))
    assert page["tip"].text.count(f": {likely}") == 3
    page.hover(page["model"])
    wait_until(lambda: not page["tip"].is_displayed())
    spans[2].click()
    wait_until(page["tip"].is_displayed)
    assert page["tip"].text.startswith(f"␣: {likely}")
    assert page.focused.get_attribute("aria-describedby") == "tip"
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page["tip"].text.startswith(f"↵: {likely}")
    page.press(Keys.ESCAPE)
    assert not page["tip"].is_displayed()
    opacities = [float(page.js("getComputedStyle(arguments[0]).backgroundColor", s).split(",")[3][:-1]) for s in spans]
    assert opacities[1] > opacities[0] > opacities[3] > 0  # three unlikely bytes, two, one
    page["tint"].click()
    assert page.js("getComputedStyle(arguments[0]).backgroundColor", spans[1]) == "rgba(0, 0, 0, 0)"


@pytest.mark.browser
def test_spans_stay_in_place_when_text_was_held_back(page: Page) -> None:
    page.site.serve(Reciter("all 𝄞 in the evening, the end."))
    page.open()
    text = page.generate(temperature=0, stop="the end\nnever\\n")
    assert text == "all 𝄞 in the evening, " and page.spans == list(text)
    assert page["finish"].text == "stop"
    assert page.generate(stop="in the evening, the end of\n\\n") == "all 𝄞 in the evening, the end."
    assert page.spans == list(page.text)


@pytest.mark.browser
@pytest.mark.parametrize("key", ["", Keys.ESCAPE])
def test_stop_keeps_the_text_and_frees_the_slot(page: Page, key: str) -> None:
    engine = page.site.serve(Reciter("word " * 800, pause=0.02))
    page.open()
    page.enter(temperature=0, max_tokens=4000)
    page["go"].click()
    wait_until(lambda: len(page.text) > 3)
    assert engine.active == 1 and not page["more"].is_enabled()
    page.press(key) if key else page["go"].click()
    text = page.finished()
    assert len(text) > 3 and ("word " * 800).startswith(text)
    assert page["finish"].text == "stopped" and page["status"].text == "Stopped." and page["error"].text == ""
    wait_until(lambda: engine.active == 0)
    assert page.text == text
    assert page["more"].is_enabled()


@pytest.mark.browser
def test_continue_copy_and_clear(page: Page) -> None:
    page.site.serve(Reciter("abcdefghijklmnop"))
    page.open()
    assert page.generate(temperature=0, max_tokens=4, prompt="ab") == "cdef"
    page["more"].click()
    wait_until(lambda: page.text == "ghij")
    assert page["prompt"].get_property("value") == "abcdef"
    page.finished()
    page["copy"].click()
    wait_until(lambda: page["status"].text == "Copied.")
    page["clear"].click()
    assert (page["prompt"].get_property("value"), page.text, page["tokens"].text) == ("", "", "–")
    page.press("v", holding=Keys.CONTROL)
    assert page["prompt"].get_property("value") == "abcdefghij"
    assert page.generate(prompt="abcdefghijklmnop") == "" and page["tokens"].text == "0"
    assert not page["more"].is_enabled()


@pytest.mark.browser
def test_a_setting_that_is_out_of_bounds_is_not_sent(page: Page) -> None:
    page.site.serve(Reciter("abc"))
    page.open()
    page["settings"].find_element("css selector", "summary").click()
    assert not page["top_p"].is_displayed()
    page.js("document.querySelector('[name=top_p]').value = '1.5'")
    page["go"].click()
    wait_until(page["top_p"].is_displayed)
    page["go"].click()
    assert page.text == "" and page.focused.get_attribute("name") == "top_p"


@pytest.mark.browser
def test_the_servers_error_messages_are_shown(page: Page) -> None:
    page.expected_errors = ["400 (Bad Request)", "503 (Service Unavailable)", "ERR_CONNECTION_REFUSED"]
    page.open()
    assert page["model"].text == "no model is loaded yet"
    page.generate()
    assert page["error"].text == "no model is loaded yet"
    engine = page.site.serve(Reciter("word " * 800, pause=0.01))
    page.generate(max_tokens=5000, temperature=0)
    assert page["error"].text.startswith("max_tokens: at most")
    page.enter(max_tokens=4000)
    page["go"].click()
    wait_until(lambda: len(page.text) > 3)
    assert page["error"].text == ""
    engine.close(drain=False)
    assert len(page.finished()) > 3
    assert page["error"].text == "the engine was closed"
    page.site.stop()
    page.generate()
    assert page["error"].text.startswith("The server cannot be reached")
    assert page["go"].is_enabled()


@pytest.mark.browser
@pytest.mark.parametrize("cleanly", [True, False])
def test_a_broken_stream_is_reported_and_its_text_kept(page: Page, cleanly: bool) -> None:
    page.expected_errors = ["ERR_INCOMPLETE_CHUNKED_ENCODING"]
    page.site.serve(Reciter("word " * 800, pause=0.005))
    page.site.network.breaks_after, page.site.network.breaks_cleanly = 10_000, cleanly
    page.open()
    text = page.generate(temperature=0, max_tokens=4000)
    assert text and ("word " * 800).startswith(text)
    assert page["error"].text.startswith("The stream broke off") and page["finish"].text == "error"
