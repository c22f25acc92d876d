"""The server, asked by the real `openai` client. Needs the extra `serve` and `openai`."""

import argparse
import base64
import io
import json
import os
import re
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
import yaml
from helpers import EMOJI_CHECKPOINT
from PIL import Image
from test_docs import read_blocks


pytest.importorskip("ray", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")

pytestmark = pytest.mark.optional
APPLE = EMOJI_CHECKPOINT.parent / "red_apple.png"
TIGER = [{"role": "user", "content": "Show me a tiger."}]
# Float sums depend on the size of the batch, which may change a rounded pixel by one.
ROUNDING = 1


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask_about(url: str, text: str = "What is this?") -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def decode(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def difference(image: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max())


def chat(client, messages=TIGER, **options):
    extra = {name: options.pop(name) for name in list(options) if name in EXTENSIONS}
    return client.chat.completions.create(model="emoji", messages=messages, extra_body=extra, **options)


EXTENSIONS = (
    "num_inference_steps",
    "guidance_scale",
    "size",
    "num_images_per_prompt",
    "image_format",
    "image_response_format",
)


class TestChat:
    def test_text(self, client, pipe):
        answer = chat(client, ask_about(data_uri(APPLE.read_bytes())))
        assert answer.choices[0].message.content == pipe("What is this?", image=APPLE).text[0]
        assert answer.choices[0].finish_reason == "stop" and not hasattr(answer.choices[0].message, "images")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    def test_image(self, client, pipe):
        message = chat(client, seed=5).choices[0].message
        assert [part["type"] for part in message.images] == ["image_url"]
        expected = pipe(messages=TIGER, generator=torch.Generator().manual_seed(5))
        assert message.content == expected.text[0].replace("<image>", "").strip()  # what the model says before it
        assert difference(decode(message.images[0]["image_url"]["url"]), expected.images[0]) <= ROUNDING

    def test_modalities(self, client):
        content = chat(client, modalities=["image"]).choices[0].message.content
        assert [part["type"] for part in content] == ["image_url"]
        assert not hasattr(chat(client, modalities=["text"]).choices[0].message, "images")

    def test_several_choices_and_decodings(self, client):
        answer = chat(client, n=2, num_images_per_prompt=2, seed=3, num_inference_steps=2)
        urls = [image["image_url"]["url"] for choice in answer.choices for image in choice.message.images]
        assert [choice.index for choice in answer.choices] == [0, 1] and len(set(urls)) == 4

    @pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
    def test_image_format(self, client, image_format):
        url = chat(client, image_format=image_format, size="32x48").choices[0].message.images[0]["image_url"]["url"]
        image = decode(url)
        assert url.startswith(f"data:image/{image_format}") and image.format.lower() == image_format
        assert image.size == (32, 48)

    def test_answer_as_next_input(self, client):
        """The message that the server gave is part of the next request, as clients send it."""
        first = chat(client).choices[0].message
        messages = [*TIGER, first, {"role": "user", "content": "What is this?"}]
        assert chat(client, messages).choices[0].message.content

    def test_length(self, client):
        answer = chat(client, ask_about(data_uri(APPLE.read_bytes())), max_tokens=1)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 1

    def test_sampling_follows_the_seed(self, client):
        def sample(seed):
            answer = chat(client, ask_about(data_uri(APPLE.read_bytes())), temperature=2, seed=seed)
            return answer.choices[0].message.content

        with ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(sample, [1, 2, 3, 4, 5, 6]))
        assert texts[2] == sample(3) and len(set(texts)) > 1

    def test_files(self, client, server):
        url = chat(client, image_response_format="url").choices[0].message.images[0]["image_url"]["url"]
        assert url.startswith(f"{server.url}/v1/files/")
        response = httpx.get(url)  # without a key
        assert response.headers["content-type"] == "image/png" and Image.open(io.BytesIO(response.content))
        assert chat(client, ask_about(url)).choices[0].message.content
        assert httpx.get(f"{url}x").status_code == 404


class TestStream:
    def test_text(self, client):
        messages = ask_about(data_uri(APPLE.read_bytes()))
        chunks = list(chat(client, messages, stream=True))
        deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
        assert len(deltas) > 1 and "".join(deltas).strip() == chat(client, messages).choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 1

    def test_image_and_progress(self, client):
        options = {"include_usage": True, "include_progress": True}
        chunks = list(chat(client, seed=5, stream=True, stream_options=options))
        *chunks, usage = chunks
        assert usage.choices == [] and usage.usage.total_tokens > 0
        deltas = [chunk.choices[0].delta for chunk in chunks]
        progress = [delta.image_progress["progress"] for delta in deltas if hasattr(delta, "image_progress")]
        assert progress == sorted(progress) and progress[-1] == 1 and len(progress) > 10
        images = [delta.images[0]["image_url"]["url"] for delta in deltas if hasattr(delta, "images")]
        assert images == [chat(client, seed=5).choices[0].message.images[0]["image_url"]["url"]]

    def test_lines_are_short(self, client, server):
        """An image that is too large for a line comes as a file."""
        chunks = list(chat(client, size="512x512", num_inference_steps=1, stream=True))
        urls = [
            c.choices[0].delta.images[0]["image_url"]["url"] for c in chunks if hasattr(c.choices[0].delta, "images")
        ]
        assert urls[0].startswith(f"{server.url}/v1/files/")
        assert Image.open(io.BytesIO(httpx.get(urls[0]).content)).size == (512, 512)

    def test_error_has_a_status(self, client):
        with pytest.raises(openai.BadRequestError, match="context holds"):
            chat(client, [{"role": "user", "content": "tiger " * 600}], stream=True)


class TestImages:
    def test_generations(self, client, pipe):
        options = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 1.5}
        answer = client.images.generate(model="emoji", prompt="a red apple", n=2, extra_body=options)
        assert [item.revised_prompt for item in answer.data] == ["Generate an image of a red apple."] * 2
        generator = [torch.Generator().manual_seed(options.pop("seed"))]
        expected = pipe(["a red apple"], num_images_per_prompt=2, generator=generator, **options).images
        for item, image in zip(answer.data, expected, strict=True):
            assert difference(Image.open(io.BytesIO(base64.b64decode(item.b64_json))), image) <= ROUNDING

    def test_edits(self, client, pipe):
        prompt, hand = "make the skin tone dark", pipe("waving hand").images[0]
        buffer = io.BytesIO()
        hand.save(buffer, "png")
        for files in (("hand.png", buffer.getvalue()), [("hand.png", buffer.getvalue())]):  # image, image[]
            answer = client.images.edit(model="emoji", image=files, prompt=prompt, extra_body={"seed": 2})
            expected = pipe(prompt, image=hand, generator=torch.Generator().manual_seed(2)).images[0]
            assert difference(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))), expected) <= ROUNDING

    def test_url(self, client):
        answer = client.images.generate(model="emoji", prompt="a cat", response_format="url", size="128x128")
        assert httpx.get(answer.data[0].url).headers["content-type"] == "image/png"

    def test_answer_without_an_image(self, client):
        with pytest.raises(openai.UnprocessableEntityError, match="answered without an image: 'red apple'"):
            client.images.edit(model="emoji", image=APPLE.open("rb"), prompt="What is this?")


