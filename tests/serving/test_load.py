"""Many requests at once, hostile ones among them, and a process that is killed. Run with -s to see the numbers."""

import base64
import io
import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import httpx
import numpy as np
import pytest
from helpers import EMOJI_CHECKPOINT
from PIL import Image


pytest.importorskip("ray", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")

pytestmark = [pytest.mark.optional, pytest.mark.slow]
APPLE = base64.b64encode((EMOJI_CHECKPOINT.parent / "red_apple.png").read_bytes()).decode()
CAPTIONS = ["a red apple", "a cat", "a bicycle", "fire", "a dog", "a tiger"]
NUM_REQUESTS, NUM_AT_ONCE = 300, 32
STEPS = {"num_inference_steps": 6}  # of most images, so that the test takes less time


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=300)


def build_jobs() -> list[dict]:
    """Images, questions, edits and chats, whole and as streams, with three sets of options."""
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{APPLE}"}}]
    jobs = []
    for seed, caption in enumerate(CAPTIONS):
        show = [{"role": "user", "content": f"Show me {caption}."}]
        ask = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]
        jobs.append({"kind": "image", "prompt": caption, "seed": seed, **STEPS})
        jobs.append({"kind": "image", "prompt": caption, "seed": seed, "num_inference_steps": 3})
        jobs.append({"kind": "chat", "messages": show, "seed": seed, "stream": seed % 2 == 0, **STEPS})
        jobs.append({"kind": "chat", "messages": ask, "seed": seed, "stream": seed % 2 == 1, "guidance_scale": 1.5})
        jobs.append({"kind": "edit", "prompt": "make it blue", "seed": seed, **STEPS})
    return jobs


def ask(client, job: dict) -> tuple[str, list[str]]:
    """Return the text of an answer, and its images as base64 texts."""
    job = dict(job)
    kind = job.pop("kind")
    if kind == "chat":
        names = ("messages", "seed", "stream")
        given = {name: job.pop(name) for name in names}
        answer = client.chat.completions.create(model="emoji", extra_body=job, **given)
        messages = [chunk.choices[0].delta for chunk in answer] if given["stream"] else [answer.choices[0].message]
        text = "".join(message.content or "" for message in messages).strip()
        images = [image for message in messages for image in getattr(message, "images", [])]
        return text, [image["image_url"]["url"].partition(",")[2] for image in images]
    prompt = job.pop("prompt")
    if kind == "image":
        answer = client.images.generate(model="emoji", prompt=prompt, extra_body=job)
    else:
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{APPLE}"}}]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
        return ask(client, {"kind": "chat", "messages": messages, "stream": False, **job})
    return answer.data[0].revised_prompt, [item.b64_json for item in answer.data]


def is_same(answer: tuple[str, list[str]], other: tuple[str, list[str]]) -> bool:
    def pixels(data: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), int)

    if answer[0] != other[0] or len(answer[1]) != len(other[1]):
        return False
    return all(np.abs(pixels(one) - pixels(two)).max() <= 1 for one, two in zip(answer[1], other[1]))


def attack(server, number: int) -> bool:
    """Send something hostile, and return whether it was refused by name. Clients that leave get nothing."""
    url, headers = f"{server.url}/v1/chat/completions", {"Authorization": f"Bearer {server.key}"}
    body = {"model": "emoji", "messages": [{"role": "user", "content": "Show me a tiger."}], "stream": True}
    if number % 5 == 0:
        bomb = io.BytesIO()
        Image.new("1", (16000, 16000)).save(bomb, "png")
        url_of_bomb = f"data:image/png;base64,{base64.b64encode(bomb.getvalue()).decode()}"
        body["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": url_of_bomb}}]
        response = httpx.post(url, json=body, headers=headers, timeout=300)
        return response.status_code == 400 and "pixels that this server takes" in response.text
    if number % 5 == 1:
        headers["Content-Type"] = "application/json"
        response = httpx.post(url, content=b'{"model": ', headers=headers, timeout=300)
        return response.status_code == 400 and "not valid JSON" in response.text
    if number % 5 == 2:
        try:
            response = httpx.post(url, content=b"x" * 8 * 10**6, headers=headers, timeout=300)
        except httpx.WriteError:  # the server has answered and closed before all was sent
            return True
        return response.status_code == 413 and "larger than" in response.text
    if number % 5 == 3:
        response = httpx.post(url, json=body | {"logit_bias": {}}, headers=headers, timeout=300)
        return response.status_code == 400 and "`logit_bias` is not supported" in response.text
    with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as stream:
        next(stream.iter_lines())
    return True


