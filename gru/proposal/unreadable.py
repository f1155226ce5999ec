"""Files that are not read: what they are, by their beginning or name, and what makes text of them."""

import mimetypes
import shlex
from collections.abc import Mapping
from pathlib import PurePath

_PANDOC = "pandoc -t plain {0} -o {1}.txt"
_OFFICE = "libreoffice --headless --convert-to {2} {0}"
_DOCUMENTS = {
    ".pdf": ("a PDF file", "pdftotext {0}"),
    ".docx": ("a Word file", _PANDOC),
    ".odt": ("an OpenDocument file", _PANDOC),
    ".epub": ("an EPUB book", _PANDOC),
    ".rtf": ("an RTF file", _PANDOC),
    ".doc": ("an old Word file", _OFFICE),
    ".xls": ("a spreadsheet", _OFFICE),
    ".xlsx": ("a spreadsheet", _OFFICE),
    ".ods": ("a spreadsheet", _OFFICE),
    ".ppt": ("a presentation", _OFFICE),
    ".pptx": ("a presentation", _OFFICE),
}
"""What a file of this extension is, and the command that makes text of it."""
_SIGNATURES = {b"%PDF-": ".pdf", b"{\\rtf": ".rtf", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ".doc", b"PK\x03\x04": ".zip"}


def describe_unreadable(path: str, head: bytes) -> str | None:
    """Return what the file at a path is, and how to make text of it, if it begins like one that has none as it is."""
    own = PurePath(path).suffix.lower()
    found = next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)
    if found == ".zip" and own not in _DOCUMENTS:
        return "a ZIP archive: give it the extension .zip"
    if found:
        kind, command = _DOCUMENTS[own if own in _DOCUMENTS else found]
        return f"{kind}, which is not read: make text of it, such as with `{_filled(command, path)}`"
    media = {"image": "an image", "audio": "a recording", "video": "a video"}
    if b"\0" in head and (what := media.get((mimetypes.guess_type(path)[0] or "").partition("/")[0])):
        return f"{what}, which has no text"
    return None


def suggest_conversion(extensions: Mapping[str, int]) -> str | None:
    """Return how to make text of the files that are the most frequent of these, by their number for each extension."""
    documents = [kind for kind in extensions if kind in _DOCUMENTS]
    if not documents:
        return None
    kind = max(documents, key=lambda kind: extensions[kind])
    command = _filled(_DOCUMENTS[kind][1], f"FILE{kind}")
    return f"{kind} files are not read: make text of them, such as with `{command}`"


def _filled(command: str, path: str) -> str:
    target = "csv" if PurePath(path).suffix.lower() in (".xls", ".xlsx", ".ods") else "txt:Text"
    return command.format(shlex.quote(path), shlex.quote(PurePath(path).stem), target)
