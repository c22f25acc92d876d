"""The sources of the chat page's answers: a pipeline in this process, or a running server.

Both yield the same events: pieces of text (`str`), the progress of an image that is coming ([`Progress`]), and
finished images (`PIL.Image.Image`). Errors are raised.
"""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import httpx
import PIL.Image
import torch

from ..generation_metamorph import MetaMorphStreamer
from ..image_reading import read_image
from .remote_images import check_images, decode_data_uri


if TYPE_CHECKING:
    from ..pipeline_metamorph import MetaMorphPipeline


class Progress(NamedTuple):
    """The state of an unfinished image: a title for the current step, and the share of it that is done, 0 to 1."""

    title: str
    share: float


Event = str | Progress | PIL.Image.Image


@dataclass
class Options:
    """Options of an answer, named as in the server's requests. `None` stands for the pipeline's default."""

    seed: int
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    max_tokens: int | None = None
    max_images: int | None = None


class PipelineSource:
    """Answers with a pipeline in this process, one request at a time, in the order in which they came."""

    can_reconstruct = True

    def __init__(self, pipe: "MetaMorphPipeline", name: str):
        self.pipe, self.name = pipe, name
        pipe.set_progress_bar_config(disable=True)
        self.worker = ThreadPoolExecutor(max_workers=1)

    def _run(self, work: Callable[[Callable[[Event], None], threading.Event], None]) -> Iterator[Event]:
        """Yield what `work(emit, stopped)` emits in the worker; `stopped` is set once nobody listens any more."""
        events, stopped = SimpleQueue(), threading.Event()
        future = self.worker.submit(work, events.put, stopped)
        future.add_done_callback(lambda _: events.put(None))
        try:
            yield Progress("Waiting for the model", 0)
            while (event := events.get()) is not None:
                if not isinstance(event, Progress) or events.empty():  # skip progress that is out of date
                    yield event
            future.result()  # raises what `work` has raised
        finally:
            stopped.set()
            future.cancel()

    def _decode(self, visual_tokens, generator, options, emit, stopped) -> PIL.Image.Image:
        """Decode the visual tokens (1, N, V) of an image."""

        def advance(call, step, timestep, tensors) -> dict:
            call._interrupt = stopped.is_set()
            emit(Progress("Decoding an image", (step + 1) / call.num_timesteps))
            return {}

        return self.pipe.decode_visual_tokens(
            visual_tokens,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=generator,
            callback_on_step_end=advance,
        )[0]

    def _answer(self, conversation, options, stopped, on_step, **generation_kwargs):
        """Return an answer's text and visual tokens (images, N, V), and call `on_step(ids)` after each token."""

        def advance(ids, scores, **kwargs) -> bool:  # a stopping criterion
            on_step(ids)
            return stopped.is_set()

        device = self.pipe.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(options.seed)  # of sampled text
            texts, visual_tokens = self.pipe.generate_visual_tokens(
                [conversation],
                512 if options.max_tokens is None else options.max_tokens,
                {"stopping_criteria": [advance], **generation_kwargs},
            )
        return texts[0], visual_tokens[0]

    def chat(self, messages: list[dict], options: Options) -> Iterator[Event]:
        """Answer a conversation. An image is decoded as soon as its visual tokens are there."""

        def work(emit, stopped) -> None:
            streamer = MetaMorphStreamer(self.pipe.processor)
            generator = torch.Generator(self.pipe.device).manual_seed(options.seed)

            def pass_on(ids: torch.Tensor | None = None) -> None:
                while not streamer.text_queue.empty():
                    piece = streamer.text_queue.get()
                    if isinstance(piece, torch.Tensor):
                        emit(self._decode(piece[None], generator, options, emit, stopped))
                    elif piece:
                        emit(piece)
                if ids is not None and ids[0, -1] == streamer.image_token_id:
                    done = (streamer.num_visual_tokens - 1) % streamer.num_image_tokens + 1
                    emit(Progress("An image is coming", done / streamer.num_image_tokens))

            self._answer(messages, options, stopped, pass_on, streamer=streamer, max_images=options.max_images)
            pass_on()

        return self._run(work)

    def compare(self, caption: str, scales: list[float], options: Options) -> Iterator[Event]:
        """Yield the image of a caption once for each guidance scale, from the same visual tokens and noise."""

        def work(emit, stopped) -> None:
            (conversation,) = self.pipe.prepare_conversations(caption)
            emit(Progress("An image is coming", 0))
            text, visual_tokens = self._answer(conversation, options, stopped, lambda ids: None, max_images=1)
            if not len(visual_tokens):
                raise ValueError(f"The model answered {caption!r} without an image: {text[:200]!r}. Ask for one.")
            for scale in scales:
                generator = torch.Generator(self.pipe.device).manual_seed(options.seed)
                chosen = replace(options, guidance_scale=scale)
                emit(self._decode(visual_tokens[:1], generator, chosen, emit, stopped))

        return self._run(work)

    def reconstruct(self, image: PIL.Image.Image, options: Options) -> Iterator[Event]:
        """Yield the image decoded from the visual tokens of a given image."""

        def work(emit, stopped) -> None:
            generator = torch.Generator(self.pipe.device).manual_seed(options.seed)
            emit(self._decode(self.pipe.get_visual_tokens(image), generator, options, emit, stopped))

        return self._run(work)


