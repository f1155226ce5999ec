"""API keys: made for an owner, kept as hashes in a file, looked up for each request."""

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
    """A key, and the line that goes into the file of keys: the owner and a hash, from which no key can be found."""
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", owner):
        raise UserError(f"owner {owner!r}: expected 1 to 64 of the characters A-Z a-z 0-9 . _ @ -")
    key = f"gru-{secrets.token_urlsafe(32)}"
    return key, f"{owner} {digest(key)}"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()  # keys are random: no need to be slow


class Keys:
    """The owners of keys. A file that changes is read again, so that a key can be added or withdrawn at any time."""

    def __init__(self, path: str) -> None:
        """Raises UserError if the file cannot be read."""
        self._path = Path(path)
        self._changed: float | None = None
        self._looked = -REFRESH_SECONDS
        self._owners: dict[str, str] = {}
        self._refresh()

    def owner(self, key: str) -> str | None:
        if time.monotonic() - self._looked > REFRESH_SECONDS:
            try:
                self._refresh()
            except UserError as error:
                log.error("the keys stay as they were: %s", error)
        found, given = None, digest(key)
        for known, owner in self._owners.items():  # all of them: the time tells nothing
            if hmac.compare_digest(known, given):
                found = owner
        return found

    def _refresh(self) -> None:
        self._looked = time.monotonic()
        try:
            changed = self._path.stat().st_mtime
            if changed == self._changed:
                return
            lines = self._path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"serve.keys = {str(self._path)!r}: cannot read it: {error}") from None
        owners: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            owner, _, hashed = line.strip().partition(" ")
            if not re.fullmatch(r"[0-9a-f]{64}", hashed):
                raise UserError(f"{self._path}, line {number}: expected an owner and the SHA-256 of a key")
            owners[hashed] = owner
        self._owners, self._changed = owners, changed
