"""Batches of requests, and the limits of the interface, in this process. Needs the extra `serve`."""

import asyncio
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from helpers import EMOJI_CHECKPOINT
from PIL import Image

from metamorph_hf.serving.server import Settings


pytest.importorskip("ray", reason="the extra `serve` is not installed")
engine = pytest.importorskip("metamorph_hf.serving.engine")
api = pytest.importorskip("metamorph_hf.serving.openai_api")
from ray.exceptions import ActorDiedError  # noqa: E402


pytestmark = pytest.mark.optional
APPLE = (EMOJI_CHECKPOINT.parent / "red_apple.png").read_bytes()
Request, Event = engine.Request, engine.Event


@pytest.fixture
def answer(pipe):
    """Answer requests in one batch, and return the events of each."""
    answerer = engine.BatchAnswerer(pipe, Settings("emoji", max_batch_size=4))

    def run(*requests, before=lambda rows: None) -> list[list]:
        events = [[] for _ in requests]
        rows = [
            answerer.prepare([request], lambda _, e, i=i: events[i].append(e))[0] for i, request in enumerate(requests)
        ]
        before(rows)
        answerer.run_batch(rows)
        return events

    return run


def draw(caption: str, **options) -> Request:
    decoding = {"num_inference_steps": 2} | options.pop("decoding", {})
    return Request(prompt=caption, decoding=decoding, **options)


def kinds(events: list) -> list[str]:
    return [event.kind for event in events]


@pytest.mark.slow
def test_mixed_options_in_one_batch(pipe, answer):
    """Every row gets what it gets alone: text, several images, other steps, sizes and lengths."""
    requests = [
        draw("a red apple", seed=1),
        draw("a cat", seed=2, num_images_per_prompt=3),
        draw("fire", seed=3, decoding={"height": 32, "width": 64}),
        draw("What is this?", images=[APPLE]),
        draw("a dog", seed=4, max_new_tokens=500),  # would not fit after a longer prompt
        draw("a bicycle", seed=5, max_images=0),
    ]
    together = answer(*requests)
    for request, events in zip(requests, together):
        (alone,) = answer(request)
        assert kinds(events) == kinds(alone) and events[-1].value == alone[-1].value
        for one, other in zip(events, alone):
            if one.kind == "image":
                assert np.abs(np.asarray(one.value, int) - np.asarray(other.value, int)).max() <= 1
            else:
                assert one == other
    assert [kinds(events).count("image") for events in together] == [1, 3, 1, 0, 1, 0]
    assert [event.value.size for event in together[2] if event.kind == "image"] == [(64, 32)]


def test_noise_does_not_depend_on_the_batch(pipe, monkeypatch):
    """A scheduler that adds noise at each step gives the same images, however many are decoded at once."""
    monkeypatch.setattr(pipe, "scheduler", EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config))
    request, found = draw("a cat", seed=2, num_images_per_prompt=3), []
    for size in (1, 2, 4):
        answerer, events = engine.BatchAnswerer(pipe, Settings("emoji", max_batch_size=size)), []
        answerer.run_batch(answerer.prepare([request], lambda _, event: events.append(event)))  # noqa: B023
        found.append([np.asarray(event.value, int) for event in events if event.kind == "image"])
    assert all(np.abs(one - other).max() <= 1 for images in found[1:] for one, other in zip(found[0], images))
    first, second, third = found[0]
    assert np.abs(first - second).max() > 50 < np.abs(second - third).max()
    generator, options = torch.Generator().manual_seed(2), {"num_inference_steps": 2}
    alone = np.asarray(pipe("a cat", generator=generator, **options).images[0], int)
    assert np.abs(first - alone).max() <= 1


def test_progress_of_several_decodings(pipe):
    """Its index is that of the image in the answer, of which each decoding is one."""
    answerer, events = engine.BatchAnswerer(pipe, Settings("emoji")), []
    request = Request(prompt="two cats", num_images_per_prompt=2, reports_progress=True)
    (row,) = answerer.prepare([request], lambda _, event: events.append(event))
    for token in [pipe.processor.image_token_id] * (2 * row.num_image_tokens):
        row.put_token(torch.tensor([token]))
    assert [event.index for event in events] == [0] * row.num_image_tokens + [2] * row.num_image_tokens


