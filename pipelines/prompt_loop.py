"""`gru generate` for a script, which gets one text, and for a person at a terminal, who gets one after another."""

import io
import os
import re
import signal
import sys
import uuid
from contextlib import closing, suppress
from dataclasses import replace
from types import FrameType

from gru.errors import UserError
from gru.terminal import printable
from pipelines.interrupts import STOP_SIGNALS, interrupts_deferred
from pipelines.text_sources import Session, SessionLost, TextOptions, TextSource

HELP = """\
Type the beginning of a text. What you type then is added to it, and an empty line continues it as it is.
A line that ends in \\ continues on the next line. /temperature T and /tokens N change the next texts, /reset begins a
new text, /help shows this. Ctrl-C stops a text, Ctrl-D leaves."""
BROKEN_PIPE = 128 + signal.SIGPIPE


class Terminated(Exception):
    """A signal that ends the process arrived; the argument is its number."""


def read_prompt(argument: str | None) -> str:
    """Return the prompt: the argument, or else stdin without its last line end. Raises UserError if it is no text."""
    if argument is None:
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"stdin: byte {error.start:,} is not valid UTF-8") from None
        return text.removesuffix("\n").removesuffix("\r")
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise UserError(f"PROMPT: {argument!a}: not valid UTF-8") from None
    return argument


def print_text(source: TextSource, prompt: str, options: TextOptions) -> int:
    """Print the prompt and its continuation as it is generated. Return the exit status."""
    try:
        shown = printable if sys.stdout.isatty() else str  # a terminal would obey some characters
        beginning = prompt  # printed with the first piece: after an error, nothing is on stdout
        with closing(source.stream(prompt, options)) as pieces:
            for text, _ in pieces:
                print(shown(beginning + text), end="", flush=True)
                beginning = ""
        print(flush=True)
    except BrokenPipeError:  # the reader has enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        return BROKEN_PIPE
    return 0


class PromptLoop:
    """A text that a person and the model write in turn. Its state is kept as a session, so it is never read again."""

    def __init__(self, source: TextSource, options: TextOptions) -> None:
        self._source, self._options = source, options
        self._text = ""  # since its beginning, for a session whose state is lost
        self._session: Session | None = None

    def run(self) -> int:
        """Read prompts until Ctrl-D. Return the exit status."""
        with suppress(ImportError):
            import readline  # noqa: F401  # where Python has it, input() has line editing and history

        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # read_prompt reports what is not valid
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _terminate)
        print(HELP, file=sys.stderr)
        try:
            while True:
                try:
                    self.answer(_read_lines())
                except KeyboardInterrupt:
                    print()
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
        except EOFError:
            print()
            return 0
        except Terminated as termination:
            return 128 + termination.args[0]

    def answer(self, line: str) -> None:
        """Execute a command, or continue the text. Raises UserError."""
        if re.match("/[a-z]", line):
            self._execute(*line.split())
            return
        addition = read_prompt(line)
        try:
            self._continue(addition)
        except SessionLost:  # other sessions have displaced it, or another replica answered
            self._continue(addition)

    def _continue(self, addition: str) -> None:
        prompt = addition if self._session else self._text + addition
        session = self._session or Session(uuid.uuid4().hex, resume=False)
        self._session = None  # a text that is stopped leaves no state
        generated, finish = "", None
        try:
            with closing(self._source.stream(prompt, self._options, session)) as pieces:
                for text, finish in pieces:  # noqa: B007
                    with interrupts_deferred(signal.SIGINT):  # what was shown is what is continued
                        generated += text
                        print(printable(text), end="", flush=True)
            self._session = replace(session, resume=True)
        finally:
            if generated or finish:
                self._text += addition + generated
                print(end="" if generated.endswith("\n") else "\n", flush=True)
        if finish == "stop" and not self._options.stops:
            self._text = ""
            print("(the document ends here; what follows begins another one)", file=sys.stderr)

    def _execute(self, command: str, *values: str) -> None:
        params = self._options.params
        match command, values:
            case "/reset", ():
                self._text, self._session = "", None
            case "/temperature", (value,):
                self._options = replace(self._options, params=replace(params, temperature=_number(value)))
            case "/tokens", (value,) if value.isdecimal() and int(value) > 0:
                self._options = replace(self._options, max_tokens=int(value))
            case "/help", ():
                print(HELP, file=sys.stderr)
            case _:
                raise UserError(f"{' '.join([command, *values])}: not one of /reset, /temperature T, /tokens N, /help")


def _read_lines() -> str:
    """Read a line, and the next one after each that ends in a backslash. Raises EOFError after Ctrl-D."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"/temperature: must be a number >= 0, not {text!r}") from None


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)
