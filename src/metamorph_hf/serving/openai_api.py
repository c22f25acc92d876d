"""The HTTP interface: OpenAI's chat completions and images, models, files, health and metrics.

An error is `{"error": {"message", "type", "param", "code"}}`, and its message a sentence for the person who asked.
"""

import asyncio
import base64
import hmac
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, Literal

import prometheus_client
import pydantic
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field, field_validator
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.exceptions import HTTPException

from .engine import Event, Request
from .remote_images import decode_data_uri, download
from .server import Settings


logger = logging.getLogger("ray.serve")

MAX_LINE_BYTES = 128 * 1024  # Open WebUI refuses longer lines of an event stream
MAX_ATTEMPTS = 3
FILE_PREFIX = "/v1/files/"
ROUTES = ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", "/v1/models", "/health", "/metrics")
OPEN_ROUTES = ("/health", FILE_PREFIX)  # browsers load images without a key; the ids of files cannot be guessed


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


# ---- Requests ----


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    index: int | None = None  # as in our own answers


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = []
    images: list[ImagePart] = []  # as in our own answers

    @field_validator("content", mode="before")
    @classmethod
    def split(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(Strict):
    include_usage: bool = False
    include_progress: bool = False


class ImageOptions(Strict):
    """What chats and images have in common."""

    model: str
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    image_format: Literal["png", "jpeg", "webp"] = "png"

    def decoding(self) -> dict[str, Any]:
        width, height = (None, None) if self.size == "auto" else map(int, self.size.split("x"))
        steps, scale = self.num_inference_steps, self.guidance_scale
        return {"num_inference_steps": steps, "guidance_scale": scale, "height": height, "width": width}


class ChatRequest(ImageOptions):
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    modalities: list[Literal["text", "image"]] = Field(["text", "image"], min_length=1)
    num_images_per_prompt: int = Field(1, ge=1)
    image_response_format: Literal["b64_json", "url"] = "b64_json"


class ImagesRequest(ImageOptions):
    prompt: str = Field(min_length=1)
    response_format: Literal["b64_json", "url"] = "b64_json"


def describe_validation(error: RequestValidationError | pydantic.ValidationError) -> ApiError:
    sentences, params = [], []
    for item in error.errors()[:5]:
        param = ".".join(str(key) for key in item["loc"] if key != "body")
        kind = item["type"]
        text = {"extra_forbidden": "is not supported by this server", "missing": "is missing"}.get(kind)
        text = text or f"is not accepted: {item['msg']}"
        sentences.append("The request's body is not valid JSON." if kind == "json_invalid" else f"`{param}` {text}.")
        params.append(param)
    return ApiError(400, " ".join(sentences), params[0])


# ---- Answers ----


class FileStore:
    """Encoded images by unguessable ids, at most `max_bytes` of them: the oldest go first."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.files: OrderedDict[str, tuple[bytes, str]] = OrderedDict()

    def put(self, data: bytes, media_type: str) -> str:
        key = secrets.token_urlsafe(24)
        self.files[key] = data, media_type
        self.num_bytes += len(data)
        while self.num_bytes > self.max_bytes and len(self.files) > 1:
            _, (oldest, _) = self.files.popitem(last=False)
            self.num_bytes -= len(oldest)
        return key


@dataclass
class Answer:
    """The events of one answer, collected."""

    text: str = ""
    images: list[bytes] = field(default_factory=list)
    finish_reason: str | None = None
    prompt: str = ""

    def add(self, event: Event) -> None:
        if event.kind == "text":
            self.text += event.value
        elif event.kind == "image":
            self.images.append(event.value)
        elif event.kind == "done":
            self.finish_reason, _, self.prompt = event.value


def add_usage(usage: dict[str, int], event: Event) -> None:
    """Add the token counts of a finished answer. The prompt of several answers counts once, as OpenAI counts."""
    _, counts, _ = event.value
    usage["prompt_tokens"] = counts["prompt_tokens"]
    usage["completion_tokens"] = usage.get("completion_tokens", 0) + counts["completion_tokens"]
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]


class Api:
    """The routes, given a handle of the replicas (`Engine`)."""

    def __init__(self, engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.files = FileStore(int(settings.max_stored_mb * 1e6))
        self.created = int(time.time())

    # -- What requests ask for --

    def check_limit(self, name: str, value: int | None, limit: int) -> None:
        if value is not None and value > limit:
            raise ApiError(400, f"`{name}` is {value}, but this server allows at most {limit}.", name)

    def check_options(self, options: ImageOptions, num_decodings: int) -> None:
        if options.model != self.settings.model_name:
            name = self.settings.model_name
            raise ApiError(404, f"The model {options.model!r} is not served here, but {name!r} is.", "model")
        self.check_limit("n", num_decodings, self.settings.max_n)
        self.check_limit("num_inference_steps", options.num_inference_steps, self.settings.max_steps)

    async def load_image(self, url: str, base_url: str, param: str) -> bytes:
        try:
            if url.startswith("data:"):
                return decode_data_uri(url)
            if url.startswith(base_url + FILE_PREFIX):
                return self.find_file(url.removeprefix(base_url + FILE_PREFIX))[0]
            if url.startswith(("http://", "https://")) and self.settings.allow_remote_images:
                return await download(url, int(self.settings.max_body_mb * 1e6))
        except ValueError as error:
            raise ApiError(400, str(error), param) from error
        hint = "" if self.settings.allow_remote_images else "; the server's --allow-remote-images permits addresses"
        raise ApiError(400, f"The image must be a data URI such as data:image/png;base64,iVBORw0KGgo={hint}.", param)

    def find_file(self, key: str) -> tuple[bytes, str]:
        if key not in self.files.files:
            raise ApiError(404, "There is no such file: it may have made room for newer ones.")
        return self.files.files[key]

    async def read_messages(self, messages: list[Message], base_url: str) -> list[dict]:
        read, num_images = [], 0
        for index, message in enumerate(messages):
            content = []
            for part in chain(message.content, message.images):
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                    continue
                num_images += 1
                self.check_limit("messages: number of images", num_images, self.settings.max_images)
                image = await self.load_image(part.image_url.url, base_url, f"messages.{index}.content")
                content.append({"type": "image", "image": image})
            if not content:
                raise ApiError(400, f"`messages.{index}.content` is missing.", f"messages.{index}.content")
            read.append({"role": message.role, "content": content})
        return read

    # -- What the replicas answer --

    async def answer(self, requests: list[Request]) -> AsyncIterator[Event]:
        """Yield the events of the answers, from another replica if one dies before its first event."""
        deadline = time.monotonic() + self.settings.timeout
        for attempt in range(1, MAX_ATTEMPTS + 1):
            response, has_begun, num_left = self.engine.answer.remote(requests), False, len(requests)
            try:
                while num_left:
                    for event in await asyncio.wait_for(anext(response), max(0, deadline - time.monotonic())):
                        if event.kind == "error":
                            raise ApiError(*event.value)
                        has_begun = True
                        num_left -= event.kind == "done"
                        yield event
                return
            except (asyncio.TimeoutError, TimeoutError) as error:
                raise ApiError(504, f"The answer took longer than {self.settings.timeout:g} seconds.") from error
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning("A replica is gone: %s", type(error).__name__)
                if has_begun or attempt == MAX_ATTEMPTS:
                    raise ApiError(503, "The process that wrote this answer died. Try again.", None, 5) from error
            except (RayError, StopAsyncIteration) as error:
                logger.error("A request failed: %s", type(error).__name__)
                raise ApiError(500, "The server failed to answer this request.") from error
            finally:
                response.cancel()

    async def collect(self, requests: list[Request]) -> tuple[list[Answer], dict[str, int]]:
        answers, usage = [Answer() for _ in requests], {}
        async for event in self.answer(requests):
            answers[event.choice].add(event)
            if event.kind == "done":
                add_usage(usage, event)
        return answers, usage

    def give_image(self, data: bytes, image_format: str, base_url: str, as_url: bool) -> str:
        """Return a URL of an image: of a file that is kept for download, or a data URI."""
        if as_url:
            return f"{base_url}{FILE_PREFIX}{self.files.put(data, f'image/{image_format}')}"
        return f"data:image/{image_format};base64,{base64.b64encode(data).decode()}"

    # -- Routes --

    def base_url(self, http: HttpRequest) -> str:
        return (self.settings.public_url or str(http.base_url)).rstrip("/")

    async def chat(self, chat: ChatRequest, http: HttpRequest) -> Response:
        self.check_options(chat, chat.n * chat.num_images_per_prompt)
        if chat.max_tokens and chat.max_completion_tokens:
            raise ApiError(400, "Pass either `max_tokens` or `max_completion_tokens`.", "max_tokens")
        max_tokens = chat.max_tokens or chat.max_completion_tokens
        self.check_limit("max_tokens", max_tokens, self.settings.max_tokens)
        base_url = self.base_url(http)
        common = {
            "messages": await self.read_messages(chat.messages, base_url),
            "max_new_tokens": max_tokens or min(Request.max_new_tokens, self.settings.max_tokens),
            "max_images": self.settings.max_images if "image" in chat.modalities else 0,
            "temperature": chat.temperature,
            "top_p": chat.top_p,
            "decoding": chat.decoding(),
            "num_images_per_prompt": chat.num_images_per_prompt,
            "image_format": chat.image_format,
            "streams": chat.stream,
            "reports_progress": chat.stream and chat.stream_options.include_progress,
        }
        seed = secrets.randbelow(2**32) if chat.seed is None else chat.seed
        requests = [Request(**common, seed=seed + choice) for choice in range(chat.n)]
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": chat.model}
        if chat.stream:
            events = self.answer(requests)
            first = await anext(events)  # so that errors before it have a status of their own
            lines = self.stream(chat, head | {"object": "chat.completion.chunk"}, first, events, base_url)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        answers, usage = await self.collect(requests)
        choices = [
            {"index": index, "message": self.build_message(chat, answer, base_url), "finish_reason": answer.finish_reason}
            for index, answer in enumerate(answers)
        ]
        return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage})

    def build_message(self, chat: ChatRequest, answer: Answer, base_url: str) -> dict:
        as_url = chat.image_response_format == "url"
        urls = [self.give_image(image, chat.image_format, base_url, as_url) for image in answer.images]
        images = [{"type": "image_url", "image_url": {"url": url}, "index": i} for i, url in enumerate(urls)]
        if chat.modalities == ["image"]:  # as vLLM-Omni's clients expect
            return {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}
        return {"role": "assistant", "content": answer.text} | ({"images": images} if images else {})

    async def stream(
        self, chat: ChatRequest, head: dict, first: Event, events: AsyncIterator[Event], base_url: str
    ) -> AsyncIterator[str]:
        """Yield the lines of an event stream. An error in its middle is its last event."""
        usage, num_images = {}, [0] * chat.n

        def line(choices: list[dict], **more) -> str:
            return f"data: {json.dumps(head | {'choices': choices} | more)}\n\n"

        def chunk(event: Event, delta: dict, finish_reason: str | None = None) -> dict:
            return {"index": event.choice, "delta": delta, "finish_reason": finish_reason}

        async def follow() -> AsyncIterator[Event]:
            yield first
            async for event in events:
                yield event

        try:
            yield line([{"index": i, "delta": {"role": "assistant", "content": ""}} for i in range(chat.n)])
            async for event in follow():
                if event.kind == "text" and chat.modalities != ["image"]:
                    yield line([chunk(event, {"content": event.value})])
                elif event.kind == "progress":
                    yield line([chunk(event, {"image_progress": {"index": event.index, "progress": event.value}})])
                elif event.kind == "image":
                    # A base64 text is a third longer than its bytes, and the line around it is short.
                    as_url = chat.image_response_format == "url" or len(event.value) * 4 / 3 > MAX_LINE_BYTES - 1024
                    url = self.give_image(event.value, chat.image_format, base_url, as_url)
                    index, num_images[event.choice] = num_images[event.choice], num_images[event.choice] + 1
                    image = {"type": "image_url", "image_url": {"url": url}, "index": index}
                    yield line([chunk(event, {"images": [image]})])
                elif event.kind == "done":
                    add_usage(usage, event)
                    is_last = not chat.stream_options.include_usage and event.choice == chat.n - 1
                    yield line([chunk(event, {}, event.value[0])], **({"usage": usage} if is_last else {}))
            if chat.stream_options.include_usage:
                yield line([], usage=usage)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"

    async def generate_image(self, options: ImagesRequest, http: HttpRequest, images: list[bytes]) -> Response:
        self.check_options(options, options.n)
        self.check_limit("image: number of images", len(images), self.settings.max_images)
        request = Request(
            prompt=options.prompt,
            images=images,
            max_new_tokens=min(Request.max_new_tokens, self.settings.max_tokens),
            decoding=options.decoding(),
            num_images_per_prompt=options.n,
            image_format=options.image_format,
            **({} if options.seed is None else {"seed": options.seed}),
        )
        (answer,), _ = await self.collect([request])
        if not answer.images:
            raise ApiError(422, f"The model answered without an image: {answer.text[:200]!r}. Ask for one.", "prompt")
        data, base_url = [], self.base_url(http)
        for image in answer.images:
            if options.response_format == "url":
                given = {"url": self.give_image(image, options.image_format, base_url, as_url=True)}
            else:
                given = {"b64_json": base64.b64encode(image).decode()}
            data.append(given | {"revised_prompt": answer.prompt})
        return JSONResponse({"created": int(time.time()), "data": data})

    async def edit_image(self, http: HttpRequest) -> Response:
        form = await http.form(max_files=self.settings.max_images, max_fields=50)
        uploads = [*form.getlist("image"), *form.getlist("image[]")]
        fields = {name: value for name, value in form.items() if name not in ("image", "image[]")}
        for name, value in [("image", upload) for upload in uploads] + list(fields.items()):
            if isinstance(value, str) == (name == "image"):
                must = "must be a file" if name == "image" else "is a file, which is not supported by this server"
                raise ApiError(400, f"`{name}` {must}.", name)
        if not uploads:
            raise ApiError(400, "`image` is missing: send one file or several.", "image")
        images = [await upload.read() for upload in uploads]
        return await self.generate_image(ImagesRequest.model_validate(fields), http, images)

    def build_app(self):
        """Return the ASGI application."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.post("/v1/chat/completions", response_model=None)(self.chat)

        @app.post("/v1/images/generations", response_model=None)
        async def generate(options: ImagesRequest, http: HttpRequest) -> Response:
            return await self.generate_image(options, http, [])

        @app.post("/v1/images/edits", response_model=None)
        async def edit(http: HttpRequest) -> Response:
            return await self.edit_image(http)

        @app.get("/v1/models")
        async def list_models() -> dict:
            model = {"id": self.settings.model_name, "object": "model", "created": self.created, "owned_by": "user"}
            return {"object": "list", "data": [model]}

        @app.get(FILE_PREFIX + "{key}", response_model=None)
        async def send_file(key: str) -> Response:
            data, media_type = self.find_file(key)
            return Response(data, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})

        @app.get("/health", response_model=None)
        async def report_health() -> Response:
            status = await asyncio.to_thread(serve.status)
            replicas = [
                deployment.replica_states.get("RUNNING", 0)
                for application in status.applications.values()
                for name, deployment in application.deployments.items()
                if name == "Engine"
            ]
            is_healthy = sum(replicas) > 0
            return JSONResponse({"status": "ok" if is_healthy else "starting"}, 200 if is_healthy else 503)

        guard = Guard(app, self.settings)

        @app.get("/metrics", response_model=None)
        async def send_metrics() -> Response:
            text = prometheus_client.generate_latest(guard.registry)
            return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

        app.exception_handler(ApiError)(lambda _, error: error.response())
        for kind in (RequestValidationError, pydantic.ValidationError):
            app.exception_handler(kind)(lambda _, error: describe_validation(error).response())
        app.exception_handler(HTTPException)(lambda _, error: ApiError(error.status_code, str(error.detail)).response())
        return guard


