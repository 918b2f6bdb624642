"""Who may ask what: bearer tokens from the environment."""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from visprompt.serving.refused import Refused

USE, ADMIN = "VISPROMPT_TOKEN", "VISPROMPT_ADMIN_TOKEN"
"""Environment variables of the two tokens: a command line could be read by every user of the machine"""

_bearer = HTTPBearer(auto_error=False)
_Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a service.

    Attributes:
        use: Needed for everything but health; None if anyone may ask.
        admin: Needed to load and unload; it opens the rest too. None if nobody may.
    """

    use: str | None
    admin: str | None

    def user(self) -> Callable[[_Given], Awaitable[None]]:
        """Return the dependency of endpoints for users."""

        async def check(given: _Given) -> None:
            if self.use is not None and not _is_one_of(given, self.use, self.admin):
                raise Refused(401, "this service needs a token: send it as Authorization: Bearer TOKEN")

        return check

    def administrator(self) -> Callable[[_Given], Awaitable[None]]:
        """Return the dependency of endpoints that change what is served."""

        async def check(given: _Given) -> None:
            if self.admin is None:
                raise Refused(403, f"loading and unloading is off: start the service with {ADMIN} set")
            if not _is_one_of(given, self.admin):
                raise Refused(401, "this needs the admin token: send it as Authorization: Bearer TOKEN")

        return check


def _is_one_of(given: HTTPAuthorizationCredentials | None, *tokens: str | None) -> bool:
    """Return whether a token is one of some, in a time that does not tell how much of it is right."""
    # headers are read as Latin-1: these are the bytes that came
    sent = b"" if given is None else given.credentials.encode("latin-1", "replace")
    return any(hmac.compare_digest(sent, token.encode()) for token in tokens if token)
