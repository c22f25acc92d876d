"""The plugin of lmms-eval: each kind of request against the model itself, and the emoji tasks against our scores."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import EMOJI_CHECKPOINT, EXAMPLES_FOLDER, ROOT, import_example, write_jsonl
from PIL import Image

from metamorph_hf import MetaMorphPipeline


pytestmark = pytest.mark.optional
lmms_eval = pytest.importorskip("lmms_eval")
registry = pytest.importorskip("lmms_eval.models")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.api.task import ConfigurableMessagesTask  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

from metamorph_hf.evaluation.lmms_eval import MetaMorphChat, MetaMorphSimple  # noqa: E402


TASK = {"task": "t", "repeats": 1}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture
def folder(components, tmp_path):
    MetaMorphPipeline(**components).save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


@pytest.fixture
def documents(tiny_images):
    """Five documents, with none, one or two images."""
    images = [tiny_images[:1], [], tiny_images[1:3], tiny_images[3:], tiny_images[:2]]
    questions = ["what?", "tell me a long story", "same?", "which?", "a or b?"]
    return [
        {"question": q, "images": i, "choice": c} for q, i, c in zip(questions, images, " yes no bird x y".split())
    ]


@pytest.fixture
def load(folder, documents, tmp_path):
    """Return a function that loads the plugin's model with the documents as split `test` of task `t`."""

    def make(simple: bool = False, **options) -> MetaMorphChat:
        options = {"pretrained": folder, "device": "cpu", "output_dir": str(tmp_path / "images"), **options}
        lm = registry.get_model("metamorph", force_simple=simple)(**options)
        lm.task_dict = {"t": {"test": documents}}
        return lm

    return make


def turn(document: dict) -> list[dict]:
    return ConfigurableMessagesTask._build_user_turn(document["images"], document["question"])


def chat_requests(kwargs: dict = GREEDY, build=turn, kind: str = "generate_until") -> list[Instance]:
    return [Instance(kind, ("", build, dict(kwargs), i, "t", "test"), 0, TASK | {"doc_id": i}) for i in range(5)]


def ask(lm, conversation: list[dict], **options) -> tuple[str, list[torch.Tensor]]:
    """Ask the model itself, without the plugin's code."""
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = lm.processor.apply_chat_template([conversation], processor_kwargs={"padding": True}, **template)
    options = {"do_sample": False, "max_new_tokens": 6, **options, "return_dict_in_generate": True}
    output = lm.model.generate(**inputs, **options)
    (text,) = lm.processor.decode_generated(output.sequences[:, inputs["input_ids"].shape[1] :])
    return text, output.visual_tokens


class TestRegistry:
    def test_entry_point(self):
        assert registry.get_model("metamorph") is MetaMorphChat and not MetaMorphChat.is_simple
        assert registry.get_model("metamorph", force_simple=True) is MetaMorphSimple and MetaMorphSimple.is_simple

    def test_model_and_processor_in_one_folder(self, components, tmp_path):
        for name in ("model", "processor"):
            components[name].save_pretrained(tmp_path / "model")
        lm = MetaMorphChat.create_from_arg_string(f"pretrained={tmp_path / 'model'}", {"batch_size": "2"})
        assert (lm.batch_size, lm.rank, lm.world_size, lm.pipe) == (2, 0, 1, None)
        lm.clean()
        assert "model" not in vars(lm)

    @pytest.mark.slow
    def test_documented_tasks(self):
        known = TaskManager().all_tasks
        tasks = re.findall(r"`LMMS.*? --tasks (\S+?)[ `]", (ROOT / "docs" / "evaluation.md").read_text())
        assert len(tasks) > 10 and {name for group in tasks for name in group.split(",")} <= set(known)

    @pytest.mark.parametrize("size", ["auto", "auto:4", "0"])
    def test_automatic_batches(self, load, size):
        with pytest.raises(ValueError, match=f"--batch_size is '{size}', but must be a number"):
            load(batch_size=size)


