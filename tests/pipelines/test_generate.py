"""`gru generate`: from an endpoint, a bundle, a run and a storage; in a pipe, and at a terminal."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gru import generate, load_bundle, storage
from gru.config import PipelineConfig, ServeConfig
from gru.errors import UserError
from gru.generation.sampling import SamplingParams
from gru.model.inference import inference_model
from gru.registry.bundle import Bundle
from gru.serving.api import create_app
from jobs import entry, stages
from pipelines import cli
from pipelines.prompt_loop import PromptLoop
from pipelines.text_sources import Endpoint, LocalModel, Session, SessionLost, TextOptions, TextSource, open_source
from tests.gru.serving.server import Server, listening, tiny_bundle
from tests.pipelines.pipeline import free_ports

GRU = [sys.executable, "-c", "from pipelines.cli import main; main()"]
SAMPLING = [
    "--temperature=1.1",
    "--top-p=0.9",
    "--top-k=60",
    "--min-p=0.01",
    "--repetition-penalty=1.2",
    "--stop=zz",
    "--seed=5",
]
GREEDY = TextOptions(SamplingParams(0, temperature=0), 20, [])


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """A model that learned nothing, whose documents do not end."""
    bundle = tiny_bundle()
    with torch.no_grad():
        bundle.model.output_bias[bundle.tokenizer.end_of_text] = -100
    return bundle


@pytest.fixture(scope="module")
def directory(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("run") / "bundle"
    bundle.save(path)
    return str(path)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    with serving(bundle) as server:
        yield server


@contextmanager
def serving(bundle: Bundle) -> Iterator[Server]:
    """An endpoint with the model `poet`, version 3."""
    server = Server("", ServeConfig(), bundle)
    server.model = inference_model(bundle.model)  # type: ignore[assignment]  # as the model manager does
    engine = server.new_engine("3")
    with listening(create_app(lambda: server.models, server.config, settings="")) as server.url:
        yield server
    engine.close(drain=False)


@pytest.fixture
def address(server: Server) -> str:
    return server.url


def config_file(directory: Path, port: int | str) -> str:
    path = directory / "poet.toml"
    path.write_text(f'name = "poet"\nstorage = "store"\ncorpus.sources = ["text.txt"]\nserve.port = {port}\n')
    (directory / "text.txt").write_text("The crow met the fox.")
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """Return what `gru generate` prints on stdout and stderr."""
    parsed = cli.build_parser().parse_args(["generate", *arguments])
    assert parsed.command(parsed) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def whole(source: TextSource, prompt: str, options: TextOptions, session: Session | None = None) -> str:
    return "".join(text for text, _ in source.stream(prompt, options, session))


@pytest.mark.parametrize("length", [b"", b"Content-Length: 9999\r\n"])
def test_a_text_that_breaks_off_is_an_error(length: bytes) -> None:
    """The server ends after a piece of text, with and without the client being able to tell from HTTP."""
    event = json.dumps({"choices": [{"text": " crow", "finish_reason": None}]}).encode()

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as client:
            request = b""
            while not request.endswith(b"}"):  # else closing resets the connection
                request += client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\r\n" + length + b"\r\ndata: " + event + b"\n\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", "poet", "3")
        pieces = endpoint.stream("The", GREEDY)
        assert next(pieces) == (" crow", None)
        with pytest.raises(UserError, match="the text broke off"):
            next(pieces)
        thread.join()


def test_endpoint_and_bundle_give_the_same_text(
    address: str, directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, address.rsplit(":", 1)[1])
    served = run(capsys, config, *SAMPLING, "The crow", "--tokens=300")
    local = run(capsys, directory, "The crow", "--max-tokens=300", *SAMPLING)
    assert served[0] == local[0]
    assert served[0].startswith("The crow") and len(served[0]) > 200
    assert served[1] == f"poet version 3 from {address}, seed 5\n"
    assert local[1] == f"the bundle {directory}, seed 5\n"


def test_endpoint_and_bundle_continue_a_session_alike(address: str, bundle: Bundle) -> None:
    texts = []
    for source in (Endpoint(address, "poet", "3"), LocalModel(bundle, "")):
        begin, resume = Session("s", resume=False), Session("s", resume=True)
        texts.append(
            [whole(source, *part) for part in (("a", GREEDY, begin), ("", GREEDY, resume), ("b", GREEDY, resume))]
        )
        with pytest.raises(SessionLost):
            whole(source, "a", GREEDY, Session("other", resume=True))
    assert texts[0] == texts[1]
    assert "".join(texts[0][:2]) == generate(bundle, "a", tokens=40, temperature=0)


def test_a_character_and_a_stop_string_may_span_two_texts_of_a_session() -> None:
    """The model prefers the bytes of one character, so that its tokens are parts of one, and in any order."""
    bundle = tiny_bundle()
    with torch.no_grad():
        bundle.model.output_bias[[*"\u6625".encode()]] += 100
    options = TextOptions(SamplingParams(3), 60, [])
    one = replace(options, max_tokens=1)
    with serving(bundle) as server:
        for source in (Endpoint(server.url, "poet", "3"), LocalModel(bundle, "")):
            text = whole(source, "", options)
            assert "\u6625\ufffd" in text
            parts = [whole(source, "", one, Session("s", resume=bool(n))) for n in range(60)]
            assert text in ("".join(parts), "".join(parts) + "\ufffd") and "" in parts
            stop = "\u6625\ufffd"
            shorter, longer = (replace(each, stops=[stop]) for each in (one, options))
            first: list[str] = []
            for n in range(60):
                first.append(whole(source, "", shorter, Session("t", resume=bool(n))))
                if "".join(first).endswith("\u6625"):
                    break
            rest = [*source.stream("", longer, Session("t", resume=True))]
            assert ("".join(first), rest[-1]) == (text[: text.index(stop) + 1], ("", "stop"))
            whole(source, "", shorter, Session("u", resume=False))
            assert whole(source, "b", one, Session("u", resume=True)) in ("", "\ufffd"), "a prompt ends the character"


def test_an_endpoint_reports_its_errors_in_one_line(address: str) -> None:
    with pytest.raises(UserError, match=r"status 400: .*max_tokens: at most 4,096"):
        whole(Endpoint(address, "poet", "3"), "a", TextOptions(SamplingParams(0), 5000, []))
    with pytest.raises(UserError, match="does not answer any more"):
        whole(Endpoint(f"http://127.0.0.1:{free_ports(1)[0]}", "poet", "3"), "a", GREEDY)


def train_result(config: PipelineConfig, bundle: Bundle) -> str:
    """Write the results of prepare and train for a config, and the bundle. Return its directory."""
    counts = dict.fromkeys(["documents", "bytes", "tokens", "dropped", "vocabulary", "shards"], 1)
    prepared: Any = {"stage": "prepare", "key": "", "dataset": "d", "digest": "d", "heldout_digest": "", **counts}
    prepared |= {"heldout_by": "hash", "reasons": {}, "dropped_bytes": {}, "passed_over": {}, "seconds": 1.0}
    stage = stages.train_stage(config, stages.prepare_stage(config).commit(prepared))
    directory = f"{stage.directory}/bundle"
    bundle.save(directory)
    stage.commit(
        {
            "stage": "train",
            "key": stage.key,
            "bundle": directory,
            "run": "",
            "steps": 1,
            "heldout_loss": 1.0,
            "seconds": 1.0,
        }
    )
    return directory


def promote_result(config: PipelineConfig, version: str, promoted: bool, bundle: Bundle) -> str:
    """Write the result of promote for a version of the config's model, and the bundle. Return its directory."""
    run = storage.join(config.storage, "runs", f"run-{version}")
    bundle.save(f"{run}/bundle")
    record = {"stage": "promote", "key": "", "model": config.model_name, "version": version, "promoted": promoted}
    storage.write_json(f"{run}/promotion-1.json", {**record, "bundle": "", "reason": "", "run": ""})
    return f"{run}/bundle"


