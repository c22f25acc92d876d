"""MetaMorph as a model of lmms-eval 0.7, which finds it by its entry point in the group `lmms_eval.models`.

    python -m lmms_eval --model metamorph --model_args pretrained=my-metamorph --tasks mmbench_en_dev --batch_size 8

With `visualizer=my-pipeline` every answer is the string `{"text": ..., "images": [paths]}`, which tasks for images
expect. lmms-eval builds `multiple_choice`, `loglikelihood` and `generate_visual_cot` tasks with `--force_simple` only.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import Collator
from loguru import logger
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import cached_file

from .. import MetaMorphForConditionalGeneration, MetaMorphPipeline, MetaMorphProcessor
from ..data.video import video_frames, video_seconds


build_user_turn = ConfigurableMessagesTask._build_user_turn  # tells images and videos apart as chat tasks do


def manifest() -> ModelManifest:
    """Return the manifest that the entry point registers."""
    return ModelManifest("metamorph", f"{__name__}.MetaMorphSimple", f"{__name__}.MetaMorphChat")


class MetaMorphChat(lmms):
    """
    MetaMorph for tasks that give messages.

    Args:
        pretrained (`str`): Folder or Hub id of a model with its processor, or of a pipeline that has both.
        visualizer (`str`, *optional*): Folder or Hub id of a [`MetaMorphPipeline`] that decodes the answers' images.
            Without it, answers are text only.
        batch_size (`int`), device (`str`, *optional*): As given to lmms-eval.
        max_images (`int`, defaults to 1): Largest number of images in an answer. They come on top of the task's
            `max_new_tokens`, which may be too small for an image.
        force_image (`bool`, defaults to `False`): Begin each answer with an image.
        wrap_captions (`bool`, defaults to `False`): Put prompts without images into the pipeline's
            `instruction_template`, for tasks such as WISE whose prompts are captions.
        max_frames (`int`, defaults to 16): Number of frames that stand for a video.
        output_dir (`str`): Folder for the images, `TASK_SPLIT_DOC.png`. Their noise depends on this name alone.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        visualizer: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_images: int = 1,
        force_image: bool = False,
        wrap_captions: bool = False,
        max_frames: int = 16,
        output_dir: str = "lmms_eval_images",
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(
                f"--batch_size is {batch_size!r}, but must be a number: it cannot be found automatically."
            )
        self.batch_size, self.max_frames = int(batch_size), max_frames
        self.max_images, self.force_image, self.wrap_captions = max_images, force_image, wrap_captions
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device if device and self._world_size == 1 else self.accelerator.device)
        is_pipeline = cached_file(pretrained, "model_index.json", _raise_exceptions_for_missing_entries=False)
        folders = ("model", "processor") if is_pipeline else ("", "")
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model = MetaMorphForConditionalGeneration.from_pretrained(pretrained, subfolder=folders[0], dtype=dtype)
        self.model = model.eval().to(self.device)
        self.processor = MetaMorphProcessor.from_pretrained(pretrained, subfolder=folders[1])
        self.pipe, self.output_dir = None, Path(output_dir).resolve()
        if visualizer is not None:
            parts = {"model": self.model, "processor": self.processor}
            self.pipe = MetaMorphPipeline.from_pretrained(visualizer, dtype=dtype, **parts).to(self.device)
            self.pipe.set_progress_bar_config(disable=True)
            self.output_dir.mkdir(parents=True, exist_ok=True)

    def clean(self) -> None:
        """Free the memory, which lmms-eval may need for a judge."""
        self.pipe = None
        super().clean()

    def get_document(self, request: Instance) -> dict:
        *_, index, task, split = request.args
        return self.task_dict[task][split][index]

    def get_generation_kwargs(self, request: Instance) -> dict:
        return request.args[1 if self.is_simple else 2]

    def get_builder(self, request: Instance) -> Callable:
        return request.args[1]

    def read_round(self, request: Instance, outputs: list[str], info: Any) -> tuple[list[dict] | None, Any]:
        """Return the messages of the next round, None after the last one, and the state that the task keeps."""
        document, build = self.get_document(request), self.get_builder(request)
        rounds = {"round_idx": len(outputs), "previous_output": list(outputs), "previous_round_info": info}
        messages, is_over, _, info = build(document, **rounds) if outputs else (build(document), False, None, None)
        return None if is_over else messages, info

    def convert_messages(self, messages: list[dict]) -> list[dict]:
        """Return messages for our processor: frames for videos, and images where `<image>` stands in the text."""
        converted, token = [], self.processor.image_token
        for message in messages:
            content, parts = message["content"], []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] != "video":
                    parts.append(part)
                    continue
                seconds = (video_seconds(part["url"]) or self.max_frames) / self.max_frames
                frames = video_frames(part["url"], seconds, limit=self.max_frames)
                parts += [{"type": "image", "image": frame} for frame in frames]
            images = [part for part in parts if part["type"] == "image"]
            pieces = re.split(f"({re.escape(token)})", "".join(part.get("text", "") for part in parts))
            if images and pieces.count(token) == len(images):
                following = iter(images)
                parts = [next(following) if p == token else {"type": "text", "text": p} for p in pieces if p.strip()]
            converted.append({"role": message["role"], "content": parts})
        return converted

    def read_options(self, generation_kwargs: dict, allows_images: bool) -> dict:
        """Return the arguments of `generate` among those of a task; the others are for other models."""
        known = vars(GenerationConfig())
        given = {name: value for name, value in generation_kwargs.items() if name in known and value is not None}
        is_random = bool(given.get("do_sample", given.get("temperature"))) and given.get("temperature") != 0
        options = {"max_new_tokens": 512, **given, "do_sample": is_random}
        if not is_random:
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        if not allows_images:
            return {**options, "max_images": 0}
        options["max_new_tokens"] += self.max_images * (self.processor.num_image_tokens + 2)
        return {**options, "max_images": self.max_images, "force_image": self.force_image}

    def run_batches(self, requests: list[Instance], answer: Callable, is_generation: bool = True) -> list:
        """Call `answer` on batches with equal generation kwargs, and return the answers in order."""
        collator = Collator(requests, lambda request: 0, self.get_generation_kwargs, grouping=is_generation)
        batches = tqdm(collator.get_batched(n=self.batch_size), desc="batches", disable=self.rank != 0)
        return collator.get_original([result for batch in batches for result in answer(batch)])

    def prepare(self, conversations: list[list[dict]]) -> dict:
        """Tokenize B conversations, padded on the left."""
        return dict(self.processor.prepare_prompts(conversations).to(self.device, dtype=self.model.dtype))

    @torch.no_grad()
    def generate(
        self, conversations: list[list[dict]], options: dict, drawings: torch.Tensor | None = None
    ) -> tuple[list[str], list[torch.Tensor]]:
        """
        Return B texts without placeholders, and the visual tokens (images, N, V) of each answer. `drawings`, visual
        tokens (B, N, V), take the place of each prompt's last image.
        """
        inputs = self.prepare(conversations)
        if drawings is not None:
            visual_tokens = self.model.get_visual_tokens(inputs.pop("pixel_values"))
            counts = [sum(part["type"] == "image" for turn in c for part in turn["content"]) for c in conversations]
            visual_tokens[torch.tensor(counts).cumsum(0) - 1] = drawings.to(visual_tokens)
            inputs["visual_tokens"] = visual_tokens
        output = self.model.generate(**inputs, **options, return_dict_in_generate=True)
        texts = self.processor.decode_generated(output.sequences[:, inputs["input_ids"].shape[1] :])
        return [t.replace(self.processor.image_token, "").strip() for t in texts], output.get("visual_tokens")

    def answer(self, conversations: list[list[dict]], names: list[str], generation_kwargs: dict) -> list[str]:
        """Answer B conversations: with text, or with a visualizer as JSON. `names` are those of their images."""
        conversations = [self.convert_messages(messages) for messages in conversations]
        for content in [turns[-1]["content"] for turns in conversations] if self.wrap_captions and self.pipe else []:
            if [part["type"] for part in content] == ["text"]:
                text = self.pipe.config.instruction_template.replace("{}", content[0]["text"])
                content[0] = {"type": "text", "text": text}
        options = self.read_options(generation_kwargs, allows_images=self.pipe is not None)
        texts, visual_tokens = self.generate(conversations, options)
        # lmms-eval adds the empty line to tasks that name no end; it would cut answers of several paragraphs.
        ends = generation_kwargs.get("until") or []
        for end in {*([ends] if isinstance(ends, str) else ends)} - {"\n\n"}:
            texts = [text.split(end)[0] if end else text for text in texts]
        if self.pipe is None:
            return texts
        paths = self.save_images(names, visual_tokens)
        if missing := [name for name, images in zip(names, paths) if not images]:
            logger.warning(f"{len(missing)} answers have no image: {', '.join(missing)}.")
        return [json.dumps({"text": text, "images": images}) for text, images in zip(texts, paths, strict=True)]

    def save_images(self, names: list[str], visual_tokens: list[torch.Tensor]) -> list[list[str]]:
        """Decode B answers' visual tokens (images, N, V) and return the paths of their images."""
        rows = [[f"{name}_{i}" if i else name for i in range(len(t))] for name, t in zip(names, visual_tokens)]
        stems = [stem for row in rows for stem in row]
        digests = [hashlib.sha256(f"0 {stem}".encode()).digest() for stem in stems]  # as evaluate_generation.py
        generators = [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]
        images = self.pipe.decode_visual_tokens(torch.cat(visual_tokens), generator=generators)
        for stem, image in zip(stems, images, strict=True):
            image.save(self.output_dir / f"{stem}.png")
        return [[str(self.output_dir / f"{stem}.png") for stem in row] for row in rows]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer questions."""
        return [outputs[0] for outputs in self.run_batches(requests, lambda batch: self.answer_rounds(batch, 1))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer until the task ends; returns the answers of all rounds. Only the task's messages are the context."""
        return self.run_batches(requests, self.answer_rounds)

    def answer_rounds(self, batch: list[Instance], max_rounds: int | None = None) -> list[list[str]]:
        outputs, infos, active = [[] for _ in batch], [None] * len(batch), list(range(len(batch)))
        while active and len(outputs[active[0]]) != max_rounds:
            turns, names = [], []
            for row in list(active):
                messages, infos[row] = self.read_round(batch[row], outputs[row], infos[row])
                if messages is None:
                    active.remove(row)
                    continue
                *_, document, task, split = batch[row].args
                names.append(f"{task}_{split}_{document}" + (f"_round{len(outputs[row])}" if outputs[row] else ""))
                turns.append(messages)
            answers = self.answer(turns, names, self.get_generation_kwargs(batch[0])) if turns else []
            for row, answer in zip(active, answers, strict=True):
                outputs[row].append(answer)
        return outputs

    def generate_visual_cot(self, requests: list[Instance]) -> list[str]:
        """Generate an image first, then answer in text with its visual tokens in the context, after the images."""
        return self.run_batches(requests, self.draw_and_answer)

    def draw_and_answer(self, batch: list[Instance]) -> list[str]:
        blank, drawing, asking = Image.new("RGB", (8, 8)), [], []
        for request in batch:
            context, _, doc_to_visual, *_ = request.args
            images = list(doc_to_visual(self.get_document(request)) or [])
            found = re.search(r"\[GEN_PROMPT\](.*)\[/GEN_PROMPT\]\s*\[QUESTION\](.*)\[/QUESTION\]", context, re.DOTALL)
            wish, question = (text.strip() for text in found.groups()) if found else (context, context)
            drawing.append(self.convert_messages(build_user_turn(images, wish.replace("{question}", question))))
            asking.append(self.convert_messages(build_user_turn([*images, blank], question)))
        options = {"max_images": 1, "force_image": True, "do_sample": False}
        _, visual_tokens = self.generate(drawing, {"max_new_tokens": self.processor.num_image_tokens + 2, **options})
        options = self.read_options(self.get_generation_kwargs(batch[0]), allows_images=False)
        return self.generate(asking, options, torch.cat(visual_tokens))[0]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return each continuation's summed negative log-likelihood (the least one wins), and whether it is greedy."""
        # lmms-eval 0.7.3 makes a string of a bare tuple, but leaves the content of a result as it is.
        return [GenerationResult(score) for score in self.run_batches(requests, self.score, is_generation=False)]

    @torch.no_grad()
    def score(self, batch: list[Instance]) -> list[tuple[float, bool]]:
        conversations, continuations = [], []
        for request in batch:
            context, continuation, *rest = request.args
            document = self.get_document(request) if rest else None  # without one, the choice alone is scored
            images = rest[0](document) if rest and rest[0] is not None else None
            conversations.append(self.convert_messages(build_user_turn(images, context)))
            continuations.append(continuation(document) if callable(continuation) else continuation)
        inputs = self.prepare(conversations)
        encoded = self.processor.tokenizer(
            continuations, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        ).to(self.device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        inputs |= {name: torch.cat([inputs[name], encoded[name]], dim=1) for name in ("input_ids", "attention_mask")}
        position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = (
            self.model(**inputs, position_ids=position_ids, logits_to_keep=ids.shape[1] + 1).logits[:, :-1].float()
        )
        logits[..., self.processor.image_token_id] = -torch.inf  # never predicted as text
        losses = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].where(mask.bool(), 0.0).sum(1)
        is_greedy = ((logits.argmax(-1) == ids) | (mask == 0)).all(1)
        return list(zip(losses.tolist(), is_greedy.tolist(), strict=True))


class MetaMorphSimple(MetaMorphChat):
    """[`MetaMorphChat`] for tasks that give images and a text (`--force_simple`)."""

    is_simple = True

    def get_builder(self, request: Instance) -> Callable:
        context, _, doc_to_visual, doc_to_text, *_ = request.args

        def build(document: dict, **rounds) -> list[dict] | tuple:
            if not rounds:
                return build_user_turn(None if doc_to_visual is None else doc_to_visual(document), context)
            images, text, *rest = doc_to_text(document, **rounds)
            return build_user_turn(images, text), *rest

        return build
