"""The replicas that hold a pipeline: they answer requests in batches, and stream text, progress and images.

Ray Serve forms the batches. `generate()` has one set of options per call, so that the rows of a batch are grouped by
theirs; all images of the batch are decoded together. Each row has its own random generators, so that a request and
its seed give the same answer alone and in a batch.
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
from ray import serve
from transformers import LogitsProcessor, TextStreamer, TopPLogitsWarper
from transformers.generation import BaseStreamer

from ..cli import load_pipeline
from ..image_reading import read_image
from .server import Settings


logger = logging.getLogger("ray.serve")

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # PIL knows more, some of which run other programs
BATCH_WAIT_SECONDS = 0.02


@dataclass
class Request:
    """
    One answer that a client asks for.

    Args:
        messages (`list[dict]`): A conversation whose images are encoded bytes, instead of `prompt` and `images`.
        prompt (`str`), images (`list[bytes]`): As the pipeline takes them.
        max_new_tokens (`int`), max_images (`int`): Limits of the answer.
        temperature (`float`), top_p (`float`): How text is sampled; `None` is the model's default, 0 is greedy.
        seed (`int`): Seed of the text and of the images' noise.
        decoding (`dict`): Options of [`DecodingOptions`]: steps, guidance scale, height and width.
        num_images_per_prompt (`int`): Decodings of each image.
        image_format (`str`): `"png"`, `"jpeg"` or `"webp"`.
        streams (`bool`), reports_progress (`bool`): Whether events are sent while the answer is written.
    """

    messages: list[dict] | None = None
    prompt: str | None = None
    images: list[bytes] = field(default_factory=list)
    max_new_tokens: int = 256
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
    A part of answer number `choice`. The last one is `"done"` (value: finish reason, token counts and the prompt's
    last text) or `"error"` (value: status and sentence); before it come `"text"`, `"progress"` (value: share of image
    `index` that is done) and `"image"` (value: its encoded bytes).
    """

    kind: str
    value: Any
    index: int = 0
    choice: int = 0


