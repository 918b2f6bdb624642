"""The service's own endpoints: predict, attention, and list, load and unload tasks."""

import base64
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from torch import Tensor

from visprompt.models.prepared import Task
from visprompt.serving.access import Tokens
from visprompt.serving.masks import PNG, MaskAnswer, check_one, described, png_answer
from visprompt.serving.pictures import to_png
from visprompt.serving.reading import TOP_K, PredictRequest, read
from visprompt.serving.refused import Refused
from visprompt.serving.service import Service, names_of
from visprompt.serving.states import Entry


class ClassProbability(BaseModel):
    """A class and its probability."""

    name: str
    probability: float


class Prediction(BaseModel):
    """What was found in an image: classes, or for a segmentation task a mask; or an error with its status."""

    classes: list[ClassProbability] | None = None
    mask: MaskAnswer | None = None
    error: str | None = None
    status: int | None = None


class PredictAnswer(BaseModel):
    """The predictions of one request, in the order of its images."""

    task: str
    predictions: list[Prediction]


class AttentionAnswer(BaseModel):
    """Where a task looks in an image: attention in the last block, the mean over its heads."""

    task: str
    asking: str
    """The query: the class token, or the pooled tokens whose weights were averaged."""
    patches: list[list[float]]
    """Weight of each patch, rows from the top; all weights here and below sum to 1."""
    class_token: float
    """Weight of class and register tokens."""
    prompts: float
    """Weight of what the method added."""
    image: str
    """PNG in base64: the image as the backbone saw it."""


class BackboneAnswer(BaseModel):
    """The backbone that all tasks share."""

    name: str
    bytes: int


class TaskAnswer(BaseModel):
    """A task of the service."""

    name: str
    ready: bool
    in_memory: bool
    """Whether its tensors are in memory; a task that was evicted is loaded again by the next request."""
    reason: str | None = None
    """Why it is not ready."""
    classes: list[str] | None = None
    """In the order of the model's outputs; only where one task is asked for."""
    kind: str | None = None
    """multi_label: an image may have several classes, and their probabilities do not sum to 1; segmentation:
    each pixel has a class."""
    method: dict[str, Any] | None = None
    bytes: int | None = None


class ErrorAnswer(BaseModel):
    """Any error: one sentence."""

    error: str


def _file(kind: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": kind}


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _file(
                    {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "top_k": {"type": "integer", "minimum": 1, "default": TOP_K},
                    }
                )
            },
            "application/json": {"schema": PredictRequest.model_json_schema()},
        },
    }
}
_ONE_IMAGE = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _file({"image": {"type": "string", "format": "binary"}})},
            "application/json": {"schema": PredictRequest.model_json_schema()},
        },
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "No image of the request can be decoded"},
    404: {"model": ErrorAnswer, "description": "There is no such task"},
    413: {"model": ErrorAnswer, "description": "An image or the request is too large"},
    429: {"model": ErrorAnswer, "description": "The service is full: try again after Retry-After seconds"},
    504: {"model": ErrorAnswer, "description": "The request took too long"},
}