@pytest.mark.parametrize("max_new_tokens, max_images", [(8, 1), (80, 1)])
def test_sampling_where_an_image_is_forbidden(pipe, answer, monkeypatch, max_new_tokens, max_images):
    """Where `top_p` would leave nothing but the image, the text is sampled from the rest, and has no padding."""
    ids, put_token = [], engine.Row.put_token
    monkeypatch.setattr(engine.Row, "put_token", lambda row, token: ids.append(token.item()) or put_token(row, token))
    options = {"max_new_tokens": max_new_tokens, "max_images": max_images, "temperature": 1.0, "top_p": 0.9}
    (events,) = answer(draw("a red apple", seed=1, **options))
    assert events[-1].kind == "done" and len(ids) > 2 and pipe.processor.tokenizer.pad_token_id not in ids


def test_sampler_is_the_softmax():
    """Frequencies of the sampled ids are the probabilities; a row of temperature 0 is greedy."""
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]))
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    sampler = engine.RowSampler([(1.0, 1.0, generators[0]), (1.0, 0.6, generators[1]), (0.0, 1.0, generators[2])])
    ids = torch.stack([sampler(None, scores).argmax(-1) for _ in range(4000)])
    frequencies = torch.stack([(ids == index).float().mean(0) for index in range(3)])
    assert torch.allclose(frequencies[:, 0], torch.tensor([0.5, 0.3, 0.2]), atol=0.03)
    assert torch.allclose(frequencies[:, 1], torch.tensor([0.625, 0.375, 0.0]), atol=0.03)  # 0.2 is cut off
    assert frequencies[2, 2] == 1


def test_sampled_row_is_the_same_in_a_batch(answer):
    hot = draw("What is this?", images=[APPLE], temperature=2.0, seed=11)
    together = answer(draw("What is this?", images=[APPLE], temperature=1.0, seed=3), hot)
    assert together[1] == answer(hot)[0]


def test_prompt_that_only_generate_refuses(pipe, answer, monkeypatch):
    """`generate` refuses a whole batch for one of its prompts: the others are answered."""
    long, good = draw("tiger " * 600), draw("a cat")
    with pytest.raises(ValueError, match="context holds 512"):
        answer(long)
    monkeypatch.setattr(engine.BatchAnswerer, "check_prompt", lambda *_: None)
    events = answer(long, good, draw("tiger " * 600, seed=1))
    assert [own[-1].kind for own in events] == ["error", "done", "error"]
    assert events[0][0].value[0] == 400 and "context holds 512" in events[0][0].value[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory at /secret"), RuntimeError("secret")])
@pytest.mark.parametrize("stage", ["generate_visual_tokens", "decode_visual_tokens"])
def test_failed_batch(pipe, answer, monkeypatch, caplog, error, stage):
    """The error says neither path nor cause, and the next batch is answered."""

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pipe, stage, fail)
        for events in answer(draw("a cat"), draw("a dog")):
            status, sentence = events[-1].value
            assert kinds(events)[-1] == "error" and status == 500 and "secret" not in sentence
            assert ("memory" in sentence) == isinstance(error, torch.OutOfMemoryError)
    assert "secret" not in caplog.text
    assert kinds(answer(draw("a cat"))[0])[-1] == "done"


def test_not_a_number(pipe, answer, monkeypatch):
    """Visual tokens of one row and pixels of another are NaN: the third is answered."""
    generate, decode = pipe.generate_visual_tokens, pipe.decode_visual_tokens

    def break_first(*args, **kwargs):
        texts, tokens = generate(*args, **kwargs)
        return texts, [tokens[0] * float("nan"), *tokens[1:]]

    def break_second(*args, **kwargs):
        pixels = decode(*args, **kwargs)
        pixels[0] = float("nan")
        return pixels

    monkeypatch.setattr(pipe, "generate_visual_tokens", break_first)
    monkeypatch.setattr(pipe, "decode_visual_tokens", break_second)
    first, second, third = answer(draw("a cat"), draw("a dog"), draw("fire"))
    assert first[-1].value[0] == second[-1].value[0] == 500
    assert "not numbers" in first[-1].value[1] and kinds(third)[-2:] == ["image", "done"]


