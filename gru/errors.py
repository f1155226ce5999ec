"""The errors that entry points print as one line: user mistakes, failures of machines, and an ordered stop.

Every other exception is a defect of this program and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in the configuration, the input or the arguments.

    The message is one line that says what was wrong, where, and what would be right. Exit status 2: running the same
    command again would fail again.
    """


class GaveUp(RuntimeError):
    """Processes, machines or services failed too often. Exit status 1: running the same command again may resume."""


class Stopped(Exception):
    """A signal ended the work early; finished work is kept. Exit status 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def first_line(error: BaseException, limit: int | None = 200) -> str:
    """Return the first non-empty line of an error's message, at most `limit` characters; else its type's name."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:limit]


def find_user_error(error: BaseException) -> UserError | None:
    """Return the UserError inside the wrappers that Ray puts around an error of a task or worker, or None."""
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
