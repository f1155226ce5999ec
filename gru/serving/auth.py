"""API keys: each belongs to an owner, and only its hash is stored, in a file."""

import hashlib
import hmac
import logging
import re
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from gru.errors import UserError

REFRESH_SECONDS = 2.0

log = logging.getLogger("gru.access")


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key."""

    owner: str
    until: date | None
    """The last day on which it is valid, in UTC; None: it does not expire."""

    @property
    def expired(self) -> bool:
        return self.until is not None and datetime.now(UTC).date() > self.until


def new_key(owner: str, until: date | None = None) -> tuple[str, str]:
    """Return a new key, and its line for the key file: the owner, a hash, from which the key cannot be recovered, and
    the last day on which it is valid, in UTC, unless it does not expire. Raises UserError.
    """
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", owner):
        raise UserError(f"owner {owner!r}: expected 1 to 64 of the characters A-Z a-z 0-9 . _ @ -")
    if ApiKey(owner, until).expired:
        raise UserError(f"{until}: the key would have expired: choose a day that is not over")
    key = f"gru-{secrets.token_urlsafe(32)}"
    return key, " ".join([owner, digest(key), *([until.isoformat()] if until else [])])


def digest(key: str) -> str:
    """Return the SHA-256 of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()  # keys are random: no need to be slow


class Keys:
    """The key file. A file that changes is reloaded, so keys can be added, renamed and withdrawn at any time."""

    def __init__(self, path: str) -> None:
        """Raises UserError if the file cannot be read."""
        self._path = Path(path)
        self._modified: float | None = None
        self._checked = -REFRESH_SECONDS
        self._keys: dict[str, ApiKey] = {}  # by digest
        self.malformed: list[str] = []
        """What is wrong with the malformed lines, which give no access; the other lines count."""
        self._refresh()

    def find(self, key: str) -> ApiKey | None:
        """Return what the file says of the key, which may have expired; None if it is unknown."""
        if time.monotonic() - self._checked > REFRESH_SECONDS:
            try:
                self._refresh()
            except UserError as error:
                log.error("could not reload API keys; keeping the old ones: %s", error)
        match, key_digest = None, digest(key)
        for known_digest, known in self._keys.items():  # all of them, so that the time reveals nothing
            if hmac.compare_digest(known_digest, key_digest):
                match = known
        return match

    def _refresh(self) -> None:
        """Read the file if it has changed."""
        self._checked = time.monotonic()
        try:
            modified = self._path.stat().st_mtime
            if modified == self._modified:
                return
            lines = self._path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"serve.keys = {str(self._path)!r}: cannot read the file: {error}") from None
        keys: dict[str, ApiKey] = {}
        malformed: list[str] = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                owner, key_digest, *until = line.split()
                if not re.fullmatch(r"[0-9a-f]{64}", key_digest) or len(until) > 1:
                    raise ValueError
                keys[key_digest] = ApiKey(owner, date.fromisoformat(until[0]) if until else None)
            except ValueError:
                expected = "must be an owner, the SHA-256 of a key and, if it expires, a date, such as 2030-12-31"
                malformed.append(f"{self._path}, line {number}: {expected}")
        for problem in malformed:
            log.error("an API key is ignored: %s", problem)
        self._keys, self.malformed, self._modified = keys, malformed, modified
