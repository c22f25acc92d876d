"""A page to chat with a pipeline in the browser: text and images in, text and images out."""

import argparse
import logging
import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import torch
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from huggingface_hub import ModelCard

from ..cli import load_pipeline
from ..image_reading import read_image
from .remote_images import check_images
from .sources import Options, PipelineSource, Progress, ServerSource


logger = logging.getLogger(__name__)

MAX_GRID_IMAGES = 64
FAILED = "This did not work"
SETTINGS = {
    "seed": ("Seed", int),
    "num_inference_steps": ("Steps", int),
    "guidance_scale": ("Guidance scale", float),
    "max_tokens": ("Tokens at most", int),
    "max_images": ("Images at most", int),
}
CSS = """
#chat .image-container {width: 12rem; height: 12rem}
#chat img {width: 100%; height: 100%; object-fit: contain}
#chat :fullscreen :is(.image-container, .image-frame, img) {width: 100vw; height: 100vh; max-height: none}
.enlarged img {width: 100%; height: min(18rem, 70vw); object-fit: contain}
#chat [aria-label="Share"] {display: none} /* it uploads to a website */
#chat progress {width: min(16rem, 60vw); accent-color: var(--color-accent)}
.gradio-container:has(#message textarea:disabled) #again {visibility: hidden} /* an answer's end empties the box */
"""


def describe_error(error: Exception) -> str:
    """Return a sentence for the page. Unexpected errors go to the log, and only their type to the page."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "An image of this conversation is no longer stored. Clear the conversation, and start a new one."
    logger.exception("An answer failed.", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        return "The model ran out of memory. Try fewer or smaller images, or a shorter conversation."
    return f"The model failed with {type(error).__name__}. See the log of `metamorph-hf app` for details."


def to_parts(text: str, files: list[str]) -> list[dict]:
    """Return the content of a message: its images, read from files, and its text."""
    named = [{"path": Path(file).name, "bytes": Path(file).read_bytes()} for file in files]
    check_images([image["bytes"] for image in named])
    parts = [{"type": "image", "image": read_image(image)} for image in named]
    return [*parts, {"type": "text", "text": text}] if text else parts


def to_messages(history: list[dict]) -> list[dict]:
    """Convert gradio's history to messages in the standard chat format, without turns that have no answer."""
    messages = []
    for turn in history:
        if (turn.get("metadata") or {}).get("title"):  # a notice of this page instead of an answer
            if messages and messages[-1]["role"] == "user":
                messages.pop()
            continue
        content = []
        for part in turn["content"]:
            content += to_parts(part.get("text", ""), [part["file"]["path"]] if "file" in part else [])
        messages.append({"role": turn["role"], "content": content})
    return messages


def end_unfinished(history: list[dict]) -> list[dict]:
    """Replace the progress that a stopped answer leaves in gradio's history."""
    stopped = {"content": [{"type": "text", "text": "You stopped this answer."}], "metadata": {"title": "Stopped"}}
    return [
        {**turn, **stopped} if (turn.get("metadata") or {}).get("status") == "pending" else turn for turn in history
    ]


def read_options(*texts: str) -> Options:
    """Read the settings, in the order of `SETTINGS`. An empty one is the pipeline's default, or a random seed."""
    values = {}
    for (name, (label, kind)), text in zip(SETTINGS.items(), texts, strict=True):
        try:
            values[name] = kind(text) if text.strip() else None
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"The setting {label!r} must be {number}, but is {text!r}.") from None
    if values["seed"] is None:
        values["seed"] = random.randrange(2**32)
    if not 0 <= values["seed"] < 2**32:
        raise ValueError(f"The setting 'Seed' must be between 0 and {2**32 - 1}, but is {values['seed']}.")
    return Options(**values)


def read_scales(text: str) -> list[float]:
    try:
        return [float(scale) for scale in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"Guidance scales must be numbers with commas between them, but are {text!r}.") from None


def save_image(image: PIL.Image.Image, seed: int) -> str:
    # Not left to gradio, which would write the file again while a browser reads it.
    return save_pil_to_cache(image, get_upload_folder(), name=f"seed-{seed}", format="png")


