"""The HTTP interface: OpenAI's chat completions and images, models, files, health and metrics.

An error is `{"error": {"message", "type", "param", "code"}}`, and its message a sentence for the person who asked.
"""

import asyncio
import base64
import hmac
import json
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
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
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.exceptions import HTTPException

from .engine import Event, Request
from .remote_images import decode_data_uri, download
from .server import Settings


logger = logging.getLogger("ray.serve")

# Open WebUI refuses lines of an event stream above 128 KB, and base64 text is a third longer than its bytes.
MAX_LINE_IMAGE = 127 * 1024 * 3 / 4
MAX_ATTEMPTS = 3
FILES = "/v1/files/"
ROUTES = ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", "/v1/models", "/health", "/metrics")
OPEN_ROUTES = ("/health", FILES)  # browsers load images without a key; the ids of files cannot be guessed


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


# ---- Requests ----


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


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
    """The fields that requests for chats and for images share."""

    model: str
    n: int = Field(1, ge=1)
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**32), ge=0, lt=2**63)
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    image_format: Literal["png", "jpeg", "webp"] = "png"


class ChatRequest(ImageOptions):
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    modalities: list[Literal["text", "image"]] = Field(["text", "image"], min_length=1)
    max_images: int | None = Field(None, ge=0)
    num_images_per_prompt: int = Field(1, ge=1)
    image_response_format: Literal["b64_json", "url"] = "b64_json"


class ImagesRequest(ImageOptions):
    prompt: str = Field(min_length=1)
    response_format: Literal["b64_json", "url"] = "b64_json"


def describe_validation(error: RequestValidationError | pydantic.ValidationError) -> ApiError:
    sentences, params = [], []
    reasons = {"extra_forbidden": "is not supported by this server", "missing": "is missing"}
    for item in error.errors()[:5]:
        params.append(".".join(str(key) for key in item["loc"] if key != "body"))
        reason = reasons.get(item["type"], f"is not accepted: {item['msg']}")
        if item["type"] == "json_invalid":
            sentences.append("The request is not valid JSON.")
        elif not params[-1]:
            sentences.append("The body must be a JSON object that is sent with `Content-Type: application/json`.")
        else:
            sentences.append(f"`{params[-1]}` {reason}.")
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
        while self.num_bytes > self.max_bytes:
            _, (oldest, _) = self.files.popitem(last=False)
            self.num_bytes -= len(oldest)
        return key

    def get(self, key: str) -> tuple[bytes, str]:
        if key not in self.files:
            raise ApiError(404, "There is no such file. It may have been deleted to make room for newer ones.")
        return self.files[key]


