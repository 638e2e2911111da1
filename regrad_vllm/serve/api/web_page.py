"""The page at /regrad/: static files that hold no secrets. Its calls to the API need the key, the files don't."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from regrad_vllm.serve.api.http_request import Scope

FOLDER = Path(__file__).parents[1] / "page"
# The browser runs and loads what this server sends, and nothing else: a document's text can't become a program.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser asks each time whether a file has changed
}


class WebPage(StaticFiles):
    """The page's files, with headers that keep everything else out."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response
