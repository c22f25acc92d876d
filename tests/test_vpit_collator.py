import base64
import copy
import json
import re

import pytest
import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from helpers import EXAMPLES, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ByT5Tokenizer

from metamorph_hf import MetaMorphProcessor
from metamorph_hf.data.formats import BadSample
from metamorph_hf.vpit.collator import DataCollatorForVPiT


@pytest.fixture
def model(tiny_model):
    return tiny_model()


class TestCollator:
    def example(self, *turns, images=()):
        messages = []
        for number, turn in enumerate(turns):
            content = [{"type": "image"} if part == "*" else {"type": "text", "text": part} for part in turn]
            messages.append({"role": ("user", "assistant")[number % 2], "content": content})
        return {"messages": messages, "images": list(images)}

    def test_where_images_stand(self, tiny_processor, pictures):
        """Images come as a list, as a single one, or within the parts as in the standard chat form."""
        example, path = self.example(["*", "a"], ["b"]), str(pictures / "4.png")
        listed = {**example, "images": [path]}
        del example["images"]
        single = {**example, "image": path}
        within = copy.deepcopy(example)
        within["messages"][0]["content"][0]["image"] = Image.open(path)
        expected, *others = (DataCollatorForVPiT(tiny_processor)([each]) for each in (listed, single, within))
        for found in others:
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
        with pytest.raises(BadSample, match="has `images` of type str, expected a list"):
            DataCollatorForVPiT(tiny_processor)([{**example, "images": path}])
        with pytest.raises(BadSample, match="has 0 image parts in its messages, but 1 images"):
            DataCollatorForVPiT(tiny_processor)([{**self.example(["a"], ["b"]), "images": None, "image": path}])

    def test_template_without_marks(self, tiny_processor):
        processor = copy.copy(tiny_processor)
        processor.chat_template = re.sub(r"\{%- (end)?generation -%\}", "", tiny_processor.chat_template)
        with pytest.raises(ValueError, match="has no {% generation %} marks, so nothing would be learned"):
            DataCollatorForVPiT(processor)

    TOOL_TEMPLATE = (
        "{%- if tools -%}TOOLS{{ tools | tojson }}{%- endif -%}{%- for m in messages -%}<|{{ m['role'] }}|>"
        "{%- if m['role'] == 'assistant' -%}{%- generation -%}{{ m['reasoning_content'] }}{{ m['content'] }}"
        "{%- for call in m['tool_calls'] or [] -%}CALL{{ call | tojson }}{%- endfor -%}<|end|>{%- endgeneration -%}"
        "{%- else -%}{{ m['content'] }}<|end|>{%- endif -%}{%- endfor -%}"
    )

    @pytest.mark.parametrize("as_json", [False, True])
    def test_tools_and_reasoning_are_rendered_by_the_template(self, tiny_processor, as_json):
        """The calls and the reasoning are targets; an answer may be a call alone; keys that Arrow adds are dropped."""
        processor = copy.copy(tiny_processor)
        processor.chat_template = self.TOOL_TEMPLATE
        tools = [{"type": "function", "function": {"name": "get_weather"}}]
        call = {"function": {"name": "get_weather", "arguments": {"city": "Rome", "country": None}}}
        messages = [
            {"role": "user", "content": "weather?", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "12C", "tool_calls": None},
            {"role": "assistant", "content": "12 degrees.", "reasoning_content": "So: "},
        ]
        example = {"messages": messages, "tools": json.dumps(tools) if as_json else tools}
        batch = DataCollatorForVPiT(processor)([example])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        written = (
            'CALL{"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}<|end|>So: 12 degrees.<|end|>'
        )
        assert processor.tokenizer.decode(labels[labels != -100]) == written
        assert processor.tokenizer.decode(ids).startswith(f"TOOLS{json.dumps(tools)}<|user|>weather?<|end|>")

    def test_openai_parts(self, tiny_processor, pictures):
        data = "data:image/png;base64," + base64.b64encode((pictures / "4.png").read_bytes()).decode()
        expected = self.example(["*", "*", "*", "a"], ["b"], images=[str(pictures / "4.png")] * 3)
        parts = [
            {"type": "image_url", "image_url": {"url": data}},
            {"type": "input_image", "image_url": data},
            {"type": "image", "url": data},
            {"type": "input_text", "text": "a"},
        ]
        answer = {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]}
        collate = DataCollatorForVPiT(tiny_processor)
        found = collate([{"messages": [{"role": "user", "content": parts}, answer]}])
        expected = collate([expected])
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])

    def test_named_templates(self, tiny_processor):
        processor = copy.copy(tiny_processor)
        processor.chat_template = {"tool_use": "", "default": tiny_processor.chat_template}
        found, expected = (DataCollatorForVPiT(each)(EXAMPLES[:2]) for each in (processor, tiny_processor))
        assert torch.equal(found["labels"], expected["labels"])

    def test_tokenizers_without_a_pad_token(self, tiny_processor):
        processor = copy.copy(tiny_processor)
        processor.tokenizer = copy.deepcopy(tiny_processor.tokenizer)
        processor.tokenizer.pad_token = None
        found, expected = (DataCollatorForVPiT(each)(EXAMPLES[:3]) for each in (processor, tiny_processor))
        for name in ("labels", "attention_mask"):
            assert torch.equal(found[name], expected[name])
        padding = found["attention_mask"] == 0
        assert (found["input_ids"][padding] == processor.tokenizer.eos_token_id).all() and padding.any()
        processor.tokenizer.eos_token = None
        with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
            DataCollatorForVPiT(processor)

    def test_slow_tokenizers(self, tiny_processor):
        """A tokenizer in Python, which does not know the places of its tokens, gives the same targets."""
        tokenizer = ByT5Tokenizer(extra_ids=0)
        words = ["<image>", "<image_start>", "<image_end>", "<|user|>", "<|assistant|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": words})
        template = tiny_processor.chat_template
        processor = MetaMorphProcessor(tiny_processor.image_processor, tokenizer, 4, chat_template=template)
        batch = DataCollatorForVPiT(processor)(EXAMPLES[3:4])
        labels = batch["labels"][0]
        image = "<image_start>" + "<image>" * 4 + "<image_end>"
        assert tokenizer.decode(labels[labels != -100]) == f"here{image}done{image}</s>"
        assert len(batch["pixel_values"]) == 3

    @pytest.mark.parametrize(("ending", "warned"), [("+ eos_token", False), ("+ '!'", True)])
    def test_answers_learn_to_end(self, tiny_processor, caplog, ending, warned):
        """EOS right after the marks is a target, too. A template without a stop token is warned about."""
        processor = copy.copy(tiny_processor)
        inside = "+ eos_token -}}{%- endgeneration -%}"
        assert inside in processor.chat_template
        outside = inside.replace("+ eos_token ", "") + "{{- ''" + ending + " -}}"
        processor.chat_template = processor.chat_template.replace(inside, outside)
        labels = DataCollatorForVPiT(processor)([self.example(["hi"], ["yes"])])["labels"][0]
        assert processor.tokenizer.decode(labels[labels != -100]) == ("yes" if warned else "yes<|end|>")
        assert ("would not learn to stop" in caplog.text) == warned

    def test_templates_that_refuse_or_leave_out(self, tiny_processor, pictures):
        """A template without a place for images, which refuses longer conversations."""
        processor = copy.copy(tiny_processor)
        processor.chat_template = (
            "{%- if messages | length > 2 -%}{{ raise_exception('Only one turn!') }}{%- endif -%}"
            "{%- generation -%}yes<|end|>{%- endgeneration -%}"
        )
        collate = DataCollatorForVPiT(processor)
        with pytest.raises(BadSample, match="does not fit the chat template: Only one turn!"):
            collate([self.example(["a"], ["b"], ["c"], ["d"])])
        with pytest.raises(BadSample, match="has 1 images, but the chat template writes 0"):
            collate([self.example(["*"], ["b"], images=[str(pictures / "1.png")])])

    def test_an_image_is_encoded_once(self, tiny_processor, tiny_model, pictures):
        paths = [str(pictures / f"{number}.png") for number in (1, 2, 1)]
        examples = [
            self.example(["*", "*", "same?"], ["no"], images=paths[:2]),
            self.example(["draw"], ["*"], images=paths[2:]),
        ]
        batch = DataCollatorForVPiT(tiny_processor)(examples)
        assert len(batch["pixel_values"]) == 2 and batch["image_indices"].tolist() == [0, 1, 0]
        model = tiny_model().train()
        whole = {**batch, "pixel_values": batch["pixel_values"][batch["image_indices"]], "image_indices": None}
        torch.testing.assert_close(model(**batch).loss, model(**whole).loss)

    def test_arrow_makes_all_parts_alike(self, tiny_processor, pictures):
        rows = [self.example(["*", "what?"], ["grey"], images=[str(pictures / "1.png")]), self.example(["hi"], ["ho"])]
        table = Dataset.from_list(rows).cast_column("images", List(ImageFeature(decode=False)))
        plain, arrow = (DataCollatorForVPiT(tiny_processor)(list(source)) for source in (rows, table))
        for name in ("input_ids", "labels", "pixel_values"):
            assert torch.equal(plain[name], arrow[name])

    @pytest.mark.parametrize("turns", [1, 2])
    def test_long_ones_lose_whole_turns(self, tiny_processor, pictures, turns):
        """Nothing is cut through an image, and no <image_start> is left dangling."""
        images = [str(pictures / f"{number}.png") for number in range(3)]
        example = self.example(["draw"], ["*"], ["again", "*"], ["*"], ["and now?"], ["words"], images=images)
        kept = {**example, "messages": example["messages"][: 2 * turns], "images": images[: 2 * turns - 1]}
        collate = DataCollatorForVPiT(tiny_processor)
        expected = collate([kept])
        limit = expected["input_ids"].shape[1] + 3
        batch = DataCollatorForVPiT(tiny_processor, max_length=limit, on_too_long="drop_turns")([example])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        (shortened,) = batch["rejected"]
        assert shortened["kind"] == "shortened" and f"{6 - 2 * turns} messages dropped" in shortened["reason"]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"messages": []}, "has no messages"),
            (
                {"messages": [{"role": "robot", "content": "hi"}]},
                "has a message of role 'robot', expected one of system, user",
            ),
            ({"messages": [{"role": "user", "content": "hi"}]}, "has no answer"),
            ({"messages": [{"role": "assistant", "content": "  "}]}, "has an empty answer"),
            (
                {"messages": [{"role": "assistant", "content": 7}]},
                "has a bad message .* content must be text .*, but it is int",
            ),
            (
                {"messages": [{"role": "assistant", "content": [{"type": "audio"}]}]},
                "has a bad message .* content part is neither text nor",
            ),
            ({"messages": [{"role": "assistant", "content": "<image_start>"}]}, "has <image_start> in a text"),
            (
                {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": []}]},
                "has a bad message .* content must be text or a list of parts, but it is NoneType",
            ),
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}]}]},
                "has tool_calls, which the chat template does not write",
            ),
            (
                {"messages": [{"role": "assistant", "content": "ho", "reasoning_content": "well"}]},
                "has reasoning_content, which the chat template does not write",
            ),
            ({"messages": [{"role": "assistant", "content": "ho", "weight": 0}]}, "has a message with a weight"),
            ({"tools": "{"}, "has tools that are not a list or the JSON of one"),
            ({"tools": 3}, "has tools that are not a list"),
            ({"images": None, "visual_tokens": 3}, "has `visual_tokens` of type int"),
            ({"bad": "has no caption."}, "has no caption"),
            (
                {"messages": [{"role": "assistant", "content": "\ud83d"}]},
                "has a bad message .* is not valid Unicode",
            ),
            ({"images": ["1.png"]}, "has 0 image parts in its messages, but 1 images"),
        ],
    )
    @pytest.mark.parametrize("skip", [False, True])
    def test_bad_samples(self, tiny_processor, change, reason, skip):
        good = {**self.example(["hi"], ["ho"]), "id": "good"}
        bad = {**good, "id": "bad", "source": "here.jsonl", "task": "chat", **change}
        collate = DataCollatorForVPiT(tiny_processor, on_bad_sample="skip" if skip else "raise")
        if not skip:
            with pytest.raises(BadSample, match=f"Example bad of here.jsonl {reason}"):
                collate([good, bad])
            return
        batch = collate([good, bad])
        assert torch.equal(batch["input_ids"], collate([good])["input_ids"])
        (rejected,) = batch["rejected"]
        assert (rejected["kind"], rejected["task"]) == ("skipped", "chat")
        assert re.search(reason, rejected["reason"])
        alone = collate([bad])
        assert alone["labels"].tolist() == [[-100]] and alone["sample_ids"] == []

    @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_record_is_a_batch_or_a_refusal(self, tiny_processor, data):
        """There is no exception of another kind."""
        text = st.sampled_from(
            ["", " ", "hi", "<image>", "<image_start>", "\x00", "a" * 50, "{{ x }}", "\u263a", "\ud83d"]
        )
        odd = st.sampled_from([None, 3, "x", [], {}, [None], b"x", 1.5])
        part = st.one_of(
            st.fixed_dictionaries({"type": st.just("text"), "text": st.one_of(text, odd)}),
            st.fixed_dictionaries({"type": st.just("image"), "text": st.none()}),
            st.fixed_dictionaries({"type": text}),
            odd,
        )
        role = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "robot", None])
        content = st.one_of(text, st.lists(part, max_size=3), odd)
        extras = {"tool_calls": odd, "reasoning_content": odd}
        message = st.one_of(st.fixed_dictionaries({"role": role, "content": content}, optional=extras), odd)
        image = st.one_of(st.just(Image.new("RGB", (4, 4))), st.just(Image.new("L", (1, 3))), odd)
        record = st.fixed_dictionaries(
            {"messages": st.one_of(st.lists(message, max_size=4), odd)},
            optional={
                "tools": odd,
                "images": st.one_of(st.lists(image, max_size=3), st.none()),
                "id": odd,
                "bad": st.none(),
            },
        )
        options = {
            "max_length": data.draw(st.sampled_from([None, 8, 40])),
            "on_bad_sample": data.draw(st.sampled_from(["raise", "skip"])),
            "on_too_long": data.draw(st.sampled_from(["refuse", "drop_turns"])),
        }
        records = data.draw(st.lists(record, min_size=1, max_size=2))
        try:
            batch = DataCollatorForVPiT(tiny_processor, **options)(records)
        except BadSample as refusal:
            assert options["on_bad_sample"] == "raise" and str(refusal).startswith("Example ")
            return
        ids, labels, image = batch["input_ids"], batch["labels"], tiny_processor.image_token_id
        assert ids.shape == labels.shape == batch["attention_mask"].shape
        assert ((labels == -100) | (labels == ids)).all()
        assert options["max_length"] is None or ids.shape[1] <= options["max_length"]
        count = len(batch.get("image_indices", batch.get("pixel_values", [])))
        assert (ids == image).sum() == 4 * count == 4 * (ids == tiny_processor.image_start_token_id).sum()
        assert (ids == tiny_processor.image_end_token_id).sum() == count
        skipped = sum(sample["kind"] == "skipped" for sample in batch.get("rejected", []))
        assert len(batch["sample_ids"]) == len(records) - skipped


