"""The web application: all endpoints, one form of error, and a count of every request."""

import asyncio
import logging
import time
from collections.abc import MutableMapping
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from visprompt.serving import native, open_inference, page
from visprompt.serving.access import Tokens
from visprompt.serving.refused import Refused
from visprompt.serving.service import Service

_log = logging.getLogger(__name__)
_ABOUT = 'Tuned states of many tasks on one frozen backbone. All errors are {"error": one sentence}.'


def build_app(service: Service, tokens: Tokens) -> tuple[FastAPI, "Counted"]:
    """Return the application, and the same with its count of requests, which is what a server runs."""
    # the page of fastapi_offline loads no script from another host: tokens are typed into it
    app = FastAPIOffline(title="visprompt", version=version("visprompt"), description=_ABOUT, redoc_url=None)
    app.include_router(page.router())
    app.include_router(native.router(service, tokens))
    app.include_router(open_inference.router(service, tokens))
    app.include_router(_operations(service, tokens))

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def of_the_framework(_: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        return JSONResponse(
            {"error": f"{error.detail}: /docs lists what is served"}, error.status_code, headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]} does not fit: {first['msg']}"}, 400)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the request failed: the log of the service says why"}, 500)

    return app, Counted(app, service)


def _operations(service: Service, tokens: Tokens) -> APIRouter:
    """Return the endpoints for those who run the service."""
    routes = APIRouter(tags=["operation"])

    @routes.get("/health/live")
    async def live() -> dict[str, str]:
        """Answer 200 while the process runs."""
        return {"status": "live"}

    @routes.get("/health/ready")
    async def ready() -> JSONResponse:
        """Answer 200 if requests may be sent here, and 503 while the service stops."""
        return JSONResponse(
            {"status": "ready" if service.ready else "stopping"}, 200 if service.ready else 503
        )

    @routes.get("/metrics", dependencies=[Depends(tokens.user())])
    def metrics() -> Response:
        """Return all metrics in the text format of Prometheus."""
        return Response(service.metrics.text(service.bank), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return routes


class Counted:
    """Measures each request around an application.

    Args:
        app: The application.
        service: Whose metrics are written.

    Attributes:
        accepted: Number of requests whose headers were read.
        answered: Number of those whose answer was sent to the end.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._metrics = service.metrics
        self.accepted = self.answered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0

        async def counted_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                self.answered += 1

        self.accepted += 1
        self._metrics.open.inc()
        try:
            await self._app(scope, receive, counted_send)
        except asyncio.CancelledError:
            if not self._service.draining:
                raise
            _log.warning("a request was cut off: it was not answered before the service ended")
        finally:
            self._metrics.open.dec()
            route = getattr(
                scope.get("route"), "path", "unknown"
            )  # the template: the path itself is a client's text
            self._metrics.requests.labels(route, status).inc()
            self._metrics.latency.labels(route).observe(time.monotonic() - started)
