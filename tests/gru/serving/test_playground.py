"""The playground: its policy, and what a person sees and does in it, in a real browser on a real server."""

import base64
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gru.config import ServeConfig
from gru.generation.engine import Engine
from gru.registry.bundle import Bundle
from gru.registry.versions import Version
from gru.serving.api import create_app
from gru.serving.auth import digest
from gru.serving.loaded_model import LoadedModel
from gru.serving.playground import PAGE
from tests.gru.registry.bundles import LINEAGE
from tests.gru.serving.server import listening, tiny_bundle

TOKENIZER = tiny_bundle().tokenizer
LIKELY, OTHER = 8.0, 7.0  # logits of the byte that a reciter says, and of "x"; all others have 0


class Reciter(torch.nn.Module):
    """Knows one text: after its first k bytes, whatever they were, the next byte is the k-th. It says it at
    temperature 0, and then ends the document. The state [1, S, 1] counts tokens."""

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__()
        self.vocab_size, self.pause = TOKENIZER.vocab_size, pause
        self.says = torch.tensor([*TOKENIZER.encode(text).tolist(), TOKENIZER.end_of_text])

    def initial_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(1, batch, 1)

    def features(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The id that is to be said, [T, S, 1]."""
        time.sleep(self.pause)
        read = state[0, :, 0] + torch.arange(len(tokens)).unsqueeze(1)
        return self.says[read.long().clamp(0, len(self.says) - 1)].unsqueeze(2), state + len(tokens)

    def logits(self, says: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*says.shape[:-1], self.vocab_size)
        logits[..., ord("x")] = OTHER
        return logits.scatter(-1, says, LIKELY)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        says, state = self.features(tokens, state)
        return self.logits(says), state


class Wire:
    """What may be between browser and server: a prefix of the path, other servers' ways, and a network that cuts a
    stream anywhere or breaks it off."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.prefix = ""
        self.asked = self.told = (b"", b"")  # of each message: a part, and what replaces it
        self.cut = 1 << 20  # bytes of a stream that go at a time
        self.breaks_after = 1 << 40  # bytes of a stream
        self.breaks_cleanly = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(self.prefix)
        streams, sent = False, 0

        async def ask() -> Message:
            message = await receive()
            return {**message, "body": message.get("body", b"").replace(*self.asked)}

        async def tell(message: Message) -> None:
            nonlocal streams, sent
            if message["type"] == "http.response.start":
                streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            if message["type"] == "http.response.start" or not streams:
                return await send(message)
            body = message.get("body", b"").replace(*self.told)
            for start in range(0, len(body), self.cut):
                part = body[start : min(start + self.cut, start + self.breaks_after - sent)]
                sent += len(part)
                broken = sent >= self.breaks_after
                if part or broken:
                    more = not (broken and self.breaks_cleanly)
                    await send({"type": "http.response.body", "body": part, "more_body": more})
                if broken:
                    raise ConnectionAbortedError
            if not message.get("more_body"):
                await send({"type": "http.response.body", "body": b""})

        await self.app({**scope, "path": path, "raw_path": path.encode()}, ask, tell)


class Site:
    """A server on a port of its own."""

    def __init__(self, config: ServeConfig) -> None:
        self.engines: list[Engine] = []
        self._served: list[LoadedModel] = []
        self.wire = Wire(create_app(lambda: self._served, config))
        self._open = ExitStack()
        self.url = self._open.enter_context(listening(self.wire))

    def serve(self, model: torch.nn.Module, version: str = "3") -> Engine:
        engine = Engine(model, TOKENIZER.end_of_text, 4, 4)  # type: ignore[arg-type]
        self.engines.append(engine)
        values = {"name": "poet", "version": version, "run_id": "r1", "bits_per_byte": 2.5, "created": 17}
        others = {name: "" for name in Version.__dataclass_fields__ if name not in values}
        bundle = Bundle(model, TOKENIZER, LINEAGE, f"digest {version}")  # type: ignore[arg-type]
        self._served[:] = [LoadedModel(engine, bundle, Version(**values, **others))]  # type: ignore[arg-type]
        return engine

    def answer(self, **fields: Any) -> Any:
        return httpx.post(f"{self.url}/v1/completions", json=fields, timeout=60).json()["choices"][0]["text"]

    def stop(self) -> None:
        for engine in self.engines:
            engine.close(drain=False)
        self._open.close()


class Page:
    """The playground in a browser, as a person has it."""

    def __init__(self, driver: webdriver.Chrome, site: Site) -> None:
        self.driver, self.site = driver, site
        self.expected_errors: list[str] = []  # parts of what the console may say

    def open(self, prefix: str = "") -> None:
        self.driver.get(f"{self.site.url}{prefix}/")
        until(lambda: "asking" not in self["model"].text)

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element("css selector", f"#{name}, [name={name}]")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def cdp(self, command: str, **arguments: Any) -> None:
        self.driver.execute_cdp_cmd(command, arguments)

    def style(self, name: str, of: str = "#text") -> str:
        value: str = self.js("getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", of, name)
        return value

    @property
    def text(self) -> str:
        text: str = self.js("document.querySelector('#text').textContent")
        return text

    @property
    def spans(self) -> list[str]:
        spans: list[str] = self.js("[...document.querySelectorAll('#text span')].map((s) => s.textContent)")
        return spans

    @property
    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def enter(self, **fields: Any) -> None:
        for name, value in fields.items():
            self[name].clear()
            self[name].send_keys(str(value))

    def press(self, *keys: str, holding: str = "") -> None:
        actions = ActionChains(self.driver, duration=0)
        if holding:
            actions.key_down(holding)
        actions.send_keys(*keys)
        if holding:
            actions.key_up(holding)
        actions.perform()

    def hover(self, element: WebElement) -> None:
        ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def generate(self, **fields: Any) -> str:
        """Fill in, press the button, wait for the end; the text."""
        self.enter(**fields)
        self["go"].click()
        return self.finished()

    def finished(self) -> str:
        until(lambda: self["go"].text == "Generate")
        return self.text

    def complaints(self) -> list[str]:
        """What the console says that a test did not provoke, and requests to anyone but the server."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        found = [line for line in said if not any(part in line for part in self.expected_errors)]
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                found += [url] if not url.startswith(f"{self.site.url}/") else []
        return found


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.fail("these tests need a browser: the packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Containers have no user namespaces for its sandbox, and a small /dev/shm.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def api_key() -> str:
    """That the server asks for."""
    return ""


@pytest.fixture
def site(api_key: str, tmp_path: Path) -> Iterator[Site]:
    if api_key:
        (tmp_path / "keys").write_text(f"ann {digest(api_key)}")
    site = Site(ServeConfig(max_tokens=4096, keys=str(tmp_path / "keys") if api_key else None))
    yield site
    site.stop()


@pytest.fixture
def page(driver: webdriver.Chrome, site: Site) -> Iterator[Page]:
    page = Page(driver, site)
    yield page
    page.cdp("Emulation.clearDeviceMetricsOverride")
    page.cdp("Emulation.setEmulatedMedia", features=[])
    assert page.complaints() == []


def test_the_page_may_load_nothing_and_talk_to_its_server_only(site: Site) -> None:
    answer = httpx.get(site.url)
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.text == PAGE.read_text()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-cache"
    allowed = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    digests = {}
    for tag in ("style", "script"):
        [content] = re.findall(f"<{tag}.*?>(.*?)</{tag}>", answer.text, re.DOTALL)
        digests[f"{tag}-src"] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    nothing = dict.fromkeys(["default-src", "base-uri", "form-action", "frame-ancestors"], "'none'")
    assert allowed == {**nothing, **digests, "connect-src": "'self'"}


@pytest.mark.browser
@pytest.mark.parametrize("cut", [1 << 20, 1, 7])
def test_the_text_is_the_one_that_the_api_gives_for_that_seed(page: Page, cut: int) -> None:
    page.site.serve(tiny_bundle().model)
    page.site.wire.cut = cut
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
    ("asked", "told"),
    [((b'"logprobs":5', b'"ignored":5'), (b"", b"")), ((b"", b""), (b'"text_offset":[', b'"text_offset":[-1,'))],
    ids=["null", "misplaced"],
)
def test_without_places_of_tokens_a_span_is_a_chunk(page: Page, asked: tuple[Any, Any], told: tuple[Any, Any]) -> None:
    page.site.serve(Reciter("The moon, 明月, is up. " * 10, pause=0.002))
    page.site.wire.asked, page.site.wire.told = asked, told
    page.open()
    assert page.generate(temperature=0, max_tokens=1000) == "".join(page.spans) == "The moon, 明月, is up. " * 10
    assert 1 < len(page.spans) < 200
    assert page["tokens"].text == "250" and page["finish"].text == "stop"
    page.hover(page.driver.find_element("css selector", "#text span"))
    assert not page["tip"].is_displayed()


@pytest.mark.browser
def test_text_appears_as_it_comes(page: Page) -> None:
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
    said, other = (f"{100 * math.exp(logit) / total:.1f} %" for logit in (LIKELY, OTHER))
    spans = page.driver.find_elements("css selector", "#text span")
    page.hover(spans[3])
    until(page["tip"].is_displayed)
    lines = page["tip"].text.splitlines()
    assert lines[:3] == [f"a: {said}", f"a {said}", f"x {other}"] and len(lines) == 6
    page.hover(spans[1])  # a character of three tokens
    until(lambda: page["tip"].text.startswith(f"明: {100 * (math.exp(LIKELY) / total) ** 3:.1f} %"))
    assert page["tip"].text.count(f": {said}") == 3
    page.hover(page["model"])
    until(lambda: not page["tip"].is_displayed())
    spans[2].click()
    until(page["tip"].is_displayed)
    assert page["tip"].text.startswith(f"␣: {said}")
    assert page.focused.get_attribute("aria-describedby") == "tip"
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page["tip"].text.startswith(f"↵: {said}")
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
def test_everything_can_be_done_with_the_keyboard(page: Page) -> None:
    page.site.serve(Reciter("one two three\nfour five six\nseven"))
    page.open()
    page.press(Keys.TAB)
    page.press("one")
    assert page["prompt"].get_property("value") == "one"
    page.press(Keys.ENTER, holding=Keys.CONTROL)
    assert page.finished() != ""
    seen = []
    while page.js("document.activeElement.parentElement.id") != "text":
        seen.append(
            page.js("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
        )
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", seen[-1]
        page.press(Keys.TAB)
        assert len(seen) < 30, seen
    assert {"prompt", "go", "more", "copy", "clear", "SUMMARY", "temperature", "seed", "stop", "tint"} <= set(seen)
    page["go"].send_keys(Keys.CONTROL, Keys.ENTER)
    assert page.finished() and page["finish"].text != "stopped"
    page["temperature"].clear()
    page["temperature"].send_keys("0", Keys.ENTER)
    assert page.finished() == " two three\nfour five six\nseven"
    for _ in range(2):
        page.press(Keys.TAB)
    while page.js("document.activeElement.parentElement.id") != "text":
        page.press(Keys.TAB)

    def place() -> int:
        index: int = page.js("[...document.querySelectorAll('#text span')].indexOf(document.activeElement)")
        return index

    assert place() == 0 and page["tip"].is_displayed()
    for keys, expected in [
        ([Keys.ARROW_RIGHT] * 2, 2),
        ([Keys.ARROW_LEFT], 1),
        ([Keys.ARROW_DOWN], page.text.index("four") + 1),
        ([Keys.ARROW_DOWN], page.text.index("seven") + 1),
        ([Keys.ARROW_UP] * 2, 1),
        ([Keys.END], len(page.text) - 1),
        ([Keys.ARROW_RIGHT], len(page.text) - 1),
        ([Keys.HOME], 0),
    ]:
        page.press(*keys)
        assert place() == expected, (keys, expected)
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(Keys.ARROW_RIGHT, Keys.TAB)
    page.press(Keys.TAB, holding=Keys.SHIFT)
    assert place() == 1


@pytest.mark.browser
@pytest.mark.parametrize("key", ["", Keys.ESCAPE])
def test_stop_keeps_the_text_and_frees_the_slot(page: Page, key: str) -> None:
    engine = page.site.serve(Reciter("word " * 800, pause=0.02))
    page.open()
    page.enter(temperature=0, max_tokens=4000)
    page["go"].click()
    until(lambda: len(page.text) > 3)
    assert engine.active == 1 and not page["more"].is_enabled()
    page.press(key) if key else page["go"].click()
    kept = page.finished()
    assert len(kept) > 3 and ("word " * 800).startswith(kept)
    assert page["finish"].text == "stopped" and page["status"].text == "Stopped." and page["error"].text == ""
    until(lambda: engine.active == 0)
    assert page.text == kept
    assert page["more"].is_enabled()


@pytest.mark.browser
def test_continue_copy_and_clear(page: Page) -> None:
    page.site.serve(Reciter("abcdefghijklmnop"))
    page.open()
    assert page.generate(temperature=0, max_tokens=4, prompt="ab") == "cdef"
    page["more"].click()
    until(lambda: page.text == "ghij")
    assert page["prompt"].get_property("value") == "abcdef"
    page.finished()
    page["copy"].click()
    until(lambda: page["status"].text == "Copied.")
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
    until(page["top_p"].is_displayed)
    page["go"].click()
    assert page.text == "" and page.focused.get_attribute("name") == "top_p"


@pytest.mark.browser
def test_errors_are_shown_in_the_servers_words(page: Page) -> None:
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
    until(lambda: len(page.text) > 3)
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
def test_a_stream_that_breaks_off_says_so_and_keeps_the_text(page: Page, cleanly: bool) -> None:
    page.expected_errors = ["ERR_INCOMPLETE_CHUNKED_ENCODING"]
    page.site.serve(Reciter("word " * 800, pause=0.005))
    page.site.wire.breaks_after, page.site.wire.breaks_cleanly = 10_000, cleanly
    page.open()
    text = page.generate(temperature=0, max_tokens=4000)
    assert text and ("word " * 800).startswith(text)
    assert page["error"].text.startswith("The stream broke off") and page["finish"].text == "error"


@pytest.mark.browser
@pytest.mark.parametrize("api_key", ["sesame"])
def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page, api_key: str) -> None:
    page.expected_errors = ["401 (Unauthorized)"]
    page.site.serve(Reciter("abc"))
    page.open()
    assert page["key"].is_displayed() and page["key"].get_attribute("type") == "password"
    page.generate(temperature=0)
    assert page["error"].text == page["model"].text and page["error"].text.startswith("an API key is needed")
    assert page.focused == page["key"]
    page.press("wrong", Keys.ENTER)
    until(lambda: page["error"].text == "this API key is not known here")
    page["key"].clear()
    page["key"].send_keys(api_key, Keys.ENTER)
    until(lambda: page.text == "abc")
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
def test_a_new_version_is_noticed(page: Page) -> None:
    page.site.serve(Reciter("abc"))
    page.open()
    page.site.serve(Reciter("def"), version="4")
    assert page.generate(temperature=0) == "def"
    until(lambda: "version 4" in page["model"].text)


@pytest.mark.browser
def test_addresses_are_relative(page: Page) -> None:
    page.site.serve(Reciter("abc"))
    page.site.wire.prefix = "/some/where"
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


@pytest.mark.browser
@pytest.mark.parametrize("text", ["Lorem" * 60, "床前明月光，疑是地上霜。" * 20, "שלום עולם " * 20])
def test_nothing_is_wider_than_a_phone(page: Page, text: str) -> None:
    page.site.serve(Reciter(text))
    page.cdp("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.open()

    def fits() -> bool:
        return bool(page.js("document.documentElement.scrollWidth <= 360 && innerWidth === 360"))

    assert fits() and not page["temperature"].is_displayed()
    page["settings"].find_element("css selector", "summary").click()
    assert fits()
    assert page.generate(temperature=0, max_tokens=1000, prompt=text) == ""
    assert page.generate(prompt="") == text
    assert fits()
    assert page.style("direction") == ("rtl" if "ש" in text else "ltr")
    rights = page.js("[...document.querySelectorAll('#text span')].map((s) => s.getBoundingClientRect().right)")
    for place in (rights.index(max(rights)), len(rights) - 1):
        page.js("document.querySelectorAll('#text span')[arguments[0]].focus()", place)
        until(page["tip"].is_displayed)
        tip = page["tip"].rect
        assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 360 and fits()


@pytest.mark.browser
def test_arrows_follow_the_direction_of_the_text(page: Page) -> None:
    page.site.serve(Reciter("שלום"))
    page.open()
    page.generate(temperature=0)
    page.driver.find_element("css selector", "#text span").click()
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert page.focused.text == "ו"


@pytest.mark.browser
def test_light_and_dark_have_contrast(page: Page) -> None:
    page.site.serve(Reciter("a明b"))
    grounds = set()
    for scheme in ("light", "dark"):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.open()
        page.generate(temperature=0)
        body, box = rgba(page.style("backgroundColor", "body")), rgba(page.style("backgroundColor"))
        grounds.add(body)
        for selector, ground in [
            ("body", body),
            ("#model", body),
            ("label", body),
            ("dd", body),
            ("#error", body),
            ("#go", rgba(page.style("backgroundColor", "#go"))),
            ("#copy", rgba(page.style("backgroundColor", "#copy"))),
            ("#prompt", rgba(page.style("backgroundColor", "#prompt"))),
            ("#text", box),
            ("#text span", over(rgba(page.style("backgroundColor", "#text span:nth-child(2)")), box)),
        ]:
            assert contrast(rgba(page.style("color", selector)), ground) >= 4.5, (scheme, selector)
        page.js("document.querySelector('#text span').style.setProperty('--surprise', 1)")
        strongest = over(rgba(page.style("backgroundColor", "#text span")), box)
        assert contrast(rgba(page.style("color", "#text span")), strongest) >= 4.5
        assert contrast(strongest, box) > 1.2  # and it can be seen
        assert contrast(rgba(page.style("borderTopColor", "#prompt")), box) >= 3
    assert len(grounds) == 2


@pytest.mark.browser
def test_nothing_moves_for_who_wants_no_motion(page: Page) -> None:
    page.site.serve(Reciter("word " * 800, pause=0.02))
    for value, animation in (("no-preference", "pulse"), ("reduce", "none")):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": value}])
        page.open()
        page["go"].click()
        assert page.js("getComputedStyle(document.querySelector('#text'), '::after').animationName") == animation
        page["go"].click()
        page.finished()


Colour = tuple[float, ...]


def rgba(css: str) -> Colour:
    numbers = [float(number) for number in re.findall(r"[\d.]+", css)]
    return tuple([*numbers, 1.0][:4])


def over(top: Colour, ground: Colour) -> Colour:
    return (*(t * top[3] + g * (1 - top[3]) for t, g in zip(top[:3], ground[:3], strict=True)), 1.0)


def contrast(one: Colour, other: Colour) -> float:
    """Reference: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(colour: Colour) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