class TestBatches:
    def test_labels_say_everything(self, tiny_processor):
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES[:4])
        ids, labels = batch["input_ids"], batch["labels"]
        image, n = tiny_processor.image_token_id, tiny_processor.num_image_tokens
        assert (labels == image).sum(1).tolist() == [n, 0, 0, 2 * n]
        assert (ids == image).sum(1).tolist() == [n, n, 0, 3 * n]
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned])
        end = tiny_processor.tokenizer.eos_token_id
        for row in labels:  # the answer's end of turn is the last target, and the only one of the two
            assert row[row != -100][-1] == end
            assert (row == end).sum() == 1
        assert (labels == tiny_processor.image_start_token_id).sum(1).tolist() == [1, 0, 0, 2]
        assert not (learned & (batch["attention_mask"] == 0)).any()
        assert len(batch["pixel_values"]) == 5

    def test_same_ids_as_the_processor(self, tiny_processor):
        example = EXAMPLES[3]
        batch = DataCollatorForVPiT(tiny_processor)([example])
        rendered = tiny_processor.apply_chat_template(example["messages"], tokenize=False)
        inputs = tiny_processor(
            text=[rendered], images=[example["images"]], return_tensors="pt", add_special_tokens=False
        )
        assert torch.equal(batch["input_ids"], inputs["input_ids"])
        assert torch.equal(batch["pixel_values"], inputs["pixel_values"])

    def test_visual_tokens_instead_of_images(self, tiny_processor, model):
        collate = DataCollatorForVPiT(tiny_processor)
        batch = collate([EXAMPLES[3]])
        tokens = model.eval().get_visual_tokens(batch["pixel_values"])
        precomputed = collate([{"messages": EXAMPLES[3]["messages"], "visual_tokens": list(tokens)}])
        assert torch.equal(batch["input_ids"], precomputed["input_ids"])
        loss = model(**batch).loss
        assert torch.allclose(loss, model(**precomputed).loss)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": []}, r"Example 7 has 1 image parts in its messages, but 0 images"),
            ({"images": [picture(0), picture(1)]}, r"1 image parts in its messages, but 2 images"),
            (
                {"images": ["/no/such/picture.png"]},
                r"Example 7 has a bad image \(`images`, index 0\). The image cannot be read \(/no/such/pic",
            ),
        ],
    )
    def test_bad_images_are_named(self, tiny_processor, change, message):
        with pytest.raises(ValueError, match=message):
            DataCollatorForVPiT(tiny_processor)([EXAMPLES[4], {**EXAMPLES[0], "id": 7, **change}])

    def test_too_long_is_refused(self, tiny_processor):
        with pytest.raises(ValueError, match=r"Example 0 of the batch has \d+ tokens, more than max_length=8"):
            DataCollatorForVPiT(tiny_processor, max_length=8)(EXAMPLES[:1])

    @pytest.mark.parametrize("tokens", [torch.zeros(5, 16), torch.zeros(16), "x", [[0.0], [0.0, 1.0]]])
    def test_visual_tokens_of_a_wrong_shape(self, tiny_processor, tokens):
        with pytest.raises(BadSample, match=r"bad image \(`visual_tokens`, index 0\). (Its .* expected \(4, V\))?"):
            DataCollatorForVPiT(tiny_processor)([{"messages": EXAMPLES[0]["messages"], "visual_tokens": [tokens]}])

    def test_pixels_and_visual_tokens_do_not_mix(self, tiny_processor):
        tokens = {"messages": EXAMPLES[0]["messages"], "visual_tokens": [torch.zeros(4, 16)]}
        with pytest.raises(ValueError, match="use one of the two"):
            DataCollatorForVPiT(tiny_processor)([EXAMPLES[1], tokens])