def measure_memory(server) -> float:
    """Return the resident memory of the server's own processes in MB."""
    processes = server.find_processes("ServeReplica", "ProxyActor")
    assert len(processes) == 4
    return sum(process.memory_info().rss for process in processes) / 1e6


def test_load(server, client, capsys):
    jobs = build_jobs()
    expected = [ask(client, job) for job in jobs]  # one at a time, which also loads what is loaded late
    start, few = time.monotonic(), jobs[: len(jobs) // 3]
    for job, answer in zip(few, expected):
        assert is_same(ask(client, job), answer)
    alone = len(few) / (time.monotonic() - start)

    is_hostile = [number % 20 == 7 for number in range(NUM_REQUESTS)]
    order = list(islice(cycle(range(len(jobs))), NUM_REQUESTS))
    random.Random(0).shuffle(order)

    def send(number: int) -> bool:
        if is_hostile[number]:
            return attack(server, number // 20)
        return is_same(ask(client, jobs[order[number]]), expected[order[number]])

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        list(pool.map(send, range(NUM_REQUESTS // 2)))  # full batches of all shapes allocate more than single requests
        before, start = measure_memory(server), time.monotonic()
        results = list(pool.map(send, range(NUM_REQUESTS)))
    together = (NUM_REQUESTS - sum(is_hostile)) / (time.monotonic() - start)
    after = measure_memory(server)
    with capsys.disabled():
        print(f"\n{alone:.2f} requests per second one at a time, {together:.2f} of {NUM_AT_ONCE} at a time, ", end="")
        print(f"ratio {together / alone:.1f}; memory {before:.0f} MB before, {after:.0f} MB after")
    assert all(results), [number for number, result in enumerate(results) if not result]
    assert after < 1.1 * before
    # Other work on the machine slows down `together` most, so that the bound is loose. The goal is 3.
    assert together > 1.5 * alone
    assert "Traceback" not in server.log.read_text()


def test_process_that_is_killed(server, client, capsys):
    """Every request ends, with its answer or with 503, new ones are answered, and the process is replaced."""
    job = {"model": "emoji", "messages": [{"role": "user", "content": "Show me a tiger."}], "num_inference_steps": 40}

    def send(number: int) -> int:
        body, headers = job | {"stream": number % 2 == 0}, {"Authorization": f"Bearer {server.key}"}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=240)
        return 503 if '"code": 503' in response.text else response.status_code

    process, _ = server.find_processes("ServeReplica:metamorph:Engine")
    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(send, number) for number in range(12)]
        time.sleep(1.5)
        process.kill()
        start = time.monotonic()
        statuses = [future.result() for future in running]
    while (status := send(1)) != 200:
        assert status == 503 and time.monotonic() - start < 240
    answered = time.monotonic() - start
    while httpx.get(f"{server.url}/health").json()["replicas"] < 2:
        assert time.monotonic() - start < 240
        time.sleep(0.5)
    replaced = time.monotonic() - start
    with capsys.disabled():
        print(
            f"\nkilled: statuses {sorted(statuses)}; answered after {answered:.0f} and replaced after {replaced:.0f} ",
            end="",
        )
        print(f"seconds (the start of the whole server took {server.start_seconds:.0f})")
    assert set(statuses) <= {200, 503}
    assert replaced < max(30, 3 * server.start_seconds)  # a busy machine imports torch slowly
