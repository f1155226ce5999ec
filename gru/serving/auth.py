"""API keys: each belongs to an owner, and only its hash is stored, in a file."""

import hashlib
import hmac
import logging
import re
import secrets
import time
from pathlib import Path

from gru.errors import UserError

REFRESH_SECONDS = 2.0

log = logging.getLogger("gru.access")


def new_key(owner: str) -> tuple[str, str]:
    """Return a new key, and its line for the key file: the owner and a hash, from which the key cannot be recovered."""
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", owner):
        raise UserError(f"owner {owner!r}: expected 1 to 64 of the characters A-Z a-z 0-9 . _ @ -")
    key = f"gru-{secrets.token_urlsafe(32)}"
    return key, f"{owner} {digest(key)}"


def digest(key: str) -> str:
    """Return the SHA-256 of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()  # keys are random: no need to be slow


class Keys:
    """The key file. A file that changes is reloaded, so keys can be added and withdrawn at any time."""

    def __init__(self, path: str) -> None:
        """Raises UserError if the file cannot be read."""
        self._path = Path(path)
        self._modified: float | None = None
        self._checked = -REFRESH_SECONDS
        self._owners: dict[str, str] = {}
        self.malformed: list[str] = []
        """What is wrong with the malformed lines, which give no access; the other lines count."""
        self._refresh()

    def owner(self, key: str) -> str | None:
        """Return the owner of the key, or None if the key is unknown."""
        if time.monotonic() - self._checked > REFRESH_SECONDS:
            try:
                self._refresh()
            except UserError as error:
                log.error("could not reload API keys; keeping the old ones: %s", error)
        match, key_digest = None, digest(key)
        for known_digest, owner in self._owners.items():  # all of them, so that the time reveals nothing
            if hmac.compare_digest(known_digest, key_digest):
                match = owner
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
        owners: dict[str, str] = {}
        malformed: list[str] = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            owner, _, key_digest = line.strip().partition(" ")
            if re.fullmatch(r"[0-9a-f]{64}", key_digest):
                owners[key_digest] = owner
            else:
                malformed.append(f"{self._path}, line {number}: must be an owner and the SHA-256 of a key")
        for problem in malformed:
            log.error("an API key is ignored: %s", problem)
        self._owners, self.malformed, self._modified = owners, malformed, modified