def test_without_its_endpoint_a_config_means_its_newest_champion_or_its_own_run(
    address: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = config_file(tmp_path, address.rsplit(":", 1)[1])  # where another model answers
    overrides = ["name=other"]
    config = entry.load_config(path, overrides)
    with pytest.raises(UserError, match=r"poet\.toml: its endpoint .* is not up, and .*/store has no trained model"):
        open_source(path, overrides, "./store")
    trained = train_result(config, bundle)
    source = open_source(path, overrides, "./store")
    assert source.description == f"other, not registered yet, from {trained}"
    assert whole(source, "a", GREEDY) == generate(bundle, "a", tokens=20, temperature=0)
    promote_result(config, "9", True, bundle)
    champion, challenger = (promote_result(config, *each, bundle) for each in (("10", True), ("11", False)))
    for spec, version, place in (
        (path, 10, champion),
        ("other", 10, champion),
        ("other@champion", 10, champion),
        ("other:11", 11, challenger),
    ):
        source = open_source(spec, overrides if spec == path else [], "./store")
        assert source.description == f"other version {version} from {place}"
    with pytest.raises(UserError, match="other@challenger: only the MLflow server knows this alias"):
        open_source("other@challenger", [], "./store")


def test_mistakes_are_reported_in_one_line(directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    load_bundle(directory).save(tmp_path / "damaged/bundle")
    (tmp_path / "damaged/bundle/tokenizer.json").write_text("{}")
    for model, overrides, message in (
        (directory, ["name=a"], "--set: .* is not the TOML file of a config"),
        ("empty", [], "empty: not a config file, a bundle, the directory of a run, or a registered model"),
        ("a/b", [], "a/b: not a config file"),
        ("absent:1", [], r"absent:1: no such file, bundle or run, and no promoted version .* \./store"),
        ("xyz://a", [], "xyz://a: cannot be read: "),
        ("damaged", [], r"tokenizer\.json: its SHA-256 differs"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(model, overrides, "./store")


def test_in_a_pipe_the_prompt_is_read_from_stdin(directory: str) -> None:
    command = [*GRU, "generate", directory, "--tokens=20", "--seed=3"]
    piped = subprocess.run(command, input="Die Krähe\n".encode(), capture_output=True)
    prompt = "Die Krähe"
    assert piped.stdout.decode() == f"{prompt}{generate(load_bundle(directory), prompt, tokens=20, seed=3)}\n"
    wrong = subprocess.run(command, input=b"a\xff", capture_output=True)
    assert (wrong.returncode, wrong.stderr) == (2, b"error: stdin: byte 1 is not valid UTF-8\n")


def test_a_text_whose_state_is_lost_is_read_again(
    server: Server, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = PromptLoop(Endpoint(server.url, "poet", "3"), GREEDY)
    loop.answer("// a")
    server.engine.forget_sessions()  # as for a new champion
    loop.answer("\\ b")
    first = generate(bundle, "// a", tokens=20, temperature=0)
    second = generate(bundle, f"// a{first}\\ b", tokens=20, temperature=0)
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_ctrl_c_while_a_piece_is_printed_continues_what_was_shown(
    server: Server, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if text and not self.getvalue():
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    loop = PromptLoop(Endpoint(server.url, "poet", "3"), GREEDY)
    stopped, continued = Interrupted(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", stopped)
    with pytest.raises(KeyboardInterrupt):
        loop.answer("// a")
    monkeypatch.setattr(sys, "stdout", continued)
    loop.answer("")
    shown = stopped.getvalue().removesuffix("\n")
    assert shown
    assert continued.getvalue() == generate(bundle, f"// a{shown}", tokens=20, temperature=0) + "\n"


class Terminal:
    """`gru generate` at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._terminal, end = pty.openpty()
        self.process = subprocess.Popen(
            [*GRU, "generate", *arguments],
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(end)
        self._output = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def read_until(self, text: str) -> str:
        """Return the output up to and without `text`."""
        deadline = time.monotonic() + 120
        while text not in self._output:
            assert time.monotonic() < deadline, self._output
            if select.select([self._terminal], [], [], 1)[0]:
                self._output += os.read(self._terminal, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
        before, _, self._output = self._output.partition(text)
        return before

    def say(self, line: str) -> str:
        """Type a line and return the answer, when the next line may be typed."""
        self.type(f"{line}\n")
        self.read_until(f"{line}\n")
        return self.read_until("> ")


def test_at_a_terminal_a_text_is_continued_stopped_and_begun_again(directory: str) -> None:
    bundle = load_bundle(directory)

    def answer(prompt: str) -> str:
        return generate(bundle, prompt, tokens=20, temperature=0)

    with Terminal(directory, "--tokens=20", "--temperature=0", "--seed=0") as terminal:
        assert terminal.read_until("> ").startswith(f"the bundle {directory}, seed 0\nType the beginning")
        assert terminal.say("a") == answer("a") + "\n"
        assert terminal.say("") == answer("a" + answer("a")) + "\n"
        assert terminal.say("/temperature x") == "error: /temperature: must be a number >= 0, not 'x'\n"
        assert terminal.say("/temperature -1") == "error: temperature: must be a number >= 0, not -1.0\n"
        assert terminal.say("/reset") == ""
        assert terminal.say("a") == answer("a") + "\n"
        terminal.say("/reset")
        terminal.say("/tokens 100000000")
        terminal.type("b\n")
        terminal.read_until("b\n")
        text = terminal.read_until(answer("b")) + answer("b")
        terminal.type("\x03")
        text += terminal.read_until("\n\n> ").replace("^C", "")
        terminal.say("/tokens 20")
        assert terminal.say("") == answer("b" + text) + "\n"
        terminal.process.terminate()
        assert terminal.process.wait(60) == 128 + signal.SIGTERM


def test_ctrl_d_leaves_the_terminal(directory: str) -> None:
    with Terminal(directory) as terminal:
        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