def router(service: Service, tokens: Tokens) -> APIRouter:
    """Return the endpoints below /v1."""
    routes = APIRouter(prefix="/v1", tags=["tasks"])
    user, administrator = [Depends(tokens.user())], [Depends(tokens.administrator())]

    @routes.post(
        "/tasks/{task}/predict",
        dependencies=user,
        openapi_extra=_BODY,
        responses={
            200: {"model": PredictAnswer, "content": {PNG: {}}},
            207: {"model": PredictAnswer, "description": "Some images of the request are bad"},
            **_ERRORS,
            406: {"model": ErrorAnswer, "description": "Accept: image/png with several images"},
        },
    )
    async def predict(task: str, request: Request) -> Response:
        """Return the most probable classes of each image, sent as files or in base64.

        Of a segmentation task, return the mask of each image; with `Accept: image/png` that of one image as a
        PNG.
        """
        async with service.request() as ticket:
            asked = await service.task(task)
            given = await read(request, ticket, service)
            as_png = asked.kind.dense and PNG in request.headers.get("accept", "")
            if as_png:
                check_one(given.images)
            outcomes = await service.predict(asked, given.images)
            if as_png:
                return await service.in_thread(png_answer, outcomes[0])
            return await service.in_thread(_answer, asked, outcomes, given.top_k)

    @routes.post(
        "/tasks/{task}/attention",
        dependencies=user,
        openapi_extra=_ONE_IMAGE,
        responses={
            **_ERRORS,
            422: {"model": ErrorAnswer, "description": "The backbone has no such attention"},
        },
    )
    async def attention(task: str, request: Request) -> AttentionAnswer:
        """Return where a task looks in one image."""
        async with service.request() as ticket:
            asked = await service.task(task)
            given = await read(request, ticket, service)
            if len(given.images) > 1:
                raise Refused(400, f"the request holds {len(given.images)} images: send one")
            image, weights = await service.attention(asked, given.images[0])
            shown = await service.in_thread(to_png, image, asked)
        return AttentionAnswer(
            task=asked.name,
            asking=weights.asking,
            patches=weights.patches[0].mean(0).tolist(),
            class_token=weights.prefix[0].mean(0).sum().item(),
            prompts=sum(part[0].mean(0).sum().item() for part in (weights.prompts, weights.keys_values)),
            image=base64.b64encode(shown).decode(),
        )

    @routes.get("/backbone", dependencies=user)
    def backbone() -> BackboneAnswer:
        """Return the backbone, which is in memory once for all tasks."""
        parameters = service.bank.module.parameters()
        return BackboneAnswer(name=service.bank.backbone_name, bytes=sum(p.nbytes for p in parameters))

    @routes.get("/tasks", dependencies=user, response_model_exclude_none=True)
    def tasks() -> list[TaskAnswer]:
        """List all tasks."""
        loaded = {*service.bank.loaded}
        return [_described(entry, loaded) for entry in service.states.entries]

    @routes.get(
        "/tasks/{task}",
        dependencies=user,
        response_model_exclude_none=True,
        responses={404: _ERRORS[404]},
    )
    def task(task: str) -> TaskAnswer:
        """Return a task with its classes."""
        entry = service.states.entry(task)
        loaded = {*service.bank.loaded}  # the state before a file that is half a copy still answers
        return _described(entry, loaded, service.states.task(task) if entry.ready or task in loaded else None)

    @routes.post(
        "/tasks/{task}/load",
        dependencies=administrator,
        response_model_exclude_none=True,
        responses={404: _ERRORS[404]},
    )
    def load(task: str) -> TaskAnswer:
        """Load a task from its file in the folder of states, again if it is loaded."""
        loaded = service.states.load(task)
        return _described(service.states.entry(task), {task}, loaded)

    @routes.post(
        "/tasks/{task}/unload",
        dependencies=administrator,
        response_model_exclude_none=True,
        responses={404: _ERRORS[404]},
    )
    def unload(task: str) -> TaskAnswer:
        """Free a task, until it is loaded again; requests that have begun are answered."""
        service.states.unload(task)
        return _described(service.states.entry(task), set())

    return routes


def _answer(task: Task, outcomes: Sequence[Tensor | Refused], top_k: int) -> JSONResponse:
    """Return 200; 207 if some images are bad; the error of the first if all are."""

    def found(outcome: Tensor) -> dict[str, Any]:
        if task.kind.dense:
            return {"mask": described(outcome.numpy(), names_of(task.class_names), top_k)}
        return {"classes": _top(outcome, names_of(task.class_names), top_k)}

    bad = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    if len(bad) == len(outcomes):
        raise bad[0]
    predictions = [
        {"error": str(outcome), "status": outcome.status} if isinstance(outcome, Refused) else found(outcome)
        for outcome in outcomes
    ]
    return JSONResponse({"task": task.name, "predictions": predictions}, 207 if bad else 200)


def _top(shares: Tensor, names: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    values, places = shares.topk(min(top_k, len(names)))
    return [
        {"name": names[place], "probability": value}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]


def _described(entry: Entry, loaded: set[str], task: Task | None = None) -> TaskAnswer:
    reason = "it is unloaded" if entry.unloaded else entry.reason
    answer = TaskAnswer(name=entry.name, ready=entry.ready, in_memory=entry.name in loaded, reason=reason)
    if task is not None:
        answer.classes, answer.method = [*names_of(task.class_names)], dict(task.method)
        answer.bytes, answer.kind = task.nbytes, task.kind.name
    return answer
