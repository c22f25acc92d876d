"""The processes that hold a pipeline: they answer requests in batches, and stream text, progress and images.

Ray Serve forms the batches. `generate()` has one set of options per call, so the rows of a batch are grouped by their
options; the images of a batch are decoded together. Each row has its own random generators, so that a request and its
seed give the same answer alone and in a batch.
"""

import asyncio
import io
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor
from ray import serve
from transformers import LogitsProcessor, TextStreamer, TopPLogitsWarper
from transformers.generation import BaseStreamer

from ..cli import load_pipeline
from ..image_reading import read_image
from ..pipeline_metamorph import MetaMorphPipeline
from .remote_images import IMAGE_FORMATS, check_images
from .server import Settings


logger = logging.getLogger("ray.serve")

DEFAULT_LENGTH = 256


@dataclass
class Request:
    """
    One answer that a client asks for: to `messages`, whose images are encoded bytes, or to a `prompt` with `images`,
    as the pipeline takes them. `max_new_tokens` defaults to `DEFAULT_LENGTH`, or to two images if they are longer.
    `temperature` and `top_p` default to the model's settings; a temperature of 0 means greedy decoding. `decoding` has
    options of [`DecodingOptions`]: steps, guidance scale, height and width.
    """

    messages: list[dict] | None = None
    prompt: str | None = None
    images: list[bytes] = field(default_factory=list)
    max_new_tokens: int | None = None
    max_images: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = field(default_factory=lambda: secrets.randbelow(2**32))
    decoding: dict[str, Any] = field(default_factory=dict)
    num_images_per_prompt: int = 1
    image_format: str = "png"
    streams: bool = False
    reports_progress: bool = False


@dataclass
class Event:
    """
    A part of answer number `choice`: `"accepted"` (the first one of a stream), `"text"`, `"progress"` (value: share of
    image `index` that is done), `"image"` (value: its encoded bytes), and as the last one `"done"` (value: finish
    reason, token counts, the prompt's last text) or `"error"` (value: status and sentence).
    """

    kind: str
    value: Any
    index: int = 0
    choice: int = 0


class RowSampler(LogitsProcessor):
    """
    Sample each row with a temperature, a `top_p` and a generator of its own, where `generate` has one of each per
    batch. The largest of logits plus Gumbel noise is a sample of their softmax, so that greedy decoding samples.
    """

    def __init__(self, options: list[tuple[float, float, torch.Generator]]):
        self.options = options

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        for index, (temperature, top_p, generator) in enumerate(self.options):
            if temperature > 0:
                row = TopPLogitsWarper(top_p)(None, scores[index : index + 1] / temperature)
                scores[index] = (row - torch.empty_like(row).exponential_(generator=generator).log())[0]
        return scores


class Row(TextStreamer):
    """A request in a batch. As the streamer of its row, it passes on text and progress while tokens arrive."""

    def __init__(self, request: Request, conversation: list[dict], length: int, pipe, send: Callable[[Event], None]):
        processor, config = pipe.processor, pipe.model.generation_config
        super().__init__(processor.tokenizer, skip_special_tokens=True)
        self.request, self.conversation, self.length, self.send = request, conversation, length, send
        self.image_token_id, self.num_image_tokens = processor.image_token_id, processor.num_image_tokens
        self.image_ids = {self.image_token_id, processor.image_start_token_id, processor.image_end_token_id}
        self.end_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        default = (config.temperature or 1.0, config.top_p or 1.0) if config.do_sample else (0.0, 1.0)
        given = (request.temperature, request.top_p)
        self.temperature, self.top_p = (own if value is None else value for value, own in zip(given, default))
        self.is_abandoned = self.is_finished = False
        self.num_tokens = self.num_visual_tokens = 0

    def put_token(self, token: torch.LongTensor) -> None:
        """Take the next token of the answer, of shape (1,)."""
        value = token.item()
        if self.is_finished:  # `generate` pads rows that have ended
            return
        self.num_tokens += 1
        self.is_finished = value in self.end_ids
        if value not in self.image_ids and not self.is_finished:
            self.put(token)
        elif self.token_cache:
            self.end()
        if value == self.image_token_id:
            index, num_before = divmod(self.num_visual_tokens, self.num_image_tokens)
            self.num_visual_tokens += 1
            first = index * self.request.num_images_per_prompt  # among the decodings of all images
            self.report_progress(first, 0.5 * (num_before + 1) / self.num_image_tokens)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.send(Event("text", text))

    def report_progress(self, index: int, share: float) -> None:
        if self.request.reports_progress:
            self.send(Event("progress", share, index))

    def finish(self) -> None:
        prompt = self.conversation[-1]["content"][-1].get("text", "")
        counts = {"prompt_tokens": self.length, "completion_tokens": self.num_tokens}
        self.send(Event("done", ("stop" if self.is_finished else "length", counts, prompt)))

    def fail(self, status: int, sentence: str) -> None:
        self.is_abandoned = True
        self.send(Event("error", (status, sentence)))


