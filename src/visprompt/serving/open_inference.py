"""The Open Inference Protocol, version 2 (KServe, Triton), with its model repository extension.

Outputs are `probabilities` [n, classes] and `labels` [n], or of a segmentation task `mask` [n, H, W].
Triton's extensions for binary tensors and for classification (`class_count` of its clients) are served too.
Protocol:
https://github.com/kserve/open-inference-protocol
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from visprompt.models.prepared import Task
from visprompt.serving.access import Tokens
from visprompt.serving.reading import body, take_images
from visprompt.serving.refused import Refused
from visprompt.serving.service import Service, names_of
from visprompt.serving.tensors import images_of, output, split

INPUT, OUTPUTS, MASK = "images", ("probabilities", "labels"), ("mask",)
_VERSION = "1"


def router(service: Service, tokens: Tokens) -> APIRouter:
    """Return the endpoints below /v2."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    user, administrator = [Depends(tokens.user())], [Depends(tokens.administrator())]

    @routes.get("/health/live")
    async def live() -> Response:
        """Answer 200 while the process runs."""
        return Response()

    @routes.get("/health/ready")
    async def ready() -> Response:
        """Answer 200 if requests may be sent here, else 503."""
        return Response(status_code=200 if service.ready else 503)

    @routes.get("", dependencies=user)
    def server() -> dict[str, Any]:
        """Return the server's name and extensions."""
        extensions = ["binary_tensor_data", "classification", "model_repository"]
        return {"name": "visprompt", "version": version("visprompt"), "extensions": extensions}

    @routes.get("/models/{task}/versions/{number}", dependencies=user)
    @routes.get("/models/{task}", dependencies=user)
    def model(task: str, number: str = _VERSION) -> dict[str, Any]:
        """Return a task's input and outputs."""
        _check_version(number)
        return _metadata(service.states.task(task))

    @routes.get("/models/{task}/versions/{number}/ready", dependencies=user)
    @routes.get("/models/{task}/ready", dependencies=user)
    def model_ready(task: str, number: str = _VERSION) -> Response:
        """Answer 200 if a task answers requests."""
        _check_version(number)
        service.states.task(task)
        return Response()

    @routes.post("/models/{task}/versions/{number}/infer", dependencies=user)
    @routes.post("/models/{task}/infer", dependencies=user)
    async def infer(task: str, request: Request, number: str = _VERSION) -> Response:
        """Return the probabilities of images, or their masks; a bad image fails its own request only."""
        _check_version(number)
        async with service.request() as ticket:
            asked_task = await service.task(task)
            content = await body(request, ticket, service)
            length = request.headers.get("inference-header-content-length")
            asked, binary = await service.in_thread(split, content, length)
            wanted = _wanted(asked, MASK if asked_task.kind.dense else OUTPUTS)
            images = await service.in_thread(images_of, asked, binary, INPUT, service.limits.images)
            take_images(len(images), ticket, service)
            outcomes = await service.predict(asked_task, images)
            found = []
            for outcome in outcomes:
                if isinstance(outcome, Refused):
                    raise outcome
                found.append(outcome)
            if len({outcome.shape for outcome in found}) > 1:
                raise Refused(400, "the images differ in size, and so do their masks: send one in a request")
            return await service.in_thread(_answer, asked_task, torch.stack(found), asked.get("id"), wanted)

    @routes.post("/repository/index", dependencies=user)
    async def index(request: Request) -> list[dict[str, str]]:
        """List all tasks with their states; with {"ready": true} only those that answer."""
        asked = await _parameters_of(request, service)
        entries = await service.while_loading(lambda: service.states.entries)
        return [
            {
                "name": entry.name,
                "version": _VERSION,
                "state": "READY" if entry.ready else "UNAVAILABLE",
                "reason": "unloaded" if entry.unloaded else entry.reason or "",
            }
            for entry in entries
            if entry.ready or asked.get("ready") is not True
        ]

    @routes.post("/repository/models/{task}/load", dependencies=administrator)
    async def load(task: str, request: Request) -> JSONResponse:
        """Load a task from its file in the folder of states."""
        asked = await _parameters_of(request, service)
        if asked.get("parameters"):
            raise Refused(400, "a task is loaded from its file in the folder of states: send no parameters")
        await service.while_loading(service.states.load, task)
        return JSONResponse({})

    @routes.post("/repository/models/{task}/unload", dependencies=administrator)
    async def unload(task: str) -> JSONResponse:
        """Free a task, until it is loaded again."""
        await service.while_loading(service.states.unload, task)
        return JSONResponse({})

    return routes


