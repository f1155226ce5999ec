"""The playground, the web page at `/`: one response, whose policy lets a browser run and fetch nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

FOLDER = Path(__file__).parent
STYLE_LINK = '<link rel="stylesheet" href="playground.css">'
SCRIPT_LINK = re.compile(r'<script src="([a-z]+\.js)"></script>')


def add_to(app: FastAPI) -> None:
    """Add the route `GET /`, which returns the page as its files are now."""
    html = page_html()
    headers = {
        "Content-Security-Policy": policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def page_html() -> str:
    """Return index.html with its style sheet and scripts included in it."""
    html, style = (read(name) for name in ("index.html", "playground.css"))
    assert html.count(STYLE_LINK) == 1
    html = html.replace(STYLE_LINK, f"<style>\n{style}</style>")
    return SCRIPT_LINK.sub(lambda link: f"<script>\n{read(link[1])}</script>", html)


def read(name: str) -> str:
    """Return the content of a file of the page."""
    return (FOLDER / name).read_text(encoding="utf-8")


def policy(html: str) -> str:
    """Return the Content-Security-Policy that allows the page's own style and scripts, by their hashes, and its server.

    Reference: https://www.w3.org/TR/CSP3/.
    """

    def digests(tag: str) -> str:
        parts = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in parts)

    directives = {
        "default-src": "'none'",
        "script-src": digests("script"),
        "style-src": digests("style"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())