@pytest.mark.slow
def test_same_image_alone_and_in_a_full_batch(client, pipe):
    """Captions of many lengths, text and images, with many options: they share batches, and change nothing."""
    captions = ["a red apple", "a cat", "a bicycle", "a man with a very long beard and blond hair", "fire", "a dog"]
    jobs = [(caption, seed, 2 + seed % 3) for seed in range(5) for caption in captions]

    def draw(job) -> Image.Image:
        caption, seed, steps = job
        options = {"seed": seed, "num_inference_steps": steps}
        answer = client.images.generate(model="emoji", prompt=caption, extra_body=options)
        return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))

    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(draw, jobs))
    for job, image in list(zip(jobs, together))[::4]:
        caption, seed, steps = job
        generator = torch.Generator().manual_seed(seed)
        expected = pipe(caption, num_inference_steps=steps, generator=generator).images[0]
        assert difference(image, expected) <= ROUNDING and difference(draw(job), expected) <= ROUNDING


BOMB = io.BytesIO()
Image.new("1", (8192, 8192)).save(BOMB, "png")
HUGE_BOMB = io.BytesIO()
Image.new("1", (20000, 20000)).save(HUGE_BOMB, "png")
REFUSED = {
    "unknown field": ({"frequency_penalty": 1}, "`frequency_penalty` is not supported"),
    "unknown fields in a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "path": "/etc/passwd"}]}]},
        "path` is not supported",
    ),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, "`messages.0.role` is not accepted"),
    "no messages": ({"messages": []}, "`messages` is not accepted"),
    "no content": ({"messages": [{"role": "user"}]}, "`messages.0.content` is missing"),
    "n": ({"n": 9}, "`n` is 9, but this server allows at most 8"),
    "product": ({"n": 3, "num_images_per_prompt": 3}, "`n` times `num_images_per_prompt` is 9, but this"),
    "tokens": ({"max_tokens": 5000}, "`max_tokens` is 5000"),
    "steps": ({"num_inference_steps": 5000}, "`num_inference_steps` is 5000"),
    "size": ({"size": "9999x9999"}, "at most 1048576 pixels|multiple of"),
    "odd size": ({"size": "33x32"}, "multiple of"),
    "two limits": ({"max_tokens": 5, "max_completion_tokens": 5}, "either"),
    "too long": ({"messages": [{"role": "user", "content": "tiger " * 600}]}, "context holds 512"),
    "placeholder": ({"messages": [{"role": "user", "content": "<image>"}]}, "images|placeholder"),
    "broken image": ({"messages": ask_about(data_uri(b"hello"))}, "image cannot be read"),
    "truncated image": ({"messages": ask_about(data_uri(APPLE.read_bytes()[:300]))}, "image cannot be read"),
    "broken base64": ({"messages": ask_about("data:image/png;base64,?")}, "not valid base64"),
    "address": ({"messages": ask_about("http://example.com/cat.png")}, "without --allow-remote-images"),
    "path": ({"messages": ask_about("/etc/passwd")}, "must be a data URI"),
    "bomb": ({"messages": ask_about(data_uri(BOMB.getvalue()))}, "pixels that this server takes"),
    "huge bomb": ({"messages": ask_about(data_uri(HUGE_BOMB.getvalue()))}, "pixels that this server takes"),
    "many images": (
        {"messages": [{"role": "user", "content": ask_about(data_uri(APPLE.read_bytes()))[0]["content"] * 9}]},
        "number of images` is 9",
    ),
}


