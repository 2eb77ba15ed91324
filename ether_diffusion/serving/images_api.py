"""The OpenAI images interface: what a client sends, checked; what it gets; and errors in that interface's shape."""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.files import digest_of, digest_of_json
from ether_diffusion.generation.sampling import Sampling, SchedulerName, check_steps
from ether_diffusion.limits import Seed, SignedStrength, Strength
from ether_diffusion.models.bases import check_multiple

from .image_requests import BaseFacts, Failure, Images, ImagesRequest
from .serve_settings import Limits

LONGEST_PROMPT = 32_000
"""OpenAI's limit, in characters."""
Text = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Ignored = Annotated[str, Field(max_length=1000)] | None
"""What other models of this interface do something with."""


class ApiError(Exception):
    """An answer with the status of an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        *,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @classmethod
    def of(cls, failure: Failure) -> ApiError:
        retry_after = 1 if failure.status == 503 else None
        return cls(failure.status, failure.message, failure.code, failure.param, retry_after=retry_after)

    @property
    def content(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class GenerationBody(Settings):
    """The body of `POST /v1/images/generations`. Null is as good as left out.

    The extras are named as vLLM-Omni and SGLang name them. Unknown keys are refused, and so are values that ask for
    what this server does not do: a client that asks for a transparent background should not get another one.
    """

    prompt: Text
    model: Annotated[str, Field(max_length=1000)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, Field(max_length=30)] | None = None
    seed: Seed | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Strength | None = None
    scheduler: SchedulerName | None = None
    scale: SignedStrength | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    quality: Ignored = None
    style: Ignored = None
    moderation: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None

    @property
    def digest(self) -> str:
        """Equal for bodies that ask for the same."""
        return digest_of_json(self.model_dump(), sort_keys=True)


def read_body(content: bytes) -> GenerationBody:
    """The body of a request.

    Raises:
        ApiError: it is not JSON, or not such an object; names the first fault.
    """
    try:
        return GenerationBody.model_validate_json(content, strict=True)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        param = str(fault["loc"][0])[:80] if fault["loc"] else None
        if param is None:
            raise ApiError(
                400, f"the body is no JSON object of a request: {fault['msg'][:200]}", "invalid_json"
            ) from None
        if fault["type"] == "extra_forbidden":
            hint = did_you_mean(param, GenerationBody.model_fields)
            raise ApiError(400, f"{param!r}: unknown.{hint}", "unknown_parameter", param) from None
        given = "" if fault["type"] == "missing" else f" {json.dumps(fault['input'], default=str)[:60]}"
        code = "missing_required_parameter" if fault["type"] == "missing" else "invalid_value"
        raise ApiError(400, f"{param}{given}: {fault['msg'][:200]}", code, param) from None


def to_request(
    body: GenerationBody, facts: BaseFacts, limits: Limits, *, adapter: str | None, key: str | None
) -> ImagesRequest:
    """What the engine gets.

    Args:
        adapter: What the body's model names; None: the base.
        key: The client's, which determines the seed where the body states none. Without both it is a random one.

    Raises:
        ApiError: a size, a number of images or of steps that the base or the limits exclude.
    """
    count = body.n or 1
    if count > limits.images:
        raise ApiError(400, f"n {count}: expected at most {limits.images}", "invalid_value", "n")
    given = {
        "scheduler": body.scheduler,
        "steps": body.num_inference_steps,
        "guidance": body.guidance_scale,
    }
    steps = body.num_inference_steps
    if steps is not None and steps > limits.steps:
        message = f"num_inference_steps {steps}: expected at most {limits.steps}"
        raise ApiError(400, message, "invalid_value", "num_inference_steps")
    sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    try:
        check_steps(sampling, facts.scheduler)
    except UserError as error:
        raise ApiError(400, str(error), "invalid_value", "num_inference_steps") from None
    seed = body.seed
    if seed is None:
        seed = secrets.randbits(31) if key is None else int(digest_of(key, body.digest)[:8], 16) >> 1
    return ImagesRequest(
        prompt=body.prompt,
        adapter=adapter,
        seed=seed,
        num_images=count,
        scale=1.0 if body.scale is None else body.scale,
        negative_prompt=body.negative_prompt or None,
        size=_size(body.size, facts, limits),
        sampling=sampling,
    )


def answer(request: ImagesRequest, images: Images, model: str) -> dict[str, Any]:
    """What the client gets: OpenAI's fields, and the model and seed that make these images again."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": base64.b64encode(file).decode("ascii")} for file in images.files],
        "output_format": "png",
        "size": "{}x{}".format(*request.size),
        "model": model,
        "seed": request.seed,
    }


def _size(text: str | None, facts: BaseFacts, limits: Limits) -> tuple[int, int]:
    if text is None or text == "auto":
        return facts.resolution, facts.resolution
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    width, height = (int(side) for side in found.groups()) if found else (0, 0)
    if width < 1 or height < 1:
        raise ApiError(400, f"size {text!r}: expected WIDTHxHEIGHT in pixels, or auto", "invalid_value", "size")
    longest = limits.size or facts.resolution
    try:
        for side in (width, height):
            check_multiple(side, facts.multiple, "size")
    except UserError as error:
        raise ApiError(400, str(error), "invalid_value", "size") from None
    if max(width, height) > longest:
        raise ApiError(400, f"size {text!r}: expected sides of at most {longest} pixels", "invalid_value", "size")
    return width, height