class Handlers:
    """The functions behind the page's buttons. They keep nothing of a conversation, so sessions cannot mix."""

    def __init__(self, source: PipelineSource | ServerSource):
        self.source = source

    def answer(self, message: dict, history: list[dict], remember: bool, *settings) -> Iterator[list]:
        """Yield the answer so far as messages: the model's own, and perhaps a notice of this page."""
        content, notices = [], []
        try:
            options = read_options(*settings)
            files = [file["path"] if isinstance(file, dict) else file for file in message["files"]]
            parts = to_parts(message["text"], files)
            if not parts:
                raise ValueError("The message is empty: write something, or add an image.")
            messages = [*(to_messages(history) if remember else []), {"role": "user", "content": parts}]
            for event in self.source.chat(messages, options):
                notices = []
                if isinstance(event, Progress):
                    bar = f'<progress value="{event.share:.2f}" max="1">{event.share:.0%}</progress>'
                    notices = [gr.ChatMessage(bar, metadata={"title": event.title, "status": "pending"})]
                elif isinstance(event, PIL.Image.Image):
                    content.append({"path": save_image(event, options.seed)})
                elif content and isinstance(content[-1], str):
                    content[-1] += event
                else:
                    content.append(event)
                yield [*([gr.ChatMessage(list(content))] if content else []), *notices]
            notices = (
                [] if content else [gr.ChatMessage("The model said nothing.", metadata={"title": "Empty answer"})]
            )
        except Exception as error:
            notices = [gr.ChatMessage(describe_error(error), metadata={"title": FAILED})]
        yield [*([gr.ChatMessage(list(content))] if content else []), *notices]

    def compare(self, prompts: str, scales: str, *settings, progress=gr.Progress()) -> Iterator[gr.Gallery]:  # noqa: B008
        """Yield the grid of images so far: a row for each caption, a column for each guidance scale."""
        try:
            captions = [line.strip() for line in prompts.splitlines() if line.strip()]
            numbers = read_scales(scales)
            total, images = len(captions) * len(numbers), []
            if not 1 <= total <= MAX_GRID_IMAGES:
                raise ValueError(
                    f"{len(captions)} prompts with {len(numbers)} guidance scales are {total} images, but the page "
                    f"makes between 1 and {MAX_GRID_IMAGES}."
                )
            options = read_options(*settings)
            for caption in captions:
                for event in self.source.compare(caption, numbers, options):
                    if isinstance(event, Progress):
                        progress((len(images) + event.share, total), desc=event.title, unit="images")
                    else:
                        label = f"{caption} (guidance {numbers[len(images) % len(numbers)]:g})"
                        images.append((save_image(event, options.seed), label))
                        yield gr.Gallery(images, columns=len(numbers))
        except Exception as error:
            raise gr.Error(describe_error(error), duration=None, title=FAILED) from error

    def reconstruct(self, file: str | None, *settings, progress=gr.Progress()) -> PIL.Image.Image:  # noqa: B008
        """Return the image that is decoded from the visual tokens of a file."""
        try:
            if file is None:
                raise ValueError("There is no image yet: add one first.")
            for event in self.source.reconstruct(to_parts("", [file])[0]["image"], read_options(*settings)):
                if not isinstance(event, Progress):
                    return event
                progress(event.share, desc=event.title)
        except Exception as error:
            raise gr.Error(describe_error(error), duration=None, title=FAILED) from error

    @staticmethod
    def use_last_image(history: list[dict], message: dict) -> dict:
        """Return the message that is being written with the last image of the conversation."""
        files = [part["file"]["path"] for turn in history for part in turn["content"] if "file" in part]
        if not files:
            raise gr.Error("There is no image in this conversation yet.", title=FAILED)
        return {"text": message["text"], "files": [*message["files"], files[-1]]}


def build_page(
    source: PipelineSource | ServerSource, examples: list[dict] | None = None, single_turn: bool = False
) -> gr.Blocks:
    """
    Build the page. It keeps no state of its own: a conversation lives in the session of its browser tab.

    Args:
        source ([`PipelineSource`] or [`ServerSource`]): Who answers.
        examples (`list[dict]`, *optional*): Messages to try, each with its `text` and a list of `files`.
        single_turn (`bool`, defaults to `False`): Send each message alone, unless the settings say otherwise.
    """
    handlers = Handlers(source)
    with gr.Blocks(title=f"MetaMorph: {source.name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# {source.name}")
        with gr.Accordion("Settings", open=False), gr.Row():
            settings = [
                gr.Textbox("", label=label, placeholder="random" if name == "seed" else "default", min_width=130)
                for name, (label, _) in SETTINGS.items()
            ]
            remember = gr.Checkbox(not single_turn, label="Send the earlier messages along", min_width=130)
        with gr.Tab("Chat"):
            chat = gr.ChatInterface(
                handlers.answer,
                multimodal=True,
                chatbot=gr.Chatbot(
                    elem_id="chat",
                    label="Conversation",
                    height="60vh",
                    placeholder="Ask for an image, or about one.",
                    buttons=["copy", "copy_all"],
                ),
                textbox=gr.MultimodalTextbox(
                    elem_id="message",
                    label="Message",
                    placeholder="Write a message, or add images",
                    file_types=["image"],
                    file_count="multiple",
                    stop_btn=True,
                    autofocus=True,
                ),
                additional_inputs=[remember, *settings],
                examples=[[example] for example in examples or []] or None,
                analytics_enabled=False,
                concurrency_limit=16,
                api_visibility="private",
            )
            chat.textbox.stop(end_unfinished, chat.chatbot, chat.chatbot_value, api_visibility="private")
            # A reloaded tab goes on with its conversation, unless the page's program was started anew. gr.BrowserState
            # would also be an output of the chatbot's first, empty change; here that change writes nothing.
            key = f"metamorph-{secrets.token_hex(8)}"
            keep = f"history => {{if (window.hasLoaded) sessionStorage['{key}'] = JSON.stringify(history)}}"
            restore = f"() => {{window.hasLoaded = true; return [JSON.parse(sessionStorage['{key}'] ?? '[]')]}}"
            chat.chatbot.change(None, chat.chatbot, None, js=keep)
            page.load(None, None, chat.chatbot, js=restore).then(
                end_unfinished, chat.chatbot, chat.chatbot_value, api_visibility="private"
            )
            again = gr.Button("Add the last image to the message", elem_id="again", size="sm")
            again.click(handlers.use_last_image, [chat.chatbot, chat.textbox], chat.textbox, api_visibility="private")
        add_compare_tab(handlers, settings)
        add_reconstruct_tab(handlers, settings)
    return page.queue(max_size=64)


