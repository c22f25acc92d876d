import copy

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from metamorph_hf import MetaMorphProcessor


PAD, END, USER, ASSISTANT, IMAGE, IMAGE_START, IMAGE_END = range(7)
PICTURE = [IMAGE_START, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE_END]


@pytest.fixture
def ids(tiny_tokenizer):
    return lambda text: tiny_tokenizer(text, add_special_tokens=False).input_ids


def image_part(image):
    return {"type": "image", "image": image}


def text_part(text):
    return {"type": "text", "text": text}


def turn(role, *parts):
    return {"role": role, "content": list(parts)}


@pytest.fixture
def conversations(tiny_images):
    """Return conversations with 0, 1 and 4 images in prompts and answers, at their beginning, middle and end."""
    red, green, blue, gray = map(image_part, tiny_images)
    return [
        [turn("user", text_part("hi")), turn("assistant", text_part("hello there"))],
        [turn("user", text_part("draw")), turn("assistant", text_part("here"), red)],
        [
            turn("user", red, text_part("and"), green),
            turn("assistant", text_part("é"), blue, text_part("ok")),
            turn("user", text_part("more")),
            turn("assistant", gray, text_part("done")),
        ],
    ]


def encode(processor, conversation, **kwargs):
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


class TestExpansion:
    def test_one_image_becomes_n_placeholders(self, tiny_processor, tiny_images, ids):
        inputs = tiny_processor(images=tiny_images[:2], text="a<image>b<image>", return_tensors="pt")
        assert inputs.input_ids[0].tolist() == [*ids("a"), *PICTURE, *ids("b"), *PICTURE]
        assert inputs.pixel_values.shape == (2, 3, 16, 16)
        assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"]

    def test_flat_and_nested_lists(self, tiny_processor, tiny_images):
        texts = ["a<image>", "bc", "<image>d<image>"]
        flat = tiny_processor(images=tiny_images[:3], text=texts, padding=True, return_tensors="pt")
        rows = [tiny_images[:1], [], tiny_images[1:3]]
        nested = tiny_processor(images=rows, text=texts, padding=True, return_tensors="pt")
        for key in flat:
            assert torch.equal(flat[key], nested[key])
        single = tiny_processor(images=tiny_images[0], text=texts[0], return_tensors="pt")
        assert torch.equal(single.pixel_values, flat.pixel_values[:1])

    def test_left_padding(self, tiny_processor, tiny_images):
        texts = ["abcdefghi", "<image>"]
        inputs = tiny_processor(images=tiny_images[:1], text=texts, padding=True, return_tensors="pt")
        assert inputs.input_ids[1].tolist() == [PAD] * 3 + PICTURE
        assert inputs.attention_mask[1].tolist() == [0] * 3 + [1] * 6

    @pytest.mark.parametrize("images", [None, [], [[], []]])
    def test_no_images(self, tiny_processor, images):
        inputs = tiny_processor(images=images, text=["ab", "cd"], return_tensors="pt")
        assert sorted(inputs) == ["attention_mask", "input_ids"]

    def test_images_alone(self, tiny_processor, tiny_images):
        assert tiny_processor(images=tiny_images, return_tensors="pt").pixel_values.shape == (4, 3, 16, 16)

    @pytest.mark.parametrize(
        ("text", "num_images", "message"),
        [
            ("<image><image>", 0, "2 <image> tokens in the text but no images"),
            ("<image><image>", 1, "2 <image> tokens and 1 images"),
            ("<image>", 3, "1 <image> tokens and 3 images"),
            ("a", 1, "0 <image> tokens and 1 images"),
        ],
    )
    def test_counts_that_differ(self, tiny_processor, tiny_images, text, num_images, message):
        with pytest.raises(ValueError, match=message):
            tiny_processor(images=tiny_images[:num_images] or None, text=text, return_tensors="pt")

    def test_images_in_the_wrong_row(self, tiny_processor, tiny_images):
        with pytest.raises(ValueError, match=r"texts have \[1, 1\] <image> placeholders.*hold \[2, 0\]"):
            tiny_processor(
                images=[tiny_images[:2], []], text=["<image>", "<image>"], return_tensors="pt", padding=True
            )

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("max_length", [1, 2, 5, 6])
    def test_truncation_through_an_image(self, tiny_processor, tiny_images, max_length, side):
        processor = copy.deepcopy(tiny_processor)
        processor.tokenizer.truncation_side = side
        text, parts = ("a<image>bc", "image_end") if side == "right" else ("bc<image>a", "image_start")
        with pytest.raises(ValueError, match=f"Mismatch in `{'image' if max_length < 6 else parts}` token count"):
            processor(images=tiny_images[:1], text=text, truncation=True, max_length=max_length)

    def test_truncation_of_text(self, tiny_processor, tiny_images, ids):
        inputs = tiny_processor(images=tiny_images[:1], text="a<image>bc", truncation=True, max_length=8)
        assert inputs.input_ids == [[*ids("a"), *PICTURE, *ids("b")]]

    def test_sizes_for_serving(self, tiny_processor, tiny_images):
        """Model servers count the positions of visual tokens, without <image_start> and <image_end>."""
        texts = ["a<image>", "<image>bc"]
        options = {"padding": True, "return_mm_token_type_ids": True, "return_tensors": "pt"}
        inputs = tiny_processor(images=tiny_images[:2], text=texts, **options)
        sizes = tiny_processor._get_num_multimodal_tokens([(20, 24), (9, 9)])
        assert sizes["num_image_tokens"] == inputs.mm_token_type_ids.sum(-1).tolist() == [4, 4]