class TestGenerate:
    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    def test_answers_are_the_models(self, load, documents, batch_size):
        lm = load(batch_size=batch_size)
        expected = [ask(lm, turn(document), max_images=0)[0] for document in documents]
        assert lm.generate_until(chat_requests()) == expected
        assert len(set(expected)) > 1

    def test_simple_tasks_give_the_same(self, load, documents):
        args = [
            (d["question"], dict(GREEDY), lambda doc: doc["images"], i, "t", "test") for i, d in enumerate(documents)
        ]
        requests = [Instance("generate_until", a, 0, TASK | {"doc_id": i}) for i, a in enumerate(args)]
        assert load(simple=True, batch_size=2).generate_until(requests) == load().generate_until(chat_requests())

    def test_requests_of_one_batch_have_equal_options(self, load):
        lm, lengths = load(batch_size=8), []
        requests = chat_requests()
        for request, length in zip(requests, (2, 6, 2, 6, 2)):
            request.args[2]["max_new_tokens"] = length
        whole = lm.model.generate
        lm.model.generate = lambda **kwargs: lengths.append(len(kwargs["input_ids"])) or whole(**kwargs)
        answers = lm.generate_until(requests)
        expected = [
            ask(lm, turn(d), max_images=0, max_new_tokens=n)[0]
            for d, n in zip(lm.task_dict["t"]["test"], (2, 6, 2, 6, 2))
        ]
        assert answers == expected and lengths[:2] == [3, 2]

    def test_placeholders_in_the_text_are_the_images(self, load, tiny_images):
        lm = load()
        part = [{"type": "image", "url": image} for image in tiny_images[:2]]
        given = [{"role": "user", "content": [*part, {"type": "text", "text": "a <image> or <image>?"}]}]
        text = [{"type": "text", "text": words} for words in ("a ", " or ", "?")]
        (converted,) = lm.convert_messages(given)
        assert converted["content"] == [text[0], part[0], text[1], part[1], text[2]]

    def test_video(self, load, video):
        lm = load(max_frames=4)
        (converted,) = lm.convert_messages([{"role": "user", "content": [{"type": "video", "url": str(video)}]}])
        shades = [part["image"].convert("L").getpixel((9, 9)) for part in converted["content"]]
        assert len(shades) == 4 and shades == sorted(shades) and shades[0] < 30 and shades[3] > 150

    def test_audio_is_refused(self, load):
        build = lambda document: [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]  # noqa: E731
        with pytest.raises(ValueError, match="neither text nor an image"):
            load().generate_until(chat_requests(build=build)[:1])

    def test_options(self, load):
        lm = load()
        options = lm.read_options(
            {"temperature": 0, "top_p": 1.0, "num_beams": 2, "until": ["a"], "image_ratio": 1}, False
        )
        assert options == {"max_new_tokens": 512, "num_beams": 2, "do_sample": False, "max_images": 0}
        options = lm.read_options({"temperature": 0.7, "top_p": None, "max_new_tokens": 64}, True)
        assert options["do_sample"] and options["temperature"] == 0.7 and "top_p" not in options
        assert options["max_new_tokens"] == 64 + 6  # an image of 4 visual tokens fits beside the text

    def test_until_ends_an_answer(self, load):
        lm = load()
        whole = lm.generate_until(chat_requests())
        end = next(answer for answer in whole if len(answer) > 2)[1]
        for until in ([end], end):
            cut = lm.generate_until(chat_requests({**GREEDY, "until": until}))
            assert cut == [answer.split(end)[0] for answer in whole] != whole
        words = next(answer for answer in whole if len(answer) > 2)[:2][::-1] + "no answer has this"
        assert lm.generate_until(chat_requests({**GREEDY, "until": words})) == whole


