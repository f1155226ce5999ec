"""What a person got wrong, and what happened to the machines, told apart from what we got wrong.

Entry points print these as one line; every other exception is a defect and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in the configuration, the input or the arguments.

    The message is one line that says what was wrong, where, and what would be right. Exit status 2: the same again
    would end the same.
    """


class GaveUp(RuntimeError):
    """Processes, machines or services failed too often. Exit status 1: the same again may go on."""


class Stopped(Exception):
    """Work ended early because this process was told to, with what was done kept. Exit status 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, at most 200 characters; else its type's name."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError inside `error`, through the wrappers that Ray puts around what a task or worker raised."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if type(current) is UserError:
            return current
        pending += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        pending += list(getattr(current, "worker_failures", {}).values())
    return None