def test_client_that_leaves_ends_its_row(pipe, answer, monkeypatch):
    calls = []
    decode = pipe.decode_visual_tokens
    monkeypatch.setattr(
        pipe, "decode_visual_tokens", lambda tokens, **kw: calls.append(len(tokens)) or decode(tokens, **kw)
    )

    def leave(rows):
        rows[0].is_abandoned = True
        rows[1].report_progress = lambda *_: setattr(rows[1], "is_abandoned", True)  # within an image

    events = answer(draw("a cat"), draw("a dog"), draw("fire"), before=leave)
    assert calls == [1] and kinds(events[2])[-1] == "done" and "image" not in kinds(events[0] + events[1])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"prompt": "tiger " * 600}, "context holds"),
        ({"images": [b"GIF89a"]}, "cannot be read"),
        ({"images": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]}, "none of PNG"),
        ({"decoding": {"height": 7}}, "multiple of"),
        ({"decoding": {"height": 2048, "width": 2048}}, "allows at most 1048576 pixels"),
        ({"decoding": {"guidance_scale": float("inf")}}, "finite number"),
    ],
)
def test_refused_before_the_batch(answer, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        answer(Request(**{"prompt": "a cat"} | changes))


def test_image_with_many_pixels():
    """Refused by its header, in no time and without its memory."""
    buffer = io.BytesIO()
    Image.new("1", (12000, 12000)).save(buffer, "png")
    start = time.monotonic()
    with pytest.raises(ValueError, match="more than the .* pixels"):
        engine.open_images([buffer.getvalue()], 2**24)
    assert time.monotonic() - start < 0.2


def test_pixels_of_all_images_count_together():
    size = Image.open(io.BytesIO(APPLE)).size
    assert len(engine.open_images([APPLE] * 3, 3 * size[0] * size[1])) == 3
    with pytest.raises(ValueError, match="more than the .* pixels"):
        engine.open_images([APPLE] * 3, 3 * size[0] * size[1] - 1)


def test_answers_of_a_request_share_its_images(pipe):
    content = [{"type": "image", "image": APPLE}, {"type": "text", "text": "What is this?"}]
    requests = [Request(messages=[{"role": "user", "content": content}], seed=seed) for seed in range(3)]
    rows = engine.BatchAnswerer(pipe, Settings("emoji")).prepare(requests, lambda *_: None)
    assert [row.request.seed for row in rows] == [0, 1, 2]
    assert len({id(row.conversation[0]["content"][0]["image"]) for row in rows}) == 1


@pytest.mark.parametrize(
    "num_image_tokens, max_tokens, length", [(64, 1024, 256), (256, 1024, 516), (729, 1024, 1024)]
)
def test_length_has_room_for_an_image(pipe, monkeypatch, num_image_tokens, max_tokens, length):
    monkeypatch.setattr(pipe.processor, "num_image_tokens", num_image_tokens)
    answerer = engine.BatchAnswerer(pipe, Settings("emoji", max_tokens=max_tokens))
    (row,) = answerer.prepare([draw("a cat")], lambda *_: None)
    assert row.request.max_new_tokens == length


def test_new_requests_do_not_disturb_a_batch(pipe, answer, caplog):
    """The tokenizer is one object in two threads, and whether it pads is one of its states."""
    answerer, is_over = engine.BatchAnswerer(pipe, Settings("emoji")), threading.Event()

    def prepare():
        while not is_over.is_set():
            answerer.prepare([draw("a red apple")], lambda *_: None)

    calls, whole = [], answerer.generate
    answerer.generate = lambda rows: calls.append(len(rows)) or whole(rows)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(prepare) for _ in range(2)]
        try:
            for _ in range(20):
                requests = [draw("a cat", max_new_tokens=1), draw("a very long caption of a dog", max_new_tokens=1)]
                answerer.run_batch([answerer.prepare([request], lambda *_: None)[0] for request in requests])
        finally:
            is_over.set()
        [future.result() for future in running]
    assert calls == [2] * 20


def test_process_that_is_out_of_order_says_so(monkeypatch):
    """Every row ends, and Ray Serve, which asks for the health, replaces the process."""
    process = object.__new__(engine.Engine)  # without a pipeline
    process.worker, process.is_broken, process.is_free = ThreadPoolExecutor(1), False, asyncio.Event()
    monkeypatch.setattr(engine.Engine, "run_batch", lambda *_: 1 / 0)
    events = []
    rows = [SimpleNamespace(fail=lambda status, sentence: events.append((status, sentence))) for _ in range(2)]
    process.check_health()
    asyncio.run(engine.Engine.answer_batch.__wrapped__(process, rows))
    assert [status for status, _ in events] == [500, 500] and "ZeroDivisionError" in events[0][1]
    with pytest.raises(RuntimeError, match="nothing to rely on"):
        process.check_health()