def count_tokens(ends: list[tuple]) -> dict[str, int]:
    """Add up the last events' values of several answers. Their prompt counts once, as OpenAI counts."""
    prompt, completion = ends[0][1]["prompt_tokens"], sum(counts["completion_tokens"] for _, counts, _ in ends)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Server:
    """The deployment that takes requests, given a handle of the processes that answer them."""

    def __init__(self, engine, settings: Settings):
        self.engine, self.settings = engine.options(stream=True), settings
        self.files = FileStore(int(settings.max_stored_mb * 1e6))
        self.created = int(time.time())

    # -- Reading requests --

    def check_limit(self, name: str, value: int | None, limit: int) -> None:
        if value is not None and value > limit:
            raise ApiError(400, f"`{name}` is {value}, but this server allows at most {limit}.", name)

    def build_request(self, options: ImageOptions, **more) -> Request:
        """Check the fields that all requests share, and return the engine's request."""
        if options.model != (name := self.settings.model_name):
            raise ApiError(404, f"This server serves {name!r}, not {options.model!r}.", "model")
        self.check_limit("num_inference_steps", options.num_inference_steps, self.settings.max_steps)
        self.check_limit("max_tokens", more.get("max_new_tokens"), self.settings.max_tokens)
        width, height = (None, None) if options.size == "auto" else map(int, options.size.split("x"))
        steps, scale = options.num_inference_steps, options.guidance_scale
        decoding = {"num_inference_steps": steps, "guidance_scale": scale, "height": height, "width": width}
        return Request(seed=options.seed, decoding=decoding, image_format=options.image_format, **more)

    async def load_image(self, url: str, base_url: str, param: str) -> bytes:
        allows_remote = self.settings.allow_remote_images
        try:
            if url.startswith("data:"):
                return decode_data_uri(url)
            if url.startswith(base_url + FILES):
                return self.files.get(url.removeprefix(base_url + FILES))[0]
            if url.startswith(("http://", "https://")) and allows_remote:
                return await download(url, int(self.settings.max_body_mb * 1e6))
        except ValueError as error:
            raise ApiError(400, str(error), param) from error
        hint = "" if allows_remote else "; the server was started without --allow-remote-images"
        raise ApiError(400, f"An image must be a data URI such as data:image/png;base64,iVBORw0KGgo={hint}.", param)

    async def read_messages(self, messages: list[Message], base_url: str) -> list[dict]:
        read, num_images = [], 0
        for index, message in enumerate(messages):
            content, param = [], f"messages.{index}.content"
            for part in chain(message.content, message.images):
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                    continue
                num_images += 1
                self.check_limit("messages: number of images", num_images, self.settings.max_images)
                content.append({"type": "image", "image": await self.load_image(part.image_url.url, base_url, param)})
            if not content:
                raise ApiError(400, f"`{param}` is missing.", param)
            read.append({"role": message.role, "content": content})
        return read

    # -- Answers of the replicas --

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
                        has_begun |= event.kind != "accepted"
                        num_left -= event.kind == "done"
                        yield event
                return
            except asyncio.TimeoutError as error:
                raise ApiError(504, f"The answer took longer than {self.settings.timeout:g} seconds.") from error
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning("A replica is gone: %s", type(error).__name__)
                if has_begun or attempt == MAX_ATTEMPTS:
                    raise ApiError(503, "The process that wrote this answer died. Try again.", None, 5) from error
            except TaskCancelledError:  # the client has left
                raise asyncio.CancelledError from None
            except (RayError, StopAsyncIteration) as error:
                logger.error("A request failed: %s", type(error).__name__)
                raise ApiError(500, "The server failed to answer this request.") from error
            finally:
                response.cancel()

    async def collect(self, requests: list[Request], give: Callable) -> tuple[list[tuple], dict]:
        """Return each answer's text, what `give` makes of its images, and its last event's value; and token counts."""
        texts, images, ends = [""] * len(requests), [[] for _ in requests], [None] * len(requests)
        async for event in self.answer(requests):
            if event.kind == "text":
                texts[event.choice] += event.value
            elif event.kind == "image":
                images[event.choice].append(give(event.value))
            elif event.kind == "done":
                ends[event.choice] = event.value
        return [(text.strip(), *rest) for text, *rest in zip(texts, images, ends)], count_tokens(ends)

    def get_base_url(self, http: HttpRequest) -> str:
        return (self.settings.public_url or str(http.base_url)).rstrip("/")

    def choose_url(self, http: HttpRequest, image_format: str, kind: str) -> Callable:
        """Return a function from encoded images to data URIs, or to addresses of files if `kind` is `"url"`."""
        base_url = self.get_base_url(http)

        def give(data: bytes, max_bytes: float = math.inf) -> str:
            if kind == "url" or len(data) > max_bytes:
                return f"{base_url}{FILES}{self.files.put(data, f'image/{image_format}')}"
            return f"data:image/{image_format};base64,{base64.b64encode(data).decode()}"

        return give

    # -- Routes --

    async def chat(self, chat: ChatRequest, http: HttpRequest) -> Response:
        if chat.max_tokens and chat.max_completion_tokens:
            raise ApiError(400, "Pass either `max_tokens` or `max_completion_tokens`.", "max_tokens")
        if (count := chat.n * chat.num_images_per_prompt) > (limit := self.settings.max_n):
            name = "`n`" if chat.num_images_per_prompt == 1 else "`n` times `num_images_per_prompt`"
            raise ApiError(400, f"{name} is {count}, but this server allows at most {limit}.", "n")
        self.check_limit("max_images", chat.max_images, self.settings.max_images)
        max_images = self.settings.max_images if chat.max_images is None else chat.max_images
        base_url = self.get_base_url(http)
        request = self.build_request(
            chat,
            messages=await self.read_messages(chat.messages, base_url),
            max_new_tokens=chat.max_tokens or chat.max_completion_tokens,
            max_images=max_images if "image" in chat.modalities else 0,
            temperature=chat.temperature,
            top_p=chat.top_p,
            num_images_per_prompt=chat.num_images_per_prompt,
            streams=chat.stream,
            reports_progress=chat.stream and chat.stream_options.include_progress,
        )
        give = self.choose_url(http, chat.image_format, chat.image_response_format)
        requests = [replace(request, seed=request.seed + choice) for choice in range(chat.n)]
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": chat.model}
        if chat.stream:
            events = self.answer(requests)
            first = await anext(events)  # so that errors before it have a status of their own
            lines = self.stream(chat, head | {"object": "chat.completion.chunk"}, first, events, give)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        answers, usage = await self.collect(requests, give)
        choices = []
        for index, (text, urls, (reason, *_)) in enumerate(answers):
            images = [{"type": "image_url", "image_url": {"url": url}, "index": i} for i, url in enumerate(urls)]
            message = {"role": "assistant", "content": text} | ({"images": images} if images else {})
            if chat.modalities == ["image"]:  # as vLLM-Omni's clients expect
                message = {"role": "assistant", "content": images}
            choices.append({"index": index, "message": message, "finish_reason": reason})
        return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage})

    async def stream(
        self, chat: ChatRequest, head: dict, event: Event | None, events: AsyncIterator[Event], give: Callable
    ) -> AsyncIterator[str]:
        """Yield the lines of an event stream, given its first event. An error in its middle is its last line."""
        ends = []

        def line(choices: list[dict], **more) -> str:
            return f"data: {json.dumps(head | {'choices': choices} | more)}\n\n"

        try:
            yield line([{"index": i, "delta": {"role": "assistant", "content": ""}} for i in range(chat.n)])
            while event is not None:
                delta, reason, more = {}, None, {}
                if event.kind == "text" and chat.modalities != ["image"]:
                    delta = {"content": event.value}
                elif event.kind == "progress":
                    delta = {"image_progress": {"index": event.index, "progress": event.value}}
                elif event.kind == "image":
                    url = give(event.value, max_bytes=MAX_LINE_IMAGE)
                    delta = {"images": [{"type": "image_url", "image_url": {"url": url}, "index": event.index}]}
                elif event.kind == "done":
                    ends.append(event.value)
                    reason = event.value[0]
                    if len(ends) == chat.n and not chat.stream_options.include_usage:
                        more = {"usage": count_tokens(ends)}
                if delta or reason:
                    yield line([{"index": event.choice, "delta": delta, "finish_reason": reason}], **more)
                event = await anext(events, None)
            if chat.stream_options.include_usage:
                yield line([], usage=count_tokens(ends))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"

    async def generate_image(self, options: ImagesRequest, http: HttpRequest) -> Response:
        return await self.answer_with_images(options, http, [])

    async def answer_with_images(self, options: ImagesRequest, http: HttpRequest, images: list[bytes]) -> Response:
        self.check_limit("n", options.n, self.settings.max_n)
        given = {"prompt": options.prompt, "images": images, "num_images_per_prompt": options.n}
        request = self.build_request(options, **given, max_images=1)
        give = self.choose_url(http, options.image_format, options.response_format)
        ((text, urls, (*_, prompt)),), _ = await self.collect([request], give)
        if not urls:
            raise ApiError(422, f"The model answered without an image: {text[:200]!r}. Ask for one.", "prompt")
        if options.response_format == "b64_json":
            urls = [url.partition(",")[2] for url in urls]
        data = [{options.response_format: url, "revised_prompt": prompt} for url in urls]
        return JSONResponse({"created": int(time.time()), "data": data})

    async def edit_image(self, http: HttpRequest) -> Response:
        form = await http.form(max_files=self.settings.max_images)
        images, fields = [], {}
        for name, value in form.multi_items():
            is_image = name in ("image", "image[]")
            if isinstance(value, str) == is_image:
                must = "must be a file" if is_image else "is a file, which is not supported by this server"
                raise ApiError(400, f"`{name}` {must}.", name)
            if is_image:
                images.append(await value.read())
            else:
                fields[name] = value
        if not images:
            raise ApiError(400, "`image` is missing: send one file or several.", "image")
        return await self.answer_with_images(ImagesRequest.model_validate(fields), http, images)

    def __serve_build_asgi_app__(self) -> "Guard":
        """Return the ASGI application. Ray Serve calls this in the process of the deployment."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        guard = Guard(app, self.settings)

        app.post("/v1/chat/completions", response_model=None)(self.chat)
        app.post("/v1/images/generations", response_model=None)(self.generate_image)
        app.post("/v1/images/edits", response_model=None)(self.edit_image)

        @app.get("/v1/models")
        async def list_models() -> dict:
            model = {"id": self.settings.model_name, "object": "model", "created": self.created, "owned_by": "user"}
            return {"object": "list", "data": [model]}

        @app.get(FILES + "{key}", response_model=None)
        async def send_file(key: str) -> Response:
            data, media_type = self.files.get(key)
            return Response(data, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})

        @app.get("/health", response_model=None)
        async def report_health() -> Response:
            applications = (await asyncio.to_thread(serve.status)).applications
            application = applications.get(serve.get_replica_context().app_name)
            engine = application and application.deployments.get("Engine")
            count = engine.replica_states.get("RUNNING", 0) if engine else 0
            return JSONResponse({"status": "ok" if count else "starting", "replicas": count}, 200 if count else 503)

        @app.get("/metrics", response_model=None)
        async def send_metrics() -> Response:
            text = prometheus_client.generate_latest(guard.registry)
            return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

        app.exception_handler(ApiError)(lambda _, error: error.response())
        for kind in (RequestValidationError, pydantic.ValidationError):
            app.exception_handler(kind)(lambda _, error: describe_validation(error).response())
        app.exception_handler(Exception)(
            lambda *_: ApiError(500, "The server failed to answer this request.").response()
        )
        app.exception_handler(HTTPException)(lambda _, error: ApiError(error.status_code, error.detail).response())
        return guard


class Guard:
    """Around all routes: the key, the size of bodies, the length of the queue, and metrics."""

    def __init__(self, app, settings: Settings):
        self.app, self.settings, self.num_waiting = app, settings, 0
        self.registry = registry = prometheus_client.CollectorRegistry()
        self.num_requests = prometheus_client.Counter(
            "metamorph_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.seconds = prometheus_client.Histogram(
            "metamorph_request_seconds", "Seconds until an answer ends", ["route"], registry=registry
        )
        waiting = prometheus_client.Gauge("metamorph_requests_now", "Requests at work", registry=registry)
        waiting.set_function(lambda: self.num_waiting)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # the start and the end of the process
            return
        start, status, path = time.monotonic(), 499, scope["path"]  # a client that leaves gets no status
        route = FILES if path.startswith(FILES) else path if path in ROUTES else "other"

        async def watch(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        is_work = scope["method"] == "POST" and route not in OPEN_ROUTES
        self.num_waiting += is_work
        try:
            if route not in OPEN_ROUTES:
                self.check_key(dict(scope["headers"]))
            if is_work and self.num_waiting > self.settings.max_queue:
                raise ApiError(429, f"{self.settings.max_queue} requests are waiting. Try again later.", None, 5)
            await self.app(scope, await self.read_body(scope, receive) if is_work else receive, watch)
        except ApiError as error:
            await error.response()(scope, receive, watch)
        except Exception as error:
            logger.error("A request failed: %s", type(error).__name__)  # Starlette has answered 500
        finally:
            self.num_waiting -= is_work
            self.num_requests.labels(route, status).inc()
            self.seconds.labels(route).observe(time.monotonic() - start)

    def check_key(self, headers: dict[bytes, bytes]) -> None:
        expected = f"Bearer {self.settings.api_key}".encode()
        if self.settings.api_key and not hmac.compare_digest(headers.get(b"authorization", b""), expected):
            raise ApiError(401, "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.")

    async def read_body(self, scope, receive):
        """Read the body, up to its limit, and return a `receive` that gives it to the routes."""
        limit, body, has_more = int(self.settings.max_body_mb * 1e6), bytearray(), True
        length = dict(scope["headers"]).get(b"content-length", b"")
        deadline = time.monotonic() + self.settings.timeout
        while has_more:
            if max(len(body), int(length) if length.isdigit() else 0) > limit:
                raise ApiError(413, f"The request is larger than the {limit} bytes that this server takes.")
            try:
                message = await asyncio.wait_for(receive(), max(0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(408, "The request did not arrive in time.") from None
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
        messages = [{"type": "http.request", "body": bytes(body)}]

        async def replay():
            return messages.pop() if messages else await receive()

        return replay