class TestChat:
    def test_format(self, tiny_processor, conversations, tiny_images, ids):
        prompt = [turn("user", image_part(tiny_images[0]), text_part("what?"))]
        inputs = encode(tiny_processor, prompt, add_generation_prompt=True)
        assert inputs.input_ids[0].tolist() == [USER, *PICTURE, *ids("what?"), END, ASSISTANT]
        plain = [{"role": "user", "content": "what?"}]
        assert encode(tiny_processor, plain).input_ids[0].tolist() == [USER, *ids("what?"), END]
        text = tiny_processor.apply_chat_template(conversations[1])
        assert text == "<|user|>draw<|end|><|assistant|>here<image><|end|>"

    def test_order_of_images(self, tiny_processor, conversations, tiny_images):
        inputs = encode(tiny_processor, conversations[2])
        expected = tiny_processor.image_processor(tiny_images, return_tensors="pt").pixel_values
        assert torch.equal(inputs.pixel_values, expected)

    def test_assistant_mask(self, tiny_processor, conversations):
        """The mask is 1 on every token of an answer, images and end-of-turn token included, and 0 elsewhere."""
        inputs = encode(
            tiny_processor, conversations, return_assistant_tokens_mask=True, processor_kwargs={"padding": True}
        )
        assert inputs.pixel_values.shape[0] == 5
        for row, mask in zip(inputs.input_ids.tolist(), inputs.assistant_masks.tolist()):
            expected, in_answer = [], False
            for token in row:
                expected.append(int(in_answer))
                in_answer = token == ASSISTANT or (in_answer and token != END)
            assert mask == expected
        assert inputs.assistant_masks.sum(1).tolist() == [12, 4 + 6 + 1, (2 + 6 + 2 + 1) + (6 + 4 + 1)]

    def test_mask_gives_labels_of_the_model(self, tiny_processor, tiny_model, conversations):
        inputs = encode(
            tiny_processor, conversations, return_assistant_tokens_mask=True, processor_kwargs={"padding": True}
        )
        labels = inputs.input_ids.masked_fill(inputs.pop("assistant_masks") == 0, -100)
        outputs = tiny_model()(**inputs, labels=labels)
        assert outputs.num_visual_labels.item() == 3 * 4
        assert outputs.num_text_labels.item() == 12 + (4 + 2 + 1) + (2 + 2 + 2 + 1) + (2 + 4 + 1)

    def test_placeholder_in_the_text(self, tiny_processor, tiny_images):
        """A user who types <image> does not make room for an image."""
        with pytest.raises(ValueError, match="1 <image> tokens in the text but no images"):
            encode(tiny_processor, [turn("user", text_part("what is <image> ?"))])
        message = turn("user", image_part(tiny_images[0]), text_part("what is <image> ?"))
        with pytest.raises(ValueError, match="total 2 <image> tokens and 1 images"):
            encode(tiny_processor, [message])


class TestImages:
    @pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
    @pytest.mark.parametrize("do_convert_rgb", [True, None])
    def test_modes(self, tiny_tokenizer, tiny_images, mode, do_convert_rgb):
        """It works with the image processor of a checkpoint that does not mention colors, too."""
        image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16}, do_convert_rgb=do_convert_rgb)
        processor = MetaMorphProcessor(image_processor, tiny_tokenizer, num_image_tokens=4)
        images = [tiny_images[0], tiny_images[1].convert(mode)]
        inputs = processor(images=images, text="<image><image>", return_tensors="pt")
        assert inputs.pixel_values.shape == (2, 3, 16, 16)
        if mode == "L":
            gray = inputs.pixel_values[1]
            assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])

    def test_path(self, tiny_processor, tiny_images, tmp_path):
        path = str(tmp_path / "image.png")
        tiny_images[0].save(path)
        for image in (path, Image.open(path)):
            inputs = encode(tiny_processor, [turn("user", image_part(image))])
            expected = tiny_processor.image_processor(tiny_images[0], return_tensors="pt").pixel_values
            assert torch.equal(inputs.pixel_values, expected)

    def test_missing_path(self, tiny_processor):
        with pytest.raises(ValueError, match=r"The image cannot be read \(nowhere.png\): the file does not exist"):
            encode(tiny_processor, [turn("user", image_part("nowhere.png"))])

    def test_file_that_is_no_image(self, tiny_processor):
        with pytest.raises(ValueError, match=rf"The image cannot be read \({__file__}\)"):
            encode(tiny_processor, [turn("user", image_part(__file__))])