def add_compare_tab(handlers: Handlers, settings: list[gr.Textbox]) -> None:
    with gr.Tab("Compare"):
        prompts = gr.Textbox("a red apple\na tiger", label="Captions, one in each line", lines=3)
        scales = gr.Textbox("1, 2, 4", label="Guidance scales")
        start = gr.Button("Generate", variant="primary")
        grid = gr.Gallery(label="Images", object_fit="contain", height="auto", buttons=["download", "fullscreen"])
        start.click(
            handlers.compare, [prompts, scales, *settings], grid, concurrency_limit=16, api_visibility="private"
        )


def add_reconstruct_tab(handlers: Handlers, settings: list[gr.Textbox]) -> None:
    with gr.Tab("Reconstruct", visible=handlers.source.can_reconstruct):
        gr.Markdown("What the model sees: an image becomes visual tokens, and the visualizer decodes them again.")
        with gr.Row():
            given = gr.Image(
                type="filepath",
                elem_classes="enlarged",
                label="Image",
                sources=["upload", "clipboard"],
                buttons=[],
            )
            seen = gr.Image(
                label="What the model sees",
                format="png",
                elem_classes="enlarged",
                buttons=["download", "fullscreen"],
            )
        start = gr.Button("Reconstruct", variant="primary")
        start.click(handlers.reconstruct, [given, *settings], seen, concurrency_limit=16, api_visibility="private")


def read_card(path_or_repo: str) -> tuple[list[dict], bool]:
    """
    Read a model's card, if there is one.

    Returns:
        The messages to try that it lists as `widget` (`text`, and `src` for an image in its folder), and whether
        it has the tag `single-turn`: the model was not trained on conversations.
    """
    folder = Path(path_or_repo)
    try:
        card = ModelCard.load(folder / "README.md" if folder.is_dir() else path_or_repo).data
    except (OSError, ValueError):
        return [], False
    examples = []
    for entry in card.get("widget") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            continue  # the Hub knows other forms, such as `messages`
        file = folder / str(entry.get("src") or "")
        is_inside = file.is_file() and file.resolve().is_relative_to(folder.resolve())
        examples.append({"text": entry["text"], "files": [str(file)] if is_inside else []})
    return examples, "single-turn" in (card.tags or [])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `metamorph-hf app`."""
    parser.add_argument("pipeline", nargs="?", help="pipeline folder or Hub id")
    text = "address of a running server, instead of a pipeline; its key is in the variable METAMORPH_API_KEY"
    parser.add_argument("--url", help=text)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this computer only)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    text = "message to try, beside those of the model's card; may be repeated"
    parser.add_argument("--example", action="append", default=[], help=text)
    text = "send each message alone, for models that were not trained on conversations"
    parser.add_argument("--single-turn", action="store_true", help=text)


def run(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    if (args.pipeline is None) == (args.url is None):
        raise ValueError("Name either a pipeline or the --url of a running server.")
    examples, single_turn = [], False
    if args.url:
        source = ServerSource(args.url, os.environ.get("METAMORPH_API_KEY"))
    else:
        source = PipelineSource(load_pipeline(args.pipeline), Path(args.pipeline).name)
        examples, single_turn = read_card(args.pipeline)
    examples += [{"text": text, "files": []} for text in args.example]
    launch(build_page(source, examples, single_turn or args.single_turn), args.host, args.port)


def launch(page: gr.Blocks, host: str, port: int | None, **kwargs) -> tuple[Any, str, str]:
    """Serve a page without telemetry, a public link, or anything from other servers."""
    return page.launch(
        server_name=host,
        server_port=port,
        css=CSS,
        share=False,
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size="20mb",
        **kwargs,
    )