class TestRounds:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_chat(self, load, documents, batch_size):
        """Document i asks i + 1 times, and each question repeats the answers before it."""

        def build(document, round_idx=0, previous_output=(), previous_round_info=None):
            if round_idx == 0:
                return turn(document)
            assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
            is_over = round_idx > documents.index(document)
            messages = turn({**document, "question": " ".join(["so?", *previous_output])})
            return None if is_over else messages, is_over, previous_output, round_idx

        lm = load(batch_size=batch_size)
        found = lm.generate_until_multi_round(chat_requests(build=build, kind="generate_until_multi_round"))
        for index, (document, outputs) in enumerate(zip(documents, found, strict=True)):
            expected = [ask(lm, turn(document), max_images=0)[0]]
            for _ in range(index):
                question = " ".join(["so?", *expected])
                expected.append(ask(lm, turn({**document, "question": question}), max_images=0)[0])
            assert outputs == expected

    def test_simple(self, load, documents):
        def doc_to_text(document, round_idx, previous_output, previous_round_info):
            return document["images"], "and " + previous_output[-1], round_idx == 2, previous_output, None

        args = ("hi", dict(GREEDY), lambda document: document["images"], doc_to_text, 0, "t", "test")
        lm = load(simple=True)
        (outputs,) = lm.generate_until_multi_round(
            [Instance("generate_until_multi_round", args, 0, TASK | {"doc_id": 0})]
        )
        first = ask(lm, turn({**documents[0], "question": "hi"}), max_images=0)[0]
        second = ask(lm, turn({**documents[0], "question": "and " + first}), max_images=0)[0]
        assert outputs == [first, second]


class TestImages:
    def test_answers_name_their_images(self, load, folder, documents, tmp_path):
        """Each image is the one that the pipeline decodes, in any batch."""
        lm = load(visualizer=folder, batch_size=3, force_image=True)
        answers = [json.loads(answer) for answer in lm.generate_until(chat_requests())]
        pipe = MetaMorphPipeline.from_pretrained(folder)
        for index, (answer, document) in enumerate(zip(answers, documents, strict=True)):
            text, visual_tokens = ask(lm, turn(document), max_images=1, force_image=True, max_new_tokens=12)
            assert answer["text"] == text.replace("<image>", "").strip()
            (path,) = answer["images"]
            assert path == str(tmp_path / "images" / f"t_test_{index}.png")
            noise = int.from_bytes(hashlib.sha256(f"0 t_test_{index}".encode()).digest()[:7], "big")
            (expected,) = pipe.decode_visual_tokens(visual_tokens, generator=[torch.Generator().manual_seed(noise)])
            difference = np.asarray(Image.open(path)).astype(int) - np.asarray(expected)
            assert np.abs(difference).max() <= 1  # the rest of a batch changes the last bits

    def test_an_answer_without_an_image(self, load, folder):
        lm = load(visualizer=folder, max_images=0)
        answers = [json.loads(answer) for answer in lm.generate_until(chat_requests())]
        assert [answer["images"] for answer in answers] == [[]] * 5 and answers[0]["text"]

    def test_captions(self, load, folder, documents):
        lm, asked = load(visualizer=folder, wrap_captions=True, batch_size=8), []
        prepare = lm.prepare
        lm.prepare = lambda conversations: asked.extend(conversations) or prepare(conversations)
        lm.generate_until(chat_requests())
        texts = [conversation[0]["content"][-1]["text"] for conversation in asked]
        assert texts[1] == "Generate an image of tell me a long story."
        assert [texts[i] for i in (0, 2, 3, 4)] == [documents[i]["question"] for i in (0, 2, 3, 4)]