class ServerSource:
    """Answers with a running server that has OpenAI's routes and takes the fields of [`Options`] in its requests."""

    can_reconstruct = False

    def __init__(self, url: str, key: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(600, connect=10))
        with self._send("GET", "/v1/models") as response:
            self.name = json.loads(response.read())["data"][0]["id"]

    @contextmanager
    def _send(self, method: str, path: str, **body) -> Iterator[httpx.Response]:
        """Send a request. A refusal raises a `ValueError` with the server's sentence."""
        body = {name: value for name, value in body.items() if value is not None}
        try:
            with self.client.stream(method, path, json=body or None) as response:
                if response.is_error:
                    response.read()
                    raise ValueError(_read_error(response.json()))
                yield response
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise ValueError(f"The server {self.url} does not answer as expected: {error}.") from error

    def chat(self, messages: list[dict], options: Options) -> Iterator[Event]:
        """See [`PipelineSource.chat`]."""
        sent = [{**message, "content": [_to_openai(part) for part in message["content"]]} for message in messages]
        body = {"model": self.name, "messages": sent, "stream": True, **asdict(options)}
        body["stream_options"] = {"include_progress": True}
        yield Progress("Waiting for the server", 0)
        with self._send("POST", "/v1/chat/completions", **body) as response:
            for line in response.iter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data:"))
                if "error" in chunk:
                    raise ValueError(_read_error(chunk))
                for choice in chunk["choices"]:
                    delta = choice["delta"]
                    if delta.get("content"):
                        yield delta["content"]
                    if "image_progress" in delta:
                        yield Progress("An image is coming", delta["image_progress"]["progress"])
                    for part in delta.get("images") or []:
                        yield _read_url(part["image_url"]["url"])

    def compare(self, caption: str, scales: list[float], options: Options) -> Iterator[Event]:
        """Yield the image of a caption once for each guidance scale."""
        for scale in scales:
            yield Progress("Waiting for the server", 0)
            chosen = {**asdict(options), "guidance_scale": scale, "max_tokens": None, "max_images": None}
            body = {"model": self.name, "prompt": caption, "response_format": "b64_json", **chosen}
            with self._send("POST", "/v1/images/generations", **body) as response:
                yield _read_url(f"data:;base64,{json.loads(response.read())['data'][0]['b64_json']}")


def _read_url(url: str) -> PIL.Image.Image:
    """Read an image that the server has sent, as a data URI or as an address, but not as a path of this machine."""
    if url.startswith("data:"):
        data = decode_data_uri(url)
        check_images([data])
        return read_image(data)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The server sent an image that is neither a data URI nor an address: {url[:50]!r}.")
    return read_image(url)


def _read_error(body: dict) -> str:
    error = body.get("error", body)
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _to_openai(part: dict) -> dict:
    """Return a content part with its image, if it has one, as a data URI."""
    if part["type"] != "image":
        return part
    buffer = io.BytesIO()
    part["image"].save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
