"""The page in a real headless Chromium, on the emoji checkpoint. Needs the extra `app`, playwright and Chromium.

`METAMORPH_SCREENSHOTS=docs/images` makes the image that the documentation shows.
"""

import io
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EMOJI_CHECKPOINT
from PIL import Image


gradio = pytest.importorskip("gradio", reason="the extra `app` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from metamorph_hf.serving import app, sources  # noqa: E402
from metamorph_hf.serving.app import build_page, launch, read_card  # noqa: E402
from metamorph_hf.serving.sources import Options, PipelineSource, Progress, ServerSource  # noqa: E402


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
APPLE, HAND = EMOJI_CHECKPOINT.parent / "red_apple.png", EMOJI_CHECKPOINT / "waving_hand.png"
TIMEOUT = 120_000  # milliseconds; the machine may be busy

pytestmark = [pytest.mark.optional, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def source(pipe) -> PipelineSource:
    return PipelineSource(pipe, "emoji")


@pytest.fixture(scope="module")
def serve():
    """Return a function that serves the page of a source and returns its address."""
    pages = []

    def start(source, *args) -> str:
        page = build_page(source, *args)
        pages.append(page)
        return launch(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)[1]

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def address(serve, source) -> str:
    return serve(source, *read_card(str(EMOJI_CHECKPOINT)))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class User:
    """A person at the page, with a browser profile of their own."""

    def __init__(self, browser, address: str, width: int = 1100, height: int = 900):
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        self.context.set_default_timeout(TIMEOUT)
        self.page, self.requests, self.errors = self.context.new_page(), [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_function("window.hasLoaded")
        self.box = self.page.locator("#message textarea")
        self.bot = self.page.locator("#chat [data-testid=bot]")
        self.images = self.page.locator("#chat [data-testid=bot] img")
        self.box.wait_for()

    def say(self, text: str, *files: Path) -> None:
        """Send a message as soon as the box takes one, and wait until the conversation shows it."""
        playwright.expect(self.box).to_be_enabled(timeout=TIMEOUT)
        messages = self.page.locator("#chat [data-testid=user]")
        count = messages.count()
        if files:
            self.page.locator("#message input[type=file]").set_input_files([str(file) for file in files])
            self.page.locator("#message .thumbnail-item").nth(len(files) - 1).wait_for()
        self.box.fill(text)
        self.box.press("Enter")
        messages.nth(count).wait_for()

    def set(self, **settings: str) -> None:
        """Fill in settings until they stay: for a moment, gradio empties fields that have just appeared."""
        if not self.page.get_by_role("textbox", name="Seed").is_visible():
            self.page.get_by_role("button", name="Settings").click()
        boxes = {self.page.get_by_role("textbox", name=label.replace("_", " ")): settings[label] for label in settings}
        for _ in range(10):
            for box, value in boxes.items():
                box.fill(value)
                self.page.keyboard.press("Tab")
            self.page.wait_for_timeout(1000)
            if all(box.input_value() == value for box, value in boxes.items()):
                return
        raise AssertionError(f"The settings {settings} do not stay.")

    def press(self, name: str) -> None:
        self.page.locator(f"#chat button[aria-label='{name}']").last.click()

    def wait_for_text(self, text: str) -> None:
        playwright.expect(self.bot.last).to_contain_text(text, timeout=TIMEOUT)

    def wait_for_images(self, count: int) -> None:
        playwright.expect(self.images).to_have_count(count, timeout=TIMEOUT)

    def fetch(self, image) -> Image.Image:
        """Return the pixels of an image element as the browser gets them."""
        return Image.open(io.BytesIO(self.context.request.get(image.get_attribute("src")).body())).convert("RGB")


@pytest.fixture
def visit(browser, address):
    """Return a function that opens the page as a new person. At the end it checks what the browser has seen."""
    users = []

    def open_page(address: str = address, **size) -> User:
        users.append(User(browser, address, **size))
        return users[-1]

    yield open_page
    for user in users:
        user.context.close()
        assert user.errors == []
        foreign = [url for url in user.requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
        assert foreign == [], "the page must ask no other server"


class ScriptedSource:
    """A source whose answer goes on when a test says so. It remembers what it was asked."""

    name, can_reconstruct = "script", False

    def __init__(self):
        self.asked, self.go_on = [], threading.Semaphore(0)

    def chat(self, messages, options):
        self.asked.append(messages)
        yield "Here it "
        self.go_on.acquire()
        yield "comes."
        yield Progress("An image is coming", 0.25)
        self.go_on.acquire()
        yield Image.new("RGB", (8, 8), "red")


def ask(pipe, text: str, *images: Image.Image, seed: int = 0):
    """Ask the pipeline directly."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    generator = torch.Generator().manual_seed(seed)
    return pipe(messages=[{"role": "user", "content": content}], generator=generator)


def assert_same(image: Image.Image, other: Image.Image) -> None:
    """Float sums depend on the size of the batch, which may change a rounded pixel by one."""
    assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


class TestChat:
    def test_text_streams_and_an_image_is_announced(self, serve, visit):
        source = ScriptedSource()
        user = visit(serve(source))
        user.say("Draw.", APPLE, HAND)
        user.wait_for_text("Here it")
        assert "comes" not in user.bot.last.inner_text()
        source.go_on.release()
        bar = user.page.locator("#chat progress")
        playwright.expect(bar).to_have_attribute("value", "0.25", timeout=TIMEOUT)
        assert "An image is coming" in user.bot.last.inner_text() and user.images.count() == 0
        button = user.page.locator("#again")
        playwright.expect(button).to_be_hidden()  # what it adds would be lost when the answer ends
        source.go_on.release()
        user.wait_for_images(1)
        playwright.expect(button).to_be_visible(timeout=TIMEOUT)
        playwright.expect(bar).to_have_count(0)
        assert user.fetch(user.images.first).getpixel((4, 4)) == (255, 0, 0)
        (sent,) = source.asked[0]
        assert [part["type"] for part in sent["content"]] == ["image", "image", "text"]
        assert sent["content"][1]["image"].tobytes() == Image.open(HAND).convert("RGB").tobytes()
        assert not user.page.get_by_role("tab", name="Reconstruct").is_visible()

    @pytest.mark.parametrize("single_turn", [False, True])
    def test_earlier_messages(self, serve, visit, single_turn):
        source = ScriptedSource()
        source.go_on.release(4)
        user = visit(serve(source, None, single_turn))
        for number in (1, 2):
            user.say(f"Question {number}")
            user.wait_for_images(number)
        playwright.expect(user.box).to_be_enabled(timeout=TIMEOUT)
        roles = [message["role"] for message in source.asked[1]]
        assert roles == (["user"] if single_turn else ["user", "assistant", "user"])
        if not single_turn:
            answer = source.asked[1][1]["content"]
            assert answer[0] == {"type": "text", "text": "Here it comes."} and answer[1]["image"].size == (8, 8)

    def test_image_from_a_text_is_the_pipelines(self, visit, pipe):
        user = visit()
        user.set(Seed="7", Steps="4")
        user.say("could you sketch a tiger for me?")
        user.wait_for_images(1)
        content = [{"type": "text", "text": "could you sketch a tiger for me?"}]
        generator = torch.Generator().manual_seed(7)
        messages = [{"role": "user", "content": content}]
        expected = pipe(messages=messages, generator=generator, num_inference_steps=4).images[0]
        assert_same(user.fetch(user.images.first), expected)
        labels = [bubble.get_attribute("aria-label") for bubble in user.bot.all()]
        assert labels == ["bot's message: tiger", "bot's message: a component of type image"]
        with user.page.expect_download() as download:
            user.press("Download")
        assert download.value.suggested_filename == "seed-7.png"
        assert_same(Image.open(download.value.path()), expected)
        user.press("Fullscreen")
        user.page.wait_for_function("document.querySelector(':fullscreen img').clientWidth > innerWidth / 2")

    def test_upload_edit_and_ask_again(self, visit, pipe):
        user = visit()
        user.say("What is this?", APPLE)
        user.wait_for_text("red apple")
        user.say("make the skin tone dark", HAND)
        user.wait_for_images(1)
        user.page.get_by_role("button", name="Add the last image to the message").click()
        user.page.locator("#message .thumbnail-item").wait_for()
        edited = user.fetch(user.images.first)
        user.say("What is this?")
        user.wait_for_text(ask(pipe, "What is this?", edited).text[0])

    def test_example(self, visit):
        user = visit()
        user.page.get_by_role("button", name="What is this?").click()
        user.wait_for_text("waving hand")

    def test_regenerate_undo_reload_and_clear(self, visit):
        user = visit()
        user.set(Steps="2")
        user.say("a red apple")
        user.wait_for_images(1)
        first = user.images.first.get_attribute("src")
        playwright.expect(user.box).to_be_enabled(timeout=TIMEOUT)
        user.press("Retry")  # with another random seed
        playwright.expect(user.images.first).not_to_have_attribute("src", first, timeout=TIMEOUT)
        user.wait_for_images(1)
        user.say("What is this?", APPLE)
        user.wait_for_text("red apple")
        playwright.expect(user.box).to_be_enabled(timeout=TIMEOUT)
        user.press("Undo")
        playwright.expect(user.box).to_have_value("What is this?", timeout=TIMEOUT)
        assert user.page.locator("#message .thumbnail-item").count() == 1
        source = user.images.first.get_attribute("src")
        user.page.reload()
        user.wait_for_images(1)
        assert user.images.first.get_attribute("src") == source
        user.say("What is this?", APPLE)  # the conversation goes on
        user.wait_for_text("red apple")
        playwright.expect(user.box).to_be_enabled(timeout=TIMEOUT)
        assert user.images.count() == 1
        user.press("Clear")
        playwright.expect(user.bot).to_have_count(0, timeout=TIMEOUT)
        user.page.reload()
        user.page.get_by_role("button", name="a red apple").wait_for()
        assert user.bot.count() == 0

    def test_stop_frees_the_model(self, visit, source):
        user = visit()
        user.set(Steps="1000", Seed="1")
        user.say("a red apple")
        user.page.get_by_text("Decoding an image").wait_for()  # the words before it are there
        user.page.locator("#message button.stop-button").click()
        user.wait_for_text("You stopped this answer.")
        source.worker.submit(int).result(timeout=20)  # 1000 steps take longer
        user.set(Steps="2")
        user.say("a red apple")
        user.wait_for_images(1)

    def test_leaving_frees_the_model(self, visit, source):
        user = visit()
        user.set(Steps="1000")
        user.say("a red apple")
        user.page.get_by_text("Decoding an image").wait_for()  # the words before it are there
        user.page.goto("about:blank")
        source.worker.submit(int).result(timeout=20)

    def test_two_people_do_not_mix(self, visit):
        anna, ben = visit(), visit()
        for user in (anna, ben):
            user.set(Steps="3")
        anna.say("What is this?", APPLE)
        ben.say("a tiger")
        ben.wait_for_images(1)
        anna.wait_for_text("red apple")
        ben.say("What is this?", HAND)
        anna.say("a rocket")
        ben.wait_for_text("waving hand")
        anna.wait_for_images(1)
        assert anna.bot.count() == ben.bot.count() == 3  # two texts, and an image
        assert "hand" not in anna.page.locator("#chat").inner_text()
        assert "apple" not in ben.page.locator("#chat").inner_text()
        anna.page.reload()
        anna.wait_for_images(1)
        assert "tiger" not in anna.page.locator("#chat").inner_text()


class TestErrors:
    def test_errors_are_sentences_and_the_page_goes_on(self, visit, tmp_path):
        user = visit()
        broken = tmp_path / "broken.png"
        broken.write_bytes(APPLE.read_bytes()[:200])
        user.say("What is this?", broken)
        user.wait_for_text("The image cannot be read (broken.png)")
        user.set(Steps="many")
        user.say("a red apple")
        user.wait_for_text("The setting 'Steps' must be a whole number, but is 'many'.")
        user.set(Steps="0")
        user.say("a red apple")
        user.wait_for_text("num_inference_steps is 0, but must be an integer of at least 1.")
        user.set(Steps="2")
        user.say("very " * 2000)
        user.wait_for_text("512")  # the length of the context
        user.say("a red apple")
        user.wait_for_images(1)
        assert "/tmp" not in user.page.locator("#chat").inner_text()

    def test_unexpected_error_names_only_its_type(self, serve, visit, caplog):
        class BrokenSource(ScriptedSource):
            def chat(self, messages, options):
                yield "So far "
                raise RuntimeError("/secret/path")

        user = visit(serve(BrokenSource()))
        user.say("Hello")
        user.wait_for_text("The model failed with RuntimeError.")
        assert "So far" in user.bot.first.inner_text()
        assert "secret" not in user.page.locator("body").inner_text() and "/secret/path" in caplog.text


class TestTabs:
    def test_compare(self, visit, pipe):
        user = visit()
        user.set(Seed="3", Steps="3")
        user.page.get_by_role("tab", name="Compare").click()
        user.page.get_by_label("Captions").fill("a red apple\n\na tiger")
        user.page.get_by_label("Guidance scales").fill("1, 4")
        user.page.get_by_role("button", name="Generate").click()
        images = user.page.locator(".gallery-item img, .grid-wrap img")
        playwright.expect(images).to_have_count(4, timeout=TIMEOUT)
        for index, (caption, scale) in enumerate([("a red apple", 1.0), ("a red apple", 4.0), ("a tiger", 1.0)]):
            generator = torch.Generator().manual_seed(3)
            expected = pipe(caption, generator=generator, num_inference_steps=3, guidance_scale=scale).images[0]
            assert_same(user.fetch(images.nth(index)), expected)
        user.page.get_by_label("Guidance scales").fill("one")
        user.page.get_by_role("button", name="Generate").click()
        user.page.get_by_text("Guidance scales must be numbers with commas between them, but are 'one'.").wait_for()

    def test_reconstruct(self, visit, pipe):
        user = visit()
        user.set(Seed="3", Steps="3")
        user.page.get_by_role("tab", name="Reconstruct").click()
        user.page.get_by_role("button", name="Reconstruct").click()
        user.page.get_by_text("There is no image yet").wait_for()
        user.page.locator("input[type=file]:visible, .enlarged input[type=file]").first.set_input_files(str(APPLE))
        given, seen = user.page.locator(".enlarged").first, user.page.locator(".enlarged").last
        given.locator("img").wait_for()
        user.page.get_by_role("button", name="Reconstruct").click()
        seen.locator("img").wait_for()
        generator = torch.Generator().manual_seed(3)
        expected = pipe.reconstruct(Image.open(APPLE), generator=generator, num_inference_steps=3)[0]
        assert_same(user.fetch(seen.locator("img")), expected)


class TestAccess:
    def test_without_a_mouse(self, visit):
        user = visit()
        keyboard = user.page.keyboard
        playwright.expect(user.box).to_be_focused()
        keyboard.type("a red apple")
        keyboard.press("Enter")
        user.wait_for_images(1)
        playwright.expect(user.box).to_be_enabled(timeout=TIMEOUT)
        user.page.evaluate("document.activeElement.blur()")
        reached = set()
        for key in ["Tab"] * 15 + ["Shift+Tab"] * 30:
            keyboard.press(key)
            text = "element => element.getAttribute('aria-label') || element.innerText"
            reached.add(user.page.evaluate_handle("document.activeElement").evaluate(text).strip())
        wanted = {
            "Settings",
            "Chat",
            "Compare",
            "Clear",
            "Download",
            "Retry",
            "Undo",
            "Add the last image to the message",
        }
        assert wanted <= {name.strip(" \n◀▼") for name in reached}
        user.page.get_by_role("tab", name="Compare").focus()
        keyboard.press("Enter")
        user.page.get_by_label("Captions").wait_for()

    def test_on_a_phone(self, visit):
        user = visit(width=390, height=800)
        user.say("a red apple")
        user.wait_for_images(1)
        for tab in ("Chat", "Compare", "Reconstruct"):
            user.page.get_by_role("tab", name=tab).click()
            assert user.page.evaluate("document.documentElement.scrollWidth") <= 390
        user.page.get_by_role("tab", name="Chat").click()
        image, box = user.images.first.bounding_box(), user.box.bounding_box()
        assert 150 < image["width"] < 300 and box["y"] + box["height"] < 800


def test_page_of_a_server(server, serve, visit, pipe):
    """The page of a server gives the same image as that of its pipeline."""
    source = ServerSource(f"{server.url}/v1/", server.key)
    user = visit(serve(source))
    user.set(Seed="7", Steps="4")
    user.say("a red apple")
    user.wait_for_images(1)
    (expected,) = (
        event
        for event in PipelineSource(pipe, "").chat(
            [{"role": "user", "content": [{"type": "text", "text": "a red apple"}]}], Options(7, 4)
        )
        if isinstance(event, Image.Image)
    )
    assert_same(user.fetch(user.images.first), expected)


def test_files_that_run_other_programs(tmp_path, monkeypatch):
    """PIL would start Ghostscript for an EPS file, whatever its name."""
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "cat.png").write_text(script)
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match="its format is none of PNG"):
        app.to_parts("What is this?", [str(tmp_path / "cat.png")])
    Image.new("1", (13000, 13000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="more than the .* pixels"):
        app.to_parts("What is this?", [str(tmp_path / "large.png")])


def test_server_names_a_file_of_this_machine(tmp_path):
    Image.new("RGB", (5, 7)).save(tmp_path / "private.png")
    for url in (str(tmp_path / "private.png"), f"file://{tmp_path}/private.png"):
        with pytest.raises(ValueError, match="neither a data URI nor an address"):
            sources._read_url(url)


def test_seed_of_sampled_text(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model.generation_config, "do_sample", True)
    monkeypatch.setattr(pipe.model.generation_config, "temperature", 3.0)
    source, before = PipelineSource(pipe, "emoji"), torch.get_rng_state()
    message = [{"role": "user", "content": [{"type": "text", "text": "What is a cat?"}]}]

    def ask(seed: int) -> str:
        events = source.chat(message, Options(seed, max_tokens=20, max_images=0))
        return "".join(event for event in events if isinstance(event, str))

    assert ask(1) == ask(1) != ask(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_server_that_does_not_answer():
    with pytest.raises(ValueError, match="The server http://127.0.0.1:9 does not answer as expected: .*refused"):
        ServerSource("http://127.0.0.1:9/v1")


def test_card(tmp_path):
    """Its images must be in its folder: a page that others reach would hand out any file."""
    assert read_card(str(tmp_path)) == ([], False)
    (tmp_path / "model").mkdir()
    shutil.copy(APPLE, tmp_path / "model" / "apple.png")
    shutil.copy(APPLE, tmp_path / "secret.png")
    widget = "- text: one\n  src: apple.png\n- text: two\n  src: ../secret.png\n- text: three"
    (tmp_path / "model" / "README.md").write_text(f"---\ntags: [single-turn]\nwidget:\n{widget}\n---\n# Model\n")
    examples, single_turn = read_card(str(tmp_path / "model"))
    assert single_turn and [example["text"] for example in examples] == ["one", "two", "three"]
    assert [example["files"] for example in examples] == [[str(tmp_path / "model" / "apple.png")], [], []]
    widget = "- messages: [{role: user, content: hello}]\n- src: apple.png\n- text: one\n  src: null\n- two"
    (tmp_path / "model" / "README.md").write_text(f"---\nwidget:\n{widget}\n---\n# Other forms of the Hub\n")
    assert read_card(str(tmp_path / "model")) == ([{"text": "one", "files": []}], False)


@pytest.mark.skipif("METAMORPH_SCREENSHOTS" not in os.environ, reason="METAMORPH_SCREENSHOTS names no folder")
@pytest.mark.parametrize("width, height, name", [(900, 1660, "chat_page.png"), (390, 800, "chat_page_phone.png")])
def test_screenshot(visit, width, height, name):
    """Make the images of the documentation."""
    user = visit(width=width, height=height)
    user.set(Seed="1", Steps="10")
    user.page.get_by_role("button", name="Settings").click()
    user.say("could you sketch a tiger for me?")
    user.wait_for_images(1)
    user.say("make the skin tone dark", HAND)
    user.wait_for_images(2)
    playwright.expect(user.box).to_be_enabled(timeout=TIMEOUT)
    last = user.page.get_by_role("button", name="Add the last image to the message").bounding_box()
    clip = {"x": 0, "y": 0, "width": width, "height": last["y"] + last["height"] + 20}
    user.page.screenshot(path=Path(os.environ["METAMORPH_SCREENSHOTS"]) / name, clip=clip)