class TestVisualCot:
    def test_answer_sees_the_drawing(self, load, documents):
        lm = load(simple=True, batch_size=3)
        context = "[GEN_PROMPT]mark it: {question}[/GEN_PROMPT][QUESTION] why? [/QUESTION]"
        args = [(context, {**GREEDY, "visual_cot": True}, lambda d: d["images"], i, "t", "test") for i in range(5)]
        found = lm.generate_visual_cot([Instance("generate_visual_cot", a, 0, TASK | {"doc_id": 0}) for a in args])
        n, tokenizer = lm.processor.num_image_tokens, lm.processor.tokenizer
        for document, answer in zip(documents, found, strict=True):
            drawn = ask(lm, turn({**document, "question": "mark it: why?"}), force_image=True, max_images=1)[1][0]
            pixels = [lm.processor(images=image, return_tensors="pt")["pixel_values"] for image in document["images"]]
            tokens = torch.cat([*(lm.model.get_visual_tokens(p) for p in pixels), drawn]).detach()
            images = ("<image_start>" + "<image>" * n + "<image_end>") * len(tokens)
            prompt = f"<|user|>{images}why?<|end|><|assistant|>"
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            output = lm.model.generate(ids, visual_tokens=tokens, max_new_tokens=6, do_sample=False, max_images=0)
            assert answer == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


class TestLoglikelihood:
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_is_the_text_loss(self, load, documents, batch_size):
        lm = load(simple=True, batch_size=batch_size)
        args = [
            (d["question"], lambda d: d["choice"], lambda d: d["images"], i, "t", "test")
            for i, d in enumerate(documents)
        ]
        args.append(("", "bird"))  # the choice alone
        requests = [Instance("loglikelihood", a, 0, TASK | {"doc_id": 0}) for a in args]
        found = [result.text for result in lm.loglikelihood(requests)]
        for (loss, is_greedy), document in zip(found, [*documents, {"question": "", "images": [], "choice": "bird"}]):
            text = lm.processor.apply_chat_template(turn(document), add_generation_prompt=True) + document["choice"]
            inputs = lm.processor(
                text=text, images=[document["images"]] if document["images"] else None, return_tensors="pt"
            )
            count = len(lm.processor.tokenizer(document["choice"], add_special_tokens=False).input_ids)
            labels = inputs["input_ids"].clone()
            labels[:, :-count] = -100
            with torch.no_grad():
                output = lm.model(**inputs, labels=labels)
            assert loss == pytest.approx(count * output.text_loss.item(), rel=1e-4)
            assert is_greedy == (output.text_accuracy.item() == 1)

    def test_greedy_answers(self, load):
        """Among all printable characters, the likeliest is the greedy answer of those questions that have one."""
        lm, characters = load(simple=True, batch_size=95), [chr(code) for code in range(32, 127)]
        lm.task_dict = {"t": {"test": [{}]}}
        greedy = []
        for question in map(str, range(8)):
            args = [(question, character, None, 0, "t", "test") for character in characters]
            results = lm.loglikelihood([Instance("loglikelihood", a, 0, TASK | {"doc_id": 0}) for a in args])
            scores = [result.text for result in results]
            with torch.no_grad():
                logits = lm.model(**lm.prepare([turn({"question": question, "images": []})])).logits[0, -1]
            logits[lm.processor.image_token_id] = -torch.inf
            ids = [lm.processor.tokenizer(c, add_special_tokens=False).input_ids[0] for c in characters]
            torch.testing.assert_close(torch.tensor([loss for loss, _ in scores]), -logits.log_softmax(-1)[ids])
            assert [is_greedy for _, is_greedy in scores] == [i == logits.argmax() for i in ids]
            greedy += [is_greedy for _, is_greedy in scores]
        assert any(greedy)


@pytest.mark.slow
def test_a_task_of_choices(load, folder, tmp_path, monkeypatch):
    """lmms-eval takes the choice with the least value that we return."""
    monkeypatch.chdir(tmp_path)
    choices = ["yes", "no", "a bird"]
    rows = [{"question": f"{number}?", "choices": choices, "answer": number % 3} for number in range(6)]
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk("questions")
    task = {"task": "choose", "dataset_path": "questions", "dataset_kwargs": {"load_from_disk": True}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    task |= {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choose.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), model_name="metamorph")
    options = {"tasks": ["choose"], "task_manager": manager, "batch_size": 4, "device": "cpu"}
    with pytest.raises(AssertionError, match="Currently messages is used for generation only"):
        simple_evaluate("metamorph", f"pretrained={folder}", **options)
    score = simple_evaluate("metamorph", f"pretrained={folder}", force_simple=True, **options)["results"]["choose"]
    lm, correct = load(), 0
    for row in rows:
        losses = []
        for choice in choices:
            prompt = f"<|user|>{row['question']}<|end|><|assistant|>"
            inputs = lm.processor(text=f"{prompt} {choice}", return_tensors="pt")
            labels = inputs["input_ids"].clone()
            labels[:, : -len(choice) - 1] = -100  # a token is a byte
            losses.append(lm.model(**inputs, labels=labels).text_loss.item() * (len(choice) + 1))
        correct += losses.index(min(losses)) == row["answer"]
    assert score["acc,none"] == pytest.approx(correct / 6)