class Replica:
    """Stands for Ray's handle: each call gets the next list of events, waits where it says so, and raises errors."""

    def __init__(self, *answers):
        self.answers, self.num_cancelled, self.answer = list(answers), 0, self

    def options(self, **kwargs):
        return self

    def remote(self, requests):
        return Response(self, iter(self.answers.pop(0)))


class Response:
    def __init__(self, replica, events):
        self.replica, self.events = replica, events

    def cancel(self):
        self.replica.num_cancelled += 1

    async def __anext__(self):
        event = next(self.events)
        if isinstance(event, float):
            await asyncio.sleep(event)
            event = next(self.events)
        if isinstance(event, BaseException):
            raise event
        return [event]


TEXT, DONE = Event("text", "hello"), Event("done", ("stop", {"prompt_tokens": 1, "completion_tokens": 1}, ""))


def post(replica: Replica, num_requests: int = 1, stream: bool = False, **settings) -> list[httpx.Response]:
    app = api.Server(replica, Settings("emoji", **settings)).__serve_build_asgi_app__()
    body = {"model": "emoji", "messages": [{"role": "user", "content": "Hello!"}], "stream": stream}

    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(num_requests)))

    return asyncio.run(send())


def test_queue():
    responses = post(Replica(*([0.2, TEXT, DONE],) * 2), num_requests=5, max_queue=2)
    assert sorted(response.status_code for response in responses) == [200, 200, 429, 429, 429]
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.headers["retry-after"] == "5" and "2 requests are waiting" in refused.json()["error"]["message"]


def test_routes_without_a_key_take_no_place():
    """Nobody without the key can fill the queue, not even by bodies that arrive slowly."""
    app = api.Server(Replica([TEXT, DONE]), Settings("emoji", api_key="key", max_queue=1)).__serve_build_asgi_app__()
    body = {"model": "emoji", "messages": [{"role": "user", "content": "Hello!"}]}

    async def arrive_slowly():
        yield b"{"
        await asyncio.sleep(0.5)
        yield b"}"

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            slow = [client.post(url, content=arrive_slowly()) for url in ("/v1/files/x", "/health")]
            good = client.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer key"})
            return await asyncio.gather(*slow, good)

    assert [response.status_code for response in asyncio.run(send())] == [405, 405, 200]


def test_body_that_arrives_slowly():
    """The time is that of the whole body, not of each of its parts."""
    app = api.Server(Replica(), Settings("emoji", timeout=0.3)).__serve_build_asgi_app__()

    async def arrive_slowly():
        for _ in range(20):
            yield b" "
            await asyncio.sleep(0.1)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/v1/chat/completions", content=arrive_slowly())

    start, response = time.monotonic(), asyncio.run(send())
    assert response.status_code == 408 and time.monotonic() - start < 1.5


def test_error_that_nobody_expects(monkeypatch):
    monkeypatch.setattr(api.Server, "read_messages", lambda *_: 1 / 0)
    (response,) = post(Replica())
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The server failed to answer this request."


def test_time():
    replica = Replica([5.0, TEXT])
    (response,) = post(replica, timeout=0.1)
    assert response.status_code == 504 and "longer than 0.1 seconds" in response.text and replica.num_cancelled == 1


def test_time_within_a_stream():
    (response,) = post(Replica([TEXT, 5.0, DONE]), stream=True, timeout=0.1)
    assert response.status_code == 200 and "hello" in response.text
    assert '"code": 504' in response.text.strip().splitlines()[-1]


def test_replica_that_dies():
    """Before the first event another one answers; after it, or again and again, the answer is 503."""
    died = ActorDiedError()
    (response,) = post(Replica([died], [TEXT, DONE]))
    assert response.json()["choices"][0]["message"]["content"] == "hello"
    for answers in ([[TEXT, died]], [[died]] * 3):
        (response,) = post(Replica(*answers))
        assert response.status_code == 503 and response.headers["retry-after"] == "5"


def test_unexpected_failure_says_nothing(caplog):
    (response,) = post(Replica([RuntimeError("secret in /etc")]))
    assert response.status_code == 500 and "secret" not in response.text


def test_file_store_forgets_the_oldest():
    store = api.FileStore(max_bytes=25)
    keys = [store.put(b"x" * 10, "image/png") for _ in range(3)]
    assert len(store.files) == 2 and store.num_bytes == 20 and store.get(keys[2])
    with pytest.raises(api.ApiError, match="no such file"):
        store.get(keys[0])