class BatchStreamer(BaseStreamer):
    """Pass each token of a batch on to its row. The first are the prompts (B, S), all others have shape (B,)."""

    def __init__(self, rows: list[Row]):
        self.rows, self.skips_prompt = rows, True

    def put(self, value: torch.LongTensor) -> None:
        if not self.skips_prompt:
            for index, row in enumerate(self.rows):
                row.put_token(value[index : index + 1])
        self.skips_prompt = False

    def end(self) -> None:
        for row in self.rows:
            row.end()


def group(items: Iterable, key: Callable) -> list[list]:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def open_images(files: list[bytes], max_pixels: int) -> list[PIL.Image.Image]:
    """Read images after a look at their sizes, or raise a `ValueError`."""
    check_images(files, max_pixels)
    return [read_image(PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)) for data in files]


def encode_image(image: PIL.Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


class BatchAnswerer:
    """A pipeline that answers batches of requests with different options."""

    def __init__(self, pipe: MetaMorphPipeline, settings: Settings):
        pipe._require_model()
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.settings = pipe, settings

    def prepare(self, requests: list[Request], send: Callable[[int, Event], None]) -> list[Row]:
        """
        Read the images and check the options of requests that differ in their seeds alone, or raise the `ValueError`
        of the pipeline. The rows share the images.
        """
        request, max_pixels = requests[0], self.settings.max_output_pixels
        if request.messages is None:
            images = open_images(request.images, self.settings.max_image_pixels)
            (conversation,) = self.pipe.prepare_conversations(request.prompt, images or None)
        else:
            conversation = request.messages
            parts = [part for message in conversation for part in message["content"] if part["type"] == "image"]
            images = open_images([part["image"] for part in parts], self.settings.max_image_pixels)
            for part, image in zip(parts, images, strict=True):
                part["image"] = image
        options = self.pipe._start_call(1, request.decoding)._options
        if options.height * options.width > max(max_pixels, np.prod(self.pipe.default_size)):
            raise ValueError(
                f"`size` is {options.width}x{options.height}, but this server allows at most {max_pixels} pixels."
            )
        names = ("num_inference_steps", "guidance_scale", "height", "width")
        decoding = {name: getattr(options, name) for name in names}
        # The worker's thread shares the tokenizer, which stores whether it pads; this method pads everywhere.
        inputs = self.pipe.processor.prepare_prompts(conversation)
        self.check_prompt(inputs["input_ids"])
        two_images = 2 * (self.pipe.processor.num_image_tokens + 2)
        default = min(max(DEFAULT_LENGTH, two_images), self.settings.max_tokens)
        length, rows = inputs["input_ids"].shape[1], []
        for choice, request in enumerate(requests):
            request.decoding, request.max_new_tokens = decoding, request.max_new_tokens or default
            rows.append(Row(request, conversation, length, self.pipe, partial(send, choice)))
        return rows

    def check_prompt(self, input_ids: torch.LongTensor) -> None:
        """Raise the error that `generate` would raise for the whole batch."""
        self.pipe.model._check_prompts(input_ids, None, mm_encoder_outputs=True)

    def run_batch(self, rows: list[Row]) -> None:
        """Answer all rows of a batch. A failure is an event of the rows that it concerns."""

        def select_options(row: Row) -> tuple:
            # Padding to a longer prompt must not take the room of a shorter one's answer.
            is_tight = row.length + row.request.max_new_tokens > self.pipe.model._context
            return row.request.max_new_tokens, row.request.max_images, row.length if is_tight else 0

        decodings = [pair for alike in group(rows, select_options) for pair in self.answer_group(alike)]
        for alike in group(decodings, lambda pair: tuple(pair[0].request.decoding.items())):
            try:
                self.decode(alike)
            except Exception as error:  # whatever fails, the process lives on
                self.fail_all([row for row, _ in alike], error)

    def answer_group(self, rows: list[Row]) -> list[tuple[Row, torch.Tensor]]:
        """Answer rows with the same options. Where the pipeline refuses a prompt, find out whose it is."""
        try:
            return self.generate(rows)
        except ValueError as error:
            if len(rows) > 1:
                return [pair for row in rows for pair in self.answer_group([row])]
            rows[0].fail(400, str(error))
        except Exception as error:
            self.fail_all(rows, error)
        return []

    def fail_all(self, rows: list[Row], error: Exception) -> None:
        reason = "ran out of memory" if isinstance(error, (torch.OutOfMemoryError, MemoryError)) else "failed"
        logger.error("A batch of %d requests %s: %s", len(rows), reason, type(error).__name__)
        for row in rows:
            row.fail(500, f"The batch with this request {reason} on the server. Try again.")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate(self, rows: list[Row]) -> list[tuple[Row, torch.Tensor]]:
        """Generate the text of rows; return those that have images, each with its visual tokens (images, N, V)."""
        rows = [row for row in rows if not row.is_abandoned]
        if not rows:
            return []

        def end_abandoned(input_ids, scores, **kwargs) -> torch.BoolTensor:
            return torch.tensor([row.is_abandoned for row in rows], device=input_ids.device)

        request, device = rows[0].request, self.pipe._execution_device
        options = {"streamer": BatchStreamer(rows), "stopping_criteria": [end_abandoned], "do_sample": False}
        if any(row.temperature > 0 for row in rows):
            generators = [torch.Generator(device).manual_seed(row.request.seed) for row in rows]
            sampling = [(row.temperature, row.top_p, own) for row, own in zip(rows, generators)]
            options["logits_processor"] = [RowSampler(sampling)]
        options["max_images"] = request.max_images
        conversations = [row.conversation for row in rows]
        _, visual_tokens = self.pipe.generate_visual_tokens(conversations, request.max_new_tokens, options)
        decodings = []
        for row, tokens in zip(rows, visual_tokens):
            if not len(tokens):
                row.finish()
            elif not tokens.isfinite().all():
                row.fail(500, "The model generated visual tokens that are not numbers: its weights are broken.")
            else:
                decodings.append((row, tokens))
        return decodings

    def draw_noise(self, request: Request, count: int) -> list[tuple[torch.Tensor, torch.Generator]]:
        """
        Return each image's initial latents (1, C, h, w), which the pipeline draws one after the other, and a generator
        for schedulers that add noise at each step. Each has its own, since a batch may decode some of them later.
        """
        pipe, (height, width) = self.pipe, (request.decoding[name] for name in ("height", "width"))
        shape = (1, pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        generator, noise = torch.Generator(pipe._execution_device).manual_seed(request.seed), []
        for index in range(count):
            latents = randn_tensor(shape, generator, generator.device, pipe.unet.dtype)
            own = torch.Generator(generator.device)
            if index == 0:
                own.set_state(generator.get_state())  # as in the pipeline
            else:
                own.manual_seed(int(np.random.SeedSequence([request.seed, index]).generate_state(1, np.uint64)[0]))
            noise.append((latents, own))
        return noise

    def decode(self, decodings: list[tuple[Row, torch.Tensor]]) -> None:
        """Decode the images of rows with the same options, at most a batch at a time, and finish the rows."""
        jobs = []  # a row, the index of the image in its answer, the visual tokens, and its noise
        for row, tokens in decodings:
            repeated = tokens.repeat_interleave(row.request.num_images_per_prompt, dim=0)
            noise = self.draw_noise(row.request, len(repeated))
            jobs += [(row, index, image, *noise[index]) for index, image in enumerate(repeated)]
        options, size = decodings[0][0].request.decoding, self.settings.max_batch_size
        while jobs := [job for job in jobs if not job[0].is_abandoned]:
            chunk, jobs = jobs[:size], jobs[size:]

            def report(call, step: int, timestep, tensors, chunk=chunk) -> None:
                call._interrupt = all(row.is_abandoned for row, *_ in chunk)
                for row, index, *_ in chunk:
                    row.report_progress(index, 0.5 + 0.5 * (step + 1) / call.num_timesteps)

            pixels = self.pipe.decode_visual_tokens(
                torch.stack([image for _, _, image, *_ in chunk]),
                latents=torch.cat([latents for *_, latents, _ in chunk]),
                generator=[generator for *_, generator in chunk],
                output_type="np",
                callback_on_step_end=report,
                **options,
            )
            for (row, index, *_), image in zip(chunk, pixels):
                if np.isfinite(image).all():
                    row.send(Event("image", self.pipe.image_processor.numpy_to_pil(image)[0], index))
                elif not row.is_abandoned:
                    row.fail(500, "The pipeline decoded pixels that are not numbers: its weights are broken.")
        for row, _ in decodings:
            if not row.is_abandoned:
                row.finish()


class Engine(BatchAnswerer):
    """The deployment: it loads a pipeline, and lets Ray Serve form batches of requests."""

    def __init__(self, settings: Settings):
        super().__init__(load_pipeline(settings.pipeline), settings)
        self.worker, self.is_broken = ThreadPoolExecutor(1), False
        # While a batch runs, requests wait for this: the queue of `serve.batch` would form many small batches of them.
        self.is_free = asyncio.Event()
        self.is_free.set()
        self.answer_batch.set_max_batch_size(settings.max_batch_size)

    async def answer(self, requests: list[Request]) -> AsyncIterator[list[Event]]:
        """Yield the events of answers, several at a time where they come fast. The first error is the last event."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def send(choice: int, event: Event) -> None:  # from the worker's thread
            loop.call_soon_threadsafe(events.put_nowait, replace(event, choice=choice))

        try:
            rows = await asyncio.to_thread(self.prepare, requests, send)
        except ValueError as error:
            yield [Event("error", (400, str(error)))]
            return
        tasks = [asyncio.create_task(self.submit(row)) for row in rows]
        try:
            pending, num_left = [], len(rows)
            if requests[0].streams:  # so that a client that leaves is noticed before an answer begins
                yield [Event("accepted", None)]
            while num_left > 0:
                event = await events.get()
                if event.kind == "image":
                    event.value = await asyncio.to_thread(encode_image, event.value, requests[0].image_format)
                pending.append(event)
                num_left = 0 if event.kind == "error" else num_left - (event.kind == "done")
                if num_left == 0 or (events.empty() and requests[0].streams):
                    yield pending
                    pending = []
        finally:  # also reached when the client leaves
            for row, task in zip(rows, tasks):
                row.is_abandoned = True
                task.cancel()

    async def submit(self, row: Row) -> None:
        await self.is_free.wait()
        await self.answer_batch(row)

    @serve.batch(batch_wait_timeout_s=0.02)
    async def answer_batch(self, rows: list[Row]) -> list[None]:
        self.is_free.clear()
        try:
            await asyncio.get_running_loop().run_in_executor(self.worker, self.run_batch, rows)
        except Exception as error:  # Handling a failure has failed, too, as on a GPU that no longer responds.
            self.is_broken = True
            for row in rows:
                row.fail(500, f"The batch with this request failed on the server ({type(error).__name__}). Try again.")
        finally:
            self.is_free.set()
        return [None] * len(rows)

    def check_health(self) -> None:
        """Let Ray Serve, which calls this regularly, replace this process if it cannot answer any more."""
        if self.is_broken:
            raise RuntimeError("A batch failed in a way that leaves nothing to rely on in this process.")