class TestParts:
    @pytest.mark.parametrize(
        "part",
        [
            lambda url: {"type": "image_url", "image_url": {"url": url}},
            lambda url: {"type": "image_url", "image_url": url},
            lambda url: {"type": "input_image", "image_url": url},
            lambda url: {"type": "image", "url": url},
        ],
    )
    @pytest.mark.parametrize("text", ["text", "input_text"])
    def test_forms_of_other_apis(self, tiny_processor, tiny_images, tmp_path, part, text):
        tiny_images[0].save(tmp_path / "image.png")
        expected = encode(tiny_processor, [turn("user", image_part(tiny_images[0]), text_part("What?"))])
        given = part(str(tmp_path / "image.png"))
        inputs = encode(tiny_processor, [turn("user", given, {"type": text, "text": "What?"})])
        assert torch.equal(inputs.input_ids, expected.input_ids)
        assert torch.equal(inputs.pixel_values, expected.pixel_values)

    @pytest.mark.parametrize("part", [{"type": "audio", "audio": "a.wav"}, {"type": "text"}, "words", {"text": "hi"}])
    def test_unknown_parts_are_refused(self, tiny_processor, part):
        with pytest.raises(ValueError, match="A content part is neither text nor an image"):
            encode(tiny_processor, [turn("user", part)])


class TestPadding:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_left_whatever_the_tokenizer_says(self, tiny_processor, side):
        tokenizer = copy.deepcopy(tiny_processor.tokenizer)
        tokenizer.padding_side = side
        processor = type(tiny_processor)(
            tiny_processor.image_processor, tokenizer, num_image_tokens=4, chat_template=tiny_processor.chat_template
        )
        inputs = processor(text=["a", "abc"], padding=True, return_tensors="pt")
        assert inputs.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
        for kwargs in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
            inputs = processor(text=["a", "abc"], padding=True, return_tensors="pt", **kwargs)
            assert inputs.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
        assert tokenizer.padding_side == side


class TestDecoding:
    @pytest.mark.parametrize("as_tensor", [True, False])
    def test_one_mark_per_picture(self, tiny_processor, ids, as_tensor):
        rows = [
            [*ids("a red apple: "), *PICTURE, *ids(" and"), END, PAD, PAD],
            [*PICTURE, *PICTURE, END],
            [*ids("just words é"), END],
        ]
        if as_tensor:
            length = max(map(len, rows))
            rows = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
        expected = ["a red apple: <image> and", "<image><image>", "just words é"]
        assert tiny_processor.decode_generated(rows) == expected

    def test_unfinished_picture(self, tiny_processor, ids):
        rows = [[*ids("a"), *PICTURE, *ids("b"), IMAGE_START, IMAGE, IMAGE], [*ids("a"), IMAGE_START]]
        assert tiny_processor.decode_generated(rows) == ["a<image>b", "a"]

    def test_there_and_back(self, tiny_processor, tiny_model):
        model = tiny_model()
        prompt = torch.tensor([[USER, 40, END, ASSISTANT, IMAGE_START]])
        outputs = model.generate(prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        (text,) = tiny_processor.decode_generated(outputs.sequences[:, 4:])
        assert text.count("<image>") == len(outputs.visual_tokens[0]) >= 1


class TestSaving:
    def test_auto_processor(self, tiny_processor, tiny_model, conversations, tmp_path):
        tiny_processor.save_pretrained(tmp_path)
        tiny_model().config.save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path, backend="pil")
        assert type(loaded) is MetaMorphProcessor
        assert loaded.to_dict() == tiny_processor.to_dict()
        assert (loaded.num_image_tokens, loaded.image_token_id) == (4, IMAGE)
        assert loaded.chat_template == tiny_processor.chat_template
        expected = encode(tiny_processor, conversations, processor_kwargs={"padding": True})
        actual = encode(loaded, conversations, processor_kwargs={"padding": True})
        for key in expected:
            assert torch.equal(actual[key], expected[key]), key

    def test_other_names_of_the_tokens(self, tiny_tokenizer, tiny_images, tmp_path):
        image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
        names = {"image_token": "<|user|>", "image_start_token": "<|assistant|>", "image_end_token": "<image>"}
        processor = MetaMorphProcessor(image_processor, tiny_tokenizer, num_image_tokens=1, **names)
        processor.save_pretrained(tmp_path)
        loaded = MetaMorphProcessor.from_pretrained(tmp_path)
        inputs = loaded(images=tiny_images[:1], text="<|user|>")
        assert inputs.input_ids == [[ASSISTANT, USER, IMAGE]]

    def test_tokenizer_without_image_tokens(self, tiny_tokenizer):
        with pytest.raises(
            ValueError, match="has no token <picture>. Add it by tokenizer.add_special_tokens"
        ) as error:
            MetaMorphProcessor(SiglipImageProcessorPil(), tiny_tokenizer, image_token="<picture>")
        tokenizer = copy.deepcopy(tiny_tokenizer)
        exec(str(error.value).partition("Add it by ")[2].removesuffix("."), {"tokenizer": tokenizer})
        assert {*tokenizer.all_special_tokens} == {*tiny_tokenizer.all_special_tokens, "<picture>"}