class TestRefused:
    @pytest.mark.parametrize("case", REFUSED)
    def test_chat(self, server, case):
        changes, sentence = REFUSED[case]
        body = {"model": "emoji", "messages": TIGER} | changes
        response = httpx.post(
            f"{server.url}/v1/chat/completions", json=body, headers=authorization(server), timeout=60
        )
        error = response.json()["error"]
        assert response.status_code == 400
        assert re.search(sentence, error["message"]), error
        assert (
            "Traceback" not in response.text and "/work" not in response.text and "site-packages" not in response.text
        )

    def test_model(self, client):
        with pytest.raises(openai.NotFoundError, match="serves 'emoji', not 'gpt'"):
            client.chat.completions.create(model="gpt", messages=TIGER)

    def test_fields_of_images(self, client):
        with pytest.raises(openai.BadRequestError, match="`quality` is not supported"):
            client.images.generate(model="emoji", prompt="a cat", quality="high")
        with pytest.raises(openai.BadRequestError, match="`mask` is a file, which is not supported"):
            client.images.edit(model="emoji", image=APPLE.open("rb"), mask=APPLE.open("rb"), prompt="x")
        with pytest.raises(openai.BadRequestError, match="`style` is not supported"):
            client.images.edit(model="emoji", image=APPLE.open("rb"), prompt="x", extra_body={"style": "vivid"})

    @pytest.mark.parametrize("key", [None, "wrong", "a-secret-ke\u00ff"])
    def test_key(self, server, key):
        headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
        for route in ("/v1/models", "/metrics", "/v1/chat/completions"):
            assert httpx.get(f"{server.url}{route}", headers=headers).status_code == 401

    @pytest.mark.parametrize("is_chunked", [False, True])
    def test_body(self, server, is_chunked):
        body = iter([b"x" * 2**20] * 6) if is_chunked else b"x" * 6 * 2**20
        try:
            response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=authorization(server))
        except httpx.WriteError:  # refused before all of it was sent
            return
        assert response.status_code == 413 and "larger than" in response.json()["error"]["message"]

    @pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b'{"model": NaN}', b"\xff", b""])
    def test_broken_json(self, server, body):
        headers = authorization(server) | {"Content-Type": "application/json"}
        response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
        assert response.status_code == 400 and response.json()["error"]["message"]

    @pytest.mark.parametrize("content, content_type", [(b"[1]", "application/json"), (b'{"n": 1}', "text/plain")])
    def test_body_that_is_no_json_object(self, server, content, content_type):
        headers = authorization(server) | {"Content-Type": content_type}
        response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
        assert response.status_code == 400 and "must be a JSON object" in response.json()["error"]["message"]

    def test_unknown_route(self, server):
        response = httpx.get(f"{server.url}/v1/nothing", headers=authorization(server))
        assert response.status_code == 404 and response.json()["error"]["message"]


