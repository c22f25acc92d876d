"""Train the emoji model from random weights: four steps, two hours on 2 CPU cores with AMX.

    python examples/emoji/train.py                # -> examples/emoji/checkpoint
    python examples/emoji/train.py --quick --out runs/quick/out --work runs/quick    # all four steps, tiny, in minutes

1. SigLIP: contrastive learning of names and images. Its vision tower provides the visual tokens.
2. VPiT stage 1: the projector alone, on understanding data.
3. VPiT stage 2: projector, language model and vision head, on all tasks.
4. Visualizer: a VAE, and a U-Net that decodes visual tokens.

A finished step is not run again; an interrupted one continues from its last checkpoint in `--work`.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_images import encode_images, load_images, normalize
from emoji_tasks import MIXTURE, UNDERSTANDING, EmojiTasks, corpus, training_stream
from emoji_visualizer import add_token_noise, train_visualizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from train_siglip import TRAINING, augment, train_siglip
from transformers import LlamaConfig, PreTrainedTokenizerFast, SiglipImageProcessorPil, SiglipModel, SiglipVisionModel

from metamorph_hf import (
    MetaMorphConfig,
    MetaMorphForConditionalGeneration,
    MetaMorphPipeline,
    MetaMorphProcessor,
    PatchVAE,
    VPiTConfig,
    VPiTTrainer,
)
from metamorph_hf.processing_metamorph import DEFAULT_CHAT_TEMPLATE
from metamorph_hf.vpit.trainer import last_complete_checkpoint


CHECKPOINT = Path(__file__).parent / "checkpoint"
NUM_IMAGE_TOKENS = 16
VOCABULARY = 4096
SPECIAL_TOKENS = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<image>", "<image_start>", "<image_end>"]
VIEWS = 4  # augmented copies of each image that questions may show instead
NOISE = 0.8  # largest move of the visual tokens of these copies, relative to a token's norm
STEPS = {"siglip": 7200, "projector": 60, "full": 20000, "unet": 2800}
QUICK_STEPS = {"siglip": 4, "projector": 2, "full": 4, "unet": 3}


def build_tokenizer(texts) -> PreTrainedTokenizerFast:
    """Train a lower-casing byte-level BPE of a few thousand tokens."""
    bpe = Tokenizer(models.BPE())
    # A word after a quotation mark begins with a space, too, so that its tokens are those of the unquoted word.
    quotes = [normalizers.Replace(Regex(rf"(?<!\w){mark}(?=\w)"), f"{mark} ") for mark in "\"'"]
    bpe.normalizer = normalizers.Sequence([normalizers.Lowercase(), *quotes])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|end|>",
        extra_special_tokens=SPECIAL_TOKENS[2:],
        padding_side="left",
        model_max_length=512,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )


def build_model(
    processor: MetaMorphProcessor, tower: SiglipVisionModel, quick: bool, seed: int = 0, sizes: dict = {}, **options
) -> MetaMorphForConditionalGeneration:
    """Build a Llama of 6 M parameters, or of other `sizes`, around the trained vision tower.

    `options` are fields of the config.
    """
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    width, depth = (32, 2) if quick else (256, 6)
    default_sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
        # At the default of 0.02, which suits far wider models, this one learns half as fast.
        "initializer_range": width**-0.5,
    }
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        **{**default_sizes, **sizes},
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = MetaMorphConfig(
        text_config=text_config,
        vision_config=tower.config,
        num_image_tokens=NUM_IMAGE_TOKENS,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        # At a noise of 2.5 the image so far mostly says nothing, so that the model learns from the words.
        # The gradient of the cosine is small beside that of the cross-entropy; raised, it does not slow the text down.
        **{"visual_token_noise": 2.5, "visual_loss_weight": 4.0, **options},
    )
    model = MetaMorphForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=not tower.use_head)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def encode_views(model: MetaMorphForConditionalGeneration, pixels: torch.Tensor, views: int) -> torch.Tensor:
    """Encode uint8 pixels (I, 3, 64, 64) as they are and augmented: visual tokens (1 + views, I, N, V), float16."""
    encoded = [encode_images(model, pixels)]
    for view in range(views):
        generator = torch.Generator().manual_seed(view)
        augmented = torch.cat([augment(normalize(batch), generator) for batch in pixels.split(256)])
        encoded.append(encode_images(model, ((augmented + 1) * 127.5).round().byte()))
    return torch.stack(encoded).half()


def show(views: torch.Tensor, tasks: EmojiTasks, number: int, image: int, task: str) -> torch.Tensor:
    """Return the visual tokens (N, V) of an image, out of (1 + VIEWS, images, N, V).

    Number 0 is the image as it is; any other is one of its views, an augmented one with noise of its own. Where the
    answer is a text, half of Google's images are shifted to Twitter's look: the difference between Twitter's and
    Google's image of some other emoji is added.
    """
    view, rng = number % len(views), random.Random(number)
    tokens = views[view, image].float()
    if number and task in UNDERSTANDING and tasks.rows[image]["vendor"] == "google" and rng.random() < 0.5:
        other = rng.choice(tasks.twitter)
        twin = tasks.index["google", tasks.rows[other]["base"], ""]
        tokens = F.normalize(tokens + views[view, other].float() - views[view, twin].float(), dim=-1)
    return add_token_noise(tokens[None], NOISE, torch.Generator().manual_seed(number))[0] if view else tokens


def find_look_alikes(visual_tokens: torch.Tensor) -> torch.Tensor:
    """Return (I,) bool: which of (I, N, V) have another one nearer than a cosine of 0.95, but not identical."""
    flat = F.normalize(visual_tokens.float().flatten(1), dim=1)
    similarity = flat @ flat.T
    return ((similarity > 0.95) & (similarity < 0.9999)).any(1)


def train_stage(
    stage: str,
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    tasks: EmojiTasks,
    views: torch.Tensor,
    out: Path,
    steps: int,
    batch: int,
) -> None:
    """Run VPiT stage 1 ("projector") or 2 ("full") and save it in `out/final`; resume from a checkpoint in `out`."""
    model.set_attn_implementation("eager")  # the gradient of torch's fused attention is slow in bfloat16 on a CPU
    args = VPiTConfig(
        str(out),
        **TRAINING,
        stage=stage,
        max_steps=steps,
        per_device_train_batch_size=batch,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 4, "decay_type": "1-sqrt"},
        warmup_steps=max(1, steps // 25),
        max_length=256,
        activation_checkpointing=False,
        logging_steps=max(1, min(100, steps // 2)),
    )
    mixture = UNDERSTANDING if stage == "projector" else MIXTURE
    look_up = partial(show, views, tasks)
    stream = training_stream(tasks, mixture, steps * batch, batch, "visual_tokens", look_up, num_views=2**31)
    trainer = VPiTTrainer(model, args, processing_class=processor, train_dataset=stream)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(out))
    trainer.model.save_pretrained(out / "final")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder for the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji"), help="folder for unfinished steps")
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps, to see that it runs")
    args = parser.parse_args()
    steps, work = QUICK_STEPS if args.quick else STEPS, args.work
    rows, pixels = load_images()
    tasks = EmojiTasks(rows)
    image_processor = SiglipImageProcessorPil(size={"height": 64, "width": 64}, do_convert_rgb=True)
    processor = MetaMorphProcessor(image_processor, build_tokenizer(corpus(tasks)), num_image_tokens=NUM_IMAGE_TOKENS)

    if not (work / "siglip" / "config.json").is_file():
        print("1/4 SigLIP")
        train_siglip(rows, pixels, processor.tokenizer, work / "siglip", steps["siglip"], args.quick)
    tower = SiglipModel.from_pretrained(work / "siglip").vision_model
    tower.config.vision_use_head = False  # the pooling head serves the contrastive loss alone

    model = build_model(processor, tower, args.quick)
    views = encode_views(model, pixels, 1 if args.quick else VIEWS)
    # The differences between look-alikes are a small part of their tokens, and so of the loss.
    tasks.emphasis = (1 + 2 * find_look_alikes(views[0, tasks.google]).float()).tolist()
    for number, stage in enumerate(("projector", "full"), start=1):
        folder = work / f"stage{number}"
        if not (folder / "final").is_dir():
            print(f"{number + 1}/4 VPiT stage {number}")
            train_stage(stage, model, processor, tasks, views, folder, steps[stage], 4 if args.quick else 32)
        model = MetaMorphForConditionalGeneration.from_pretrained(folder / "final")

    print("4/4 Visualizer")
    # In closed form: a convolutional VAE of this size needs hours of CPU to do as well (28 dB with 32 channels).
    vae = PatchVAE.fit(normalize(pixels[: len(rows)]), latent_channels=32)
    # Mostly the base emoji; their skin-tone variants for edits and their crops for visual thinking.
    variants = [i for i, row in enumerate(rows) if row["vendor"] == "google" and row["skin_tone"]]
    chosen = 3 * tasks.google + variants + [len(rows) + i for i in tasks.google]
    images, visual_tokens, folder = pixels[chosen], views[0, chosen].float(), work / "visualizer"
    projector, unet, scheduler = train_visualizer(images, visual_tokens, vae, folder, steps["unet"], args.quick)
    defaults = {"default_num_inference_steps": 15, "default_guidance_scale": 2.0}
    pipeline = MetaMorphPipeline(model, processor, projector, unet, vae, scheduler, **defaults)
    pipeline.to(dtype=torch.float16).save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
