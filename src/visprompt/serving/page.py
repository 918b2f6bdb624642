"""The page at /: pictures, what each task finds in them, and where it looks."""

import base64
import re
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _hash(tag: str) -> str:
    """Return the source of a policy that allows the page's only element of a kind, and no other."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"


HEADERS = {
    # one file that loads nothing, from this service or another; `blob:` and `data:` are the user's pictures
    "Content-Security-Policy": f"default-src 'none'; script-src {_hash('script')}; "
    f"style-src {_hash('style')}; img-src blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """Return the page's endpoint, which needs no token: the page asks for one, and sends it with requests."""
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers=HEADERS)

    return routes
