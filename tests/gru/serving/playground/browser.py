"""A model that recites a text, a server for it on a bad network, and its playground in a browser."""

import json
import time
from contextlib import ExitStack
from typing import Any

import httpx
import torch
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.remote.webelement import WebElement
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gru.config import ServeConfig
from gru.generation.engine import Engine
from gru.registry.bundle import Bundle
from gru.registry.versions import Version
from gru.serving.api import create_app
from gru.serving.loaded_model import LoadedModel
from tests.gru.registry.bundles import LINEAGE
from tests.gru.serving.server import listening, tiny_bundle, wait_until

TOKENIZER = tiny_bundle().tokenizer
LIKELY, OTHER = 8.0, 7.0  # logits of the byte that a reciter predicts, and of "x"; all others have 0


class Reciter(torch.nn.Module):
    """A model that recites one text: after k bytes, whatever they were, it predicts the k-th byte of the text, and at
    the end the end of the document. The state [1, S, 1] counts tokens."""

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__()
        self.vocab_size, self.pause = TOKENIZER.vocab_size, pause
        self.recited = torch.tensor([*TOKENIZER.encode(text).tolist(), TOKENIZER.end_of_text])

    def initial_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(1, batch, 1)

    def features(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids to predict, [T, S, 1], as features."""
        time.sleep(self.pause)
        read = state[0, :, 0] + torch.arange(len(tokens)).unsqueeze(1)
        return self.recited[read.long().clamp(0, len(self.recited) - 1)].unsqueeze(2), state + len(tokens)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape[:-1], self.vocab_size)
        logits[..., ord("x")] = OTHER
        return logits.scatter(-1, ids, LIKELY)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, state = self.features(tokens, state)
        return self.logits(ids), state


class Network:
    """What can be between browser and server: a path prefix, a server that answers differently, and a network that
    cuts a stream anywhere or breaks it off."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.prefix = ""
        self.request_patch = self.response_patch = (b"", b"")  # a part of each message, and its replacement
        self.cut = 1 << 20  # bytes of a stream that are sent at a time
        self.breaks_after = 1 << 40  # bytes of a stream after which it breaks off
        self.breaks_cleanly = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(self.prefix)
        streams, sent = False, 0

        async def receive_patched() -> Message:
            message = await receive()
            return {**message, "body": message.get("body", b"").replace(*self.request_patch)}

        async def send_patched(message: Message) -> None:
            nonlocal streams, sent
            if message["type"] == "http.response.start":
                streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            if message["type"] == "http.response.start" or not streams:
                return await send(message)
            body = message.get("body", b"").replace(*self.response_patch)
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

        await self.app({**scope, "path": path, "raw_path": path.encode()}, receive_patched, send_patched)


class Site:
    """A server with its own port and network."""

    def __init__(self, config: ServeConfig) -> None:
        self.engines: list[Engine] = []
        self._models: list[LoadedModel] = []
        self.network = Network(create_app(lambda: self._models, config))
        self._open = ExitStack()
        self.url = self._open.enter_context(listening(self.network))

    def serve(self, model: torch.nn.Module, version: str = "3", alias: str = "champion") -> Engine:
        """Serve the model as the version that has the alias."""
        engine = Engine(model, TOKENIZER.end_of_text, 4, 4)  # type: ignore[arg-type]
        self.engines.append(engine)
        values = {"name": "poet", "version": version, "run_id": "r1", "bits_per_byte": 2.5, "created": 17}
        others = {name: "" for name in Version.__dataclass_fields__ if name not in values}
        bundle = Bundle(model, TOKENIZER, LINEAGE, f"digest {version}")  # type: ignore[arg-type]
        rest = [each for each in self._models if each.alias != alias]
        new = LoadedModel(engine, bundle, Version(**values, **others), alias)  # type: ignore[arg-type]
        self._models[:] = [new, *rest] if alias == "champion" else [*rest, new]
        return engine

    def withdraw(self, alias: str) -> None:
        """Serve no version that has the alias."""
        self._models[:] = [each for each in self._models if each.alias != alias]

    def answer(self, **fields: Any) -> Any:
        return httpx.post(f"{self.url}/v1/completions", json=fields, timeout=60).json()["choices"][0]["text"]

    def stop(self) -> None:
        for engine in self.engines:
            engine.close(drain=False)
        self._open.close()


class Page:
    """The playground in a browser, with what a person can do on it."""

    def __init__(self, driver: webdriver.Chrome, site: Site) -> None:
        self.driver, self.site = driver, site
        self.expected_errors: list[str] = []  # parts of messages that the console may have

    def open(self, prefix: str = "") -> None:
        self.driver.get(f"{self.site.url}{prefix}/")
        wait_until(lambda: "loading" not in self["model"].text)

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
        """Fill in the fields, press the button, wait for the end. Return the text."""
        self.enter(**fields)
        self["go"].click()
        return self.finished()

    def finished(self) -> str:
        wait_until(lambda: self["go"].text == "Generate")
        return self.text

    def complaints(self) -> list[str]:
        """Return the console's unexpected messages, and the URLs of requests to any other server."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        complaints = [line for line in messages if not any(part in line for part in self.expected_errors)]
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                complaints += [url] if not url.startswith(f"{self.site.url}/") else []
        return complaints