@pytest.mark.slow
def test_emoji_tasks_give_our_own_scores(tmp_path, monkeypatch):
    """Both tasks, run as a user does, against our evaluation of the same questions."""
    monkeypatch.chdir(tmp_path)
    export, evaluate_emoji = import_example("export_emoji_questions.py"), import_example("evaluate_emoji.py")
    evaluate_generation = import_example("evaluate_generation.py")
    monkeypatch.setattr("sys.argv", ["export_emoji_questions.py", "--limit", "20"])
    export.main()
    scores = {}
    for task, visualizer in (("emoji_naming", ""), ("emoji_drawing", f",visualizer={EMOJI_CHECKPOINT}")):
        manager = TaskManager(include_path=str(EXAMPLES_FOLDER / "emoji" / "lmms_eval_tasks"), model_name="metamorph")
        arguments = f"pretrained={EMOJI_CHECKPOINT}{visualizer}"
        options = {"tasks": [task], "task_manager": manager, "batch_size": 20, "device": "cpu"}
        scores[task] = simple_evaluate("metamorph", arguments, **options)["results"][task]

    # Naming: the answers of `evaluate_emoji.py`
    tasks = evaluate_emoji.EmojiTasks(evaluate_emoji.load_rows())
    records = random.Random(0).sample(tasks.evaluation("name_twitter_held_out"), 20)
    pipe = MetaMorphPipeline.from_pretrained(EMOJI_CHECKPOINT)
    texts, _ = evaluate_emoji.answer_records(pipe, records, tasks, progress="naming")
    names = [record["answer"] for record in records]
    assert scores["emoji_naming"]["accuracy,none"] == pytest.approx(sum(map(str.__eq__, texts, names)) / 20)

    # Drawing: the retrieval of `evaluate_generation.py`, whose noise follows from the same ids
    drawing = Dataset.load_from_disk(str(tmp_path / "runs" / "emoji_questions" / "drawing" / "test"))
    drawing = drawing.remove_columns("image").to_list()
    lines = []
    for index, question in enumerate(drawing):
        pixels = evaluate_emoji.draw_image(tasks, question["row"])
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
        lines.append({"caption": question["answer"], "image": f"{index}.png", "id": f"emoji_drawing_test_{index}"})
    captions = write_jsonl(tmp_path / "captions.jsonl", lines)
    max_new_tokens = str(24 + pipe.model.config.num_image_tokens + 2)  # the task's length of text, and an image
    flags = [
        "--output",
        "own",
        "--captions",
        captions,
        "--max-new-tokens",
        max_new_tokens,
        "--batch-size",
        "20",
        "--cpu",
    ]
    monkeypatch.setattr("sys.argv", ["evaluate_generation.py", *flags])
    evaluate_generation.main()
    own = json.loads((tmp_path / "own" / "result.json").read_text())
    assert scores["emoji_drawing"]["retrieval_top1,none"] == pytest.approx(own["metrics"]["retrieval_top1"] / 100)
    for index in range(20):
        name = f"emoji_drawing_test_{index}.png"
        images = [Image.open(folder / name) for folder in (tmp_path / "lmms_eval_images", tmp_path / "own" / "images")]
        first, second = (np.asarray(image).astype(int) for image in images)
        assert np.abs(first - second).max() <= 1, name