class RowSampler(LogitsProcessor):
    """
    Sample each row with its own temperature, `top_p` and seed, where `generate` has one of each for a whole batch: the
    largest of the logits plus Gumbel noise is a sample of their softmax, so that greedy decoding samples.

    Args:
        options (list of `(temperature, top_p, generator)`): One per row. Rows with temperature 0 stay greedy.
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
        super().__init__(pipe.processor.tokenizer, skip_special_tokens=True)
        processor, config = pipe.processor, pipe.model.generation_config
        self.request, self.conversation, self.length, self.send = request, conversation, length, send
        self.image_ids = {processor.image_token_id, processor.image_start_token_id, processor.image_end_token_id}
        self.image_token_id, self.num_image_tokens = processor.image_token_id, processor.num_image_tokens
        ends = config.eos_token_id
        self.end_ids = {*ends} if isinstance(ends, list) else {ends}
        sampled = (config.temperature or 1.0, config.top_p or 1.0) if config.do_sample else (0.0, 1.0)
        given = (request.temperature, request.top_p)
        self.temperature, self.top_p = (new if old is None else old for old, new in zip(given, sampled))
        self.is_abandoned = self.is_finished = False
        self.num_tokens = self.num_visual_tokens = 0
        self.held = ""  # white space, until more text follows: answers have none at their ends
        self.has_text = False

    def put_token(self, token: torch.LongTensor) -> None:
        """Take the next token of the answer, of shape (1,)."""
        if self.is_finished:  # `generate` pads rows that have ended
            return
        value = token.item()
        self.num_tokens += 1
        if value not in self.image_ids:
            self.put(token)
        elif self.token_cache:
            self.end()
        if value == self.image_token_id:
            self.num_visual_tokens += 1
            index, done = divmod(self.num_visual_tokens - 1, self.num_image_tokens)
            self.report_progress(index, 0.5 * (done + 1) / self.num_image_tokens)
        if value in self.end_ids:
            self.is_finished = True
            self.end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self.held + text
        text = text if self.has_text else text.lstrip()
        shown = text.rstrip()
        self.held = text[len(shown) :]
        if shown:
            self.has_text = True
            self.send(Event("text", shown))

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
    """Pass each token of a batch on to its row."""

    def __init__(self, rows: list[Row]):
        self.rows, self.skips_prompt = rows, True

    def put(self, value: torch.LongTensor) -> None:
        """Take the prompts (B, S) first, then the next tokens (B,)."""
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


def open_image(data: bytes, max_pixels: int) -> PIL.Image.Image:
    """Read an image after a look at its size, or raise a `ValueError`: a small file may hold billions of pixels."""
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"The image has too many pixels: this server takes at most {max_pixels}.") from error
    except Exception as error:  # decoders raise anything for broken headers
        known = ", ".join(IMAGE_FORMATS)
        raise ValueError(f"The image cannot be read: it is broken, or its format is none of {known}.") from error
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"The image has {image.width}x{image.height} pixels, but this server takes at most {max_pixels}: send a "
            "smaller one."
        )
    return read_image(image)


def encode_image(image: PIL.Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


class Engine:
    """A replica: a pipeline, and the batches that it answers."""

    def __init__(self, settings: Settings):
        self.settings, self.pipe = settings, load_pipeline(settings.pipeline)
        self.pipe._require_model()
        self.pipe.set_progress_bar_config(disable=True)
        self.context = self.pipe.model._context
        self.worker = ThreadPoolExecutor(1)
        # While a batch runs, requests wait for this: the queue of `serve.batch` would form many small batches of them.
        self.is_free = asyncio.Event()
        self.is_free.set()
        self.answer_batch.set_max_batch_size(settings.max_batch_size)

    async def answer(self, requests: list[Request]) -> AsyncIterator[list[Event]]:
        """Yield the events of answers, several at a time where they come fast. The first error is the last event."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def send(choice: int, event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, replace(event, choice=choice))

        try:
            rows = [
                await asyncio.to_thread(self.prepare, request, partial(send, choice))
                for choice, request in enumerate(requests)
            ]
        except ValueError as error:
            yield [Event("error", (400, str(error)))]
            return
        tasks = [asyncio.create_task(self.submit(row)) for row in rows]
        try:
            pending, num_left = [], len(rows)
            while num_left > 0:
                event = await events.get()
                if event.kind == "image":
                    image_format = requests[event.choice].image_format
                    event.value = await asyncio.to_thread(encode_image, event.value, image_format)
                pending.append(event)
                num_left = 0 if event.kind == "error" else num_left - (event.kind == "done")
                if num_left == 0 or (events.empty() and requests[0].streams):
                    yield pending
                    pending = []
        finally:  # also reached when the client leaves
            for row, task in zip(rows, tasks):
                row.is_abandoned = True
                task.cancel()

    def prepare(self, request: Request, send: Callable[[Event], None]) -> Row:
        """Read a request's images and check what it asks for, or raise the `ValueError` of the pipeline."""
        limit = self.settings.max_image_pixels
        if request.messages is None:
            images = [open_image(image, limit) for image in request.images]
            conversation = self.pipe.prepare_conversations([request.prompt], [images])[0]
        else:
            conversation = self.pipe.prepare_conversations(messages=request.messages)[0]
            for part in (part for message in conversation for part in message["content"]):
                if part["type"] == "image":
                    part["image"] = open_image(part["image"], limit)
        options = self.pipe._start_call(1, request.decoding)._options
        if options.height * options.width > max(self.settings.max_output_pixels, np.prod(self.pipe.default_size)):
            raise ValueError(
                f"The images would have {options.width}x{options.height} pixels, but this server generates at most "
                f"{self.settings.max_output_pixels}: choose a smaller `size`."
            )
        request.decoding = {
            name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")
        }
        inputs = self.pipe.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return Row(request, conversation, inputs["input_ids"].shape[1], self.pipe, send)

    async def submit(self, row: Row) -> None:
        await self.is_free.wait()
        await self.answer_batch(row)

    @serve.batch(batch_wait_timeout_s=BATCH_WAIT_SECONDS)
    async def answer_batch(self, rows: list[Row]) -> list[None]:
        self.is_free.clear()
        try:
            await asyncio.get_running_loop().run_in_executor(self.worker, self.run_batch, rows)
        finally:
            self.is_free.set()
        return [None] * len(rows)

    def run_batch(self, rows: list[Row]) -> None:
        """Answer all rows of a batch. A failure is an event of the rows that it concerns."""

        def options_of_text(row: Row) -> tuple:
            # Padding to a longer prompt must not take the room of a shorter one's answer.
            is_tight = row.length + row.request.max_new_tokens > self.context
            return row.request.max_new_tokens, row.request.max_images, row.length if is_tight else 0

        decodings = []
        for rows_alike in group(rows, options_of_text):
            decodings += self.answer_group(rows_alike)
        for alike in group(decodings, lambda pair: tuple(pair[0].request.decoding.items())):
            try:
                self.decode(alike)
            except Exception as error:  # whatever fails, the replica lives on
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
        device = self.pipe._execution_device

        def abandoned(input_ids, scores, **kwargs) -> torch.BoolTensor:
            return torch.tensor([row.is_abandoned for row in rows], device=input_ids.device)

        options = {"streamer": BatchStreamer(rows), "stopping_criteria": [abandoned], "do_sample": False}
        if any(row.temperature > 0 for row in rows):
            generators = [torch.Generator(device).manual_seed(row.request.seed) for row in rows]
            sampling = [(row.temperature, row.top_p, own) for row, own in zip(rows, generators)]
            options["logits_processor"] = [RowSampler(sampling)]
        request = rows[0].request
        options["max_images"] = request.max_images
        conversations = [row.conversation for row in rows]
        _, tokens = self.pipe.generate_visual_tokens(conversations, request.max_new_tokens, options)
        decodings = []
        for row, images in zip(rows, tokens):
            if not len(images):
                row.finish()
            elif not images.isfinite().all():
                row.fail(500, "The model generated visual tokens that are not numbers: its weights are broken.")
            else:
                decodings.append((row, images))
        return decodings

    def decode(self, decodings: list[tuple[Row, torch.Tensor]]) -> None:
        """Decode the images of rows with the same decoding options, at most a batch at a time, and finish the rows."""
        jobs = []  # a row, the index of the image in its answer, visual tokens, and a generator
        for row, images in decodings:
            generator = torch.Generator(self.pipe._execution_device).manual_seed(row.request.seed)
            repeated = images.repeat_interleave(row.request.num_images_per_prompt, dim=0)
            jobs += [(row, index, tokens, generator) for index, tokens in enumerate(repeated)]
        size = self.settings.max_batch_size
        for chunk in (jobs[start : start + size] for start in range(0, len(jobs), size)):
            chunk = [job for job in chunk if not job[0].is_abandoned]
            if not chunk:
                continue
            options = chunk[0][0].request.decoding

            def report(call, step: int, timestep, tensors, chunk=chunk, options=options) -> dict:
                call._interrupt = all(row.is_abandoned for row, *_ in chunk)
                for row, index, *_ in chunk:
                    row.report_progress(index, 0.5 + 0.5 * (step + 1) / options["num_inference_steps"])
                return {}

            arrays = self.pipe.decode_visual_tokens(
                torch.stack([tokens for _, _, tokens, _ in chunk]),
                generator=[generator for *_, generator in chunk],
                output_type="np",
                callback_on_step_end=report,
                **options,
            )
            for (row, index, *_), pixels in zip(chunk, arrays):
                if np.isfinite(pixels).all():
                    row.send(Event("image", self.pipe.image_processor.numpy_to_pil(pixels)[0], index))
                elif not row.is_abandoned:
                    row.fail(500, "The U-Net gave pixels that are not numbers: its weights are broken.")
        for row, _ in decodings:
            if not row.is_abandoned:
                row.finish()
