"""Start the service: load the states, listen, and stop without losing a request."""

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import uvicorn

from visprompt.errors import UserError, unknown
from visprompt.models.api import backbone_of
from visprompt.models.bank import Bank
from visprompt.models.tuned_state import load_state
from visprompt.runs.predict import find_device
from visprompt.serving.access import ADMIN, USE, Tokens
from visprompt.serving.app import build_app
from visprompt.serving.limits import Limits
from visprompt.serving.service import Service
from visprompt.serving.states import Source, States, source_of

_log = logging.getLogger(__name__)
_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    states: str | Sequence[str],
    *,
    host: str,
    port: int,
    device: str,
    dtype: str,
    weights: str | None,
    budget: int | None,
    compile: bool,
    watch_seconds: float,
    limits: Mapping[str, Any],
) -> None:
    """Serve tuned states until SIGTERM or SIGINT; then answer what has begun, and return.

    Args:
        states: A folder of states, which is watched; a state; or a list of states.
        host: The address to listen on.
        port: The port to listen on.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        dtype: "float32", "bfloat16" or "float16": the type of all weights.
        weights: A file of backbone weights; None if the backbone is embedded or timm's.
        budget: Bytes of memory for the tasks; None for no limit.
        compile: Whether the backbone's blocks are compiled.
        watch_seconds: Seconds between two looks at the states' files.
        limits: The fields of `Limits`.

    Raises:
        UserError: A setting does not fit, no state can be loaded, or the address cannot be listened on.
    """
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, _DTYPES)
    bounds, where, source = Limits(**limits), find_device(device), source_of(states)
    tokens = Tokens(os.environ.get(USE) or None, os.environ.get(ADMIN) or None)
    with _bound(host, port) as listener:  # first, because loading takes longer
        backbone = backbone_of(load_state(_first(source, states)), weights)
        bank = Bank(backbone, budget=budget, device=where, dtype=_DTYPES[dtype], compile=compile)
        kept = States(bank, source)
        kept.refresh()
        wrong = [entry.reason for entry in kept.entries if entry.reason]
        if wrong and (not bank.names or not isinstance(states, str)):  # of a folder, others are served
            raise UserError(wrong[0])
        if host not in _LOCAL and tokens.use is None:
            _log.warning("anyone who reaches %s:%d may use this service: %s sets a token", host, port, USE)
        kept.watch(watch_seconds)
        service = Service(bank, kept, bounds)
        try:
            asyncio.run(_until_signal(service, tokens, listener))
        finally:
            service.close()


def _first(source: Source, states: str | Sequence[str]) -> Path:
    """Return the first state that can be read: it names the backbone of all."""
    files = source()
    if not files:
        raise UserError(
            f"states={states} holds no tuned state: put NAME.safetensors or a run's folder into it"
        )
    for path in files.values():
        with suppress(UserError):
            load_state(path)
            return path
    return next(iter(files.values()))  # whose error is then raised


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; connections are refused until the service listens on it."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another port=... or host=..."
        ) from error
    return listener


async def _until_signal(service: Service, tokens: Tokens, listener: socket.socket) -> None:
    """Listen until a signal; then stop listening, wait for the open requests, and return."""
    app = build_app(service, tokens)[1]
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,  # the entry point has set up logging
            log_level="warning",
            access_log=False,  # /metrics counts; a line for each request would be most of the log
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(service.limits.drain_seconds),
            timeout_keep_alive=30,
            lifespan="off",
        )
    )
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    _stop_on_signals(server, service)
    host, port = listener.getsockname()[:2]
    _log.info("%d tasks on http://%s:%d, all endpoints on /docs", len(service.bank.names), host, port)
    await running
    _log.info("stopped: %d requests accepted, %d answered", app.accepted, app.answered)


def _stop_on_signals(server: uvicorn.Server, service: Service) -> None:
    """Let the first signal end the service after its open requests, and the second at once."""

    def stop(number: int) -> None:
        server.force_exit = service.draining
        if not service.draining:
            _log.info("%s: answering the open requests", signal.Signals(number).name)
        service.draining = True
        server.should_exit = True

    # in place of uvicorn's handlers, which would raise the signal again after a clean end
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