def _check_version(number: str) -> None:
    if number != _VERSION:
        raise Refused(404, f"there is no version {number!r:.40}: a task has the version {_VERSION} only")


async def _parameters_of(request: Request, service: Service) -> dict[str, Any]:
    """Return the JSON object of a request to the repository, whose body may be empty."""
    async with service.request() as ticket:
        content = await body(request, ticket, service)
    return split(content, None)[0] if content else {}


def _metadata(task: Task) -> dict[str, Any]:
    classes = len(task.class_names)
    outputs: list[dict[str, Any]] = [
        {"name": OUTPUTS[0], "datatype": "FP32", "shape": [-1, classes]},
        {"name": OUTPUTS[1], "datatype": "BYTES", "shape": [-1]},
    ]
    if task.kind.dense:
        outputs = [{"name": MASK[0], "datatype": "UINT8", "shape": [-1, -1, -1]}]
    return {
        "name": task.name,
        "versions": [_VERSION],
        "platform": "visprompt",
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
        "outputs": outputs,
        "parameters": {"class_names": [*names_of(task.class_names)], "kind": task.kind.name},
    }


def _wanted(asked: Mapping[str, Any], names: tuple[str, ...]) -> list[tuple[str, bool, int]]:
    """Return the outputs asked for: name, whether binary, and the classes of Triton's classification or 0.

    Args:
        asked: The request.
        names: Names of the task's outputs.
    """
    parameters = asked.get("parameters")
    binary = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    outputs = asked.get("outputs")
    if not outputs:
        return [(name, binary, 0) for name in names]
    wanted: list[tuple[str, bool, int]] = []
    for each in outputs if isinstance(outputs, list) else [None]:
        each = each if isinstance(each, dict) else {}
        name = each.get("name")
        if name not in names:
            raise Refused(400, f"unknown output {name!r:.80}: ask for {' or '.join(names)}")
        if name in [other for other, _, _ in wanted]:
            raise Refused(400, f"the output {name} is asked for twice: ask for it once")
        own = each.get("parameters")
        own = own if isinstance(own, dict) else {}
        count = own.get("classification", 0)
        if type(count) is not int or count < 0 or (count and name != OUTPUTS[0]):
            what = f"give a number for {OUTPUTS[0]}" if OUTPUTS[0] in names else "leave it out"
            raise Refused(400, f"classification={count!r:.40} of {name} does not fit: {what}")
        wanted.append((name, own.get("binary_data", binary) is True, count))
    return wanted


def _answer(task: Task, shares: Tensor, identity: Any, wanted: list[tuple[str, bool, int]]) -> Response:
    """Return the outputs of images with the probabilities `shares` [n, classes], or the masks [n, H, W]."""
    outputs, binaries = [], []
    for name, binary, count in wanted:
        values: np.ndarray | list[str]
        if count:
            values, shape = _classification(task, shares, count)
        elif name in (OUTPUTS[0], *MASK):
            values, shape = shares.numpy(), [*shares.shape]
        else:
            names = names_of(task.class_names)
            values, shape = [task.kind.named(row, names) for row in shares], [len(shares)]
        about, content = output(name, values, shape, binary)
        outputs.append(about)
        binaries.append(content)
    answer = {"model_name": task.name, "model_version": _VERSION, "outputs": outputs}
    if isinstance(identity, str):
        answer["id"] = identity
    text = json.dumps(answer).encode()
    if not any(binary for _, binary, _ in wanted):
        return Response(text, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return Response(text + b"".join(binaries), media_type="application/octet-stream", headers=headers)


def _classification(task: Task, shares: Tensor, count: int) -> tuple[list[str], list[int]]:
    """Return "probability:index:label" of the most probable classes, [n, count]."""
    values, places = shares.topk(min(count, shares.shape[1]))
    names = names_of(task.class_names)
    texts = [
        f"{value:f}:{place}:{names[place]}"
        for row, columns in zip(values.tolist(), places.tolist(), strict=True)
        for value, place in zip(row, columns, strict=True)
    ]
    return texts, [*values.shape]