class Guard:
    """Around all routes: the key, the size of bodies, the length of the queue, and metrics."""

    def __init__(self, app, settings: Settings):
        self.app, self.settings, self.num_waiting = app, settings, 0
        self.registry = prometheus_client.CollectorRegistry()
        self.num_requests = prometheus_client.Counter(
            "metamorph_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            "metamorph_request_seconds",
            "Seconds until the end of an answer",
            ["route"],
            registry=self.registry,
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )
        waiting = prometheus_client.Gauge("metamorph_requests_now", "Requests at work", registry=self.registry)
        waiting.set_function(lambda: self.num_waiting)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # the start and the end of the process
            return
        start, status, path = time.monotonic(), 499, scope["path"]  # a client that leaves gets no status
        route = FILE_PREFIX if path.startswith(FILE_PREFIX) else path if path in ROUTES else "other"

        async def watch(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        is_work, self.num_waiting = scope["method"] == "POST", self.num_waiting + (scope["method"] == "POST")
        try:
            self.check_key(scope, route)
            if is_work and self.num_waiting > self.settings.max_queue:
                raise ApiError(429, f"{self.settings.max_queue} requests are waiting. Try again later.", None, 5)
            await self.app(scope, await self.read_body(scope, receive) if is_work else receive, watch)
        except ApiError as error:
            await error.response()(scope, receive, watch)
        except Exception as error:
            logger.error("A request failed: %s", type(error).__name__)
            if status == 499:
                await ApiError(500, "The server failed to answer this request.").response()(scope, receive, watch)
        finally:
            self.num_waiting -= is_work
            self.num_requests.labels(route, status).inc()
            self.seconds.labels(route).observe(time.monotonic() - start)

    def check_key(self, scope, route: str) -> None:
        if not self.settings.api_key or route in OPEN_ROUTES:
            return
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        if not hmac.compare_digest(given, self.settings.api_key.encode()):
            raise ApiError(401, "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.")

    async def read_body(self, scope, receive):
        """Read the body, up to its limit, and return a `receive` that gives it to the routes."""
        limit, body = int(self.settings.max_body_mb * 1e6), bytearray()
        error = ApiError(413, f"The request is larger than the {limit} bytes that this server takes.")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise error
        message = {"type": "http.request", "more_body": True}
        while message["type"] == "http.request" and message.get("more_body"):
            try:
                message = await asyncio.wait_for(receive(), self.settings.timeout)
            except asyncio.TimeoutError:
                raise ApiError(408, "The request did not arrive in time.") from None
            body += message.get("body", b"")
            if len(body) > limit:
                raise error
        messages = [{"type": "http.request", "body": bytes(body)}]

        async def replay():
            return messages.pop() if messages else await receive()

        return replay


class Server:
    """The deployment that takes requests. Ray Serve calls `__serve_build_asgi_app__` in its process."""

    def __init__(self, engine, settings: Settings):
        self.engine, self.settings = engine, settings

    def __serve_build_asgi_app__(self):
        return Api(self.engine.options(stream=True), self.settings).build_app()