def authorization(server) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.key}"}


def test_models_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == ["emoji"]
    chat(client, num_inference_steps=1)
    text = httpx.get(f"{server.url}/metrics", headers=authorization(server)).text
    assert 'metamorph_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "metamorph_requests_now 0.0" in text


def wait_until_idle(server, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while "metamorph_requests_now 0.0" not in httpx.get(f"{server.url}/metrics", headers=authorization(server)).text:
        assert time.monotonic() < deadline, "requests of clients that have left still count"
        time.sleep(0.2)


def test_client_that_leaves_frees_its_place(client, server):
    body = {"model": "emoji", "messages": TIGER, "num_inference_steps": 25, "stream": True, "n": 8}
    start = time.monotonic()
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=authorization(server)) as stream:
        next(stream.iter_lines())
    wait_until_idle(server)
    chat(client, num_inference_steps=1)
    left = time.monotonic() - start
    start = time.monotonic()
    chat(client, num_inference_steps=25, n=8)
    assert left < 0.6 * (time.monotonic() - start)


def test_nothing_secret_is_logged(server, client, checkpoint):
    chat(client, num_inference_steps=1)
    log = server.log.read_text()
    assert server.key not in log and "Traceback" not in log and str(checkpoint) not in log
    assert json.dumps(TIGER[0]["content"]) not in log


def test_documentation(server, tmp_path, monkeypatch):
    """The blocks of docs/serving.md that ask a server, with the address and the key of this one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EMOJI_CHECKPOINT.parent.parent)
    namespace, commands = {}, []
    for block in read_blocks("docs/serving.md"):
        code = block.code.replace("http://127.0.0.1:8000", server.url).replace(
            'api_key="none"', f'api_key="{server.key}"'
        )
        if block.language == "python":
            exec(code, namespace)
        elif code.startswith("curl"):
            commands.append([*shlex.split(code), "-H", f"Authorization: Bearer {server.key}"])
    assert Image.open("tiger_0.png").size == (128, 128)
    (command,) = commands
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["data"][0]["b64_json"]


def test_folder_of_another_pipeline(tmp_path, monkeypatch):
    """Refused before Ray starts."""
    from metamorph_hf.serving import server

    monkeypatch.setattr(os, "environ", dict(os.environ))
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    parser = argparse.ArgumentParser()
    server.add_arguments(parser)
    with pytest.raises(ValueError, match="pipeline of another class than MetaMorphPipeline"):
        server.run(parser.parse_args([str(tmp_path)]))


def test_configuration_for_serve_deploy():
    """Ray accepts the file of docs/serving.md, and our function takes its `args`."""
    from ray.serve.schema import ServeDeploySchema

    from metamorph_hf.serving.server import Settings, build

    (block,) = (block for block in read_blocks("docs/serving.md") if block.language == "yaml")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(block.code)).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert Settings(**application.args).replicas == 4 and build(application.args) is not None
