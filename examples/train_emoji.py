"""Train the emoji model from random weights: six steps, hours on 2 CPU cores.

    python examples/train_emoji.py                # -> examples/emoji/checkpoint
    python examples/train_emoji.py --quick --out runs/quick/out --work runs/quick    # all steps, tiny, in minutes

1. SigLIP: contrastive learning of words and images. Its vision tower provides the visual tokens.
2. Language model: a small Llama reads sentences that say what things are.
3. Autoencoder: pixels to latents and back.
4. Visualizer: a U-Net that decodes visual tokens into latents.
5. VPiT stage 1: the projector alone, on understanding data.
6. VPiT stage 2: projector, language model, visual queries and vision head, on all tasks.

A finished step is not run again; an interrupted one continues from its last checkpoint in `--work`.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import EMOJI_CHECKPOINT
from diffusers import DDIMScheduler
from emoji.images import DEVICE, IMAGE_SIZE, encode_images, load_images, load_rows, normalize
from emoji.language import train_language_model
from emoji.optimizer import MuonAdamW
from emoji.siglip import ATTENTION, TRAINING, augment, train_siglip
from emoji.tasks import MIXTURE, UNDERSTANDING, EmojiTasks, corpus, training_stream
from emoji.visualizer import add_token_noise, train_autoencoder, train_visualizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
)

from metamorph_hf import (
    GridUNet2DConditionModel,
    MetaMorphConfig,
    MetaMorphForConditionalGeneration,
    MetaMorphPipeline,
    MetaMorphProcessor,
    PatchAutoencoder,
    VisualTokenProjector,
    VPiTConfig,
    VPiTTrainer,
)
from metamorph_hf.processing_metamorph import DEFAULT_CHAT_TEMPLATE
from metamorph_hf.vpit.trainer import last_complete_checkpoint


NUM_IMAGE_TOKENS = 64
VOCABULARY = 6144
SPECIAL_TOKENS = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<image>", "<image_start>", "<image_end>"]
VIEWS = 2  # augmented copies of each image that questions may show instead
NOISE = 0.6  # largest move of the visual tokens of these copies, relative to a token's norm
STEPS = {"siglip": 1800, "language": 2000, "projector": 60, "full": 20_000, "autoencoder": 5000, "unet": 3500}
VISUALIZER = {"projector": VisualTokenProjector, "unet": GridUNet2DConditionModel, "scheduler": DDIMScheduler}
QUICK_STEPS = {"siglip": 3, "language": 3, "projector": 2, "full": 3, "autoencoder": 3, "unet": 3}


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


def build_processor(tasks: EmojiTasks) -> MetaMorphProcessor:
    image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_convert_rgb=True)
    return MetaMorphProcessor(image_processor, build_tokenizer(corpus(tasks)), num_image_tokens=NUM_IMAGE_TOKENS)


def build_model(
    processor: MetaMorphProcessor, tower: SiglipVisionModel, language_model: LlamaForCausalLM, seed: int = 0, **options
) -> MetaMorphForConditionalGeneration:
    """Join a vision tower and a language model by a new projector, visual queries and vision head.

    `options` are fields of the config.
    """
    torch.manual_seed(seed)
    tower.config.vision_use_head = False  # the pooling head serves the contrastive loss alone
    defaults = {
        "visual_decoding": "parallel",
        # The gradient of the cosine is small beside that of the cross-entropy; raised, it does not slow the text down.
        "visual_loss_weight": 4.0,
    }
    config = MetaMorphConfig(
        text_config=language_model.config,
        vision_config=tower.config,
        num_image_tokens=processor.num_image_tokens,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        **{**defaults, **options},
    )
    model = MetaMorphForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=False)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def encode_views(model: MetaMorphForConditionalGeneration, pixels: torch.Tensor, views: int) -> torch.Tensor:
    """Encode uint8 pixels as they are and augmented: visual tokens (1 + views, I, N, V), float16."""
    encoded = [encode_images(model, pixels).half()]
    for view in range(views):
        generator = torch.Generator().manual_seed(view)
        batches = tqdm(pixels.split(256), desc="encoding augmented images", leave=False)
        augmented = [augment(normalize(batch), generator)[0] for batch in batches]
        encoded.append(
            torch.cat([encode_images(model, ((batch + 1) * 127.5).round().byte()).half() for batch in augmented])
        )
    return torch.stack(encoded)


def show(views: torch.Tensor, number: int, image: int, task: str) -> torch.Tensor:
    """Return the visual tokens (N, V) of an image, out of (1 + VIEWS, images, N, V).

    Number 0 is the image as it is; any other is one of its views, an augmented one with noise of its own.
    """
    view = number % len(views)
    tokens = views[view, image].float()
    return add_token_noise(tokens[None], NOISE, torch.Generator().manual_seed(number))[0] if view else tokens


def find_look_alikes(visual_tokens: torch.Tensor) -> torch.Tensor:
    """Return (I,) bool: the fifth of (I, N, V) whose nearest other image, if not identical, is the nearest."""
    flat = F.normalize((visual_tokens.float() - visual_tokens.float().mean(0)).flatten(1), dim=1)
    similarity = flat @ flat.T
    nearest = similarity.masked_fill(similarity > 0.9999, -1).max(1).values
    return nearest > nearest.quantile(0.8)


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
    model.set_attn_implementation(ATTENTION)
    args = VPiTConfig(
        str(out),
        **TRAINING,
        stage=stage,
        max_steps=steps,
        per_device_train_batch_size=batch,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2 * steps // 3, "decay_type": "linear"},
        warmup_steps=max(1, steps // 25),
        max_length=480,
        activation_checkpointing=False,
        logging_steps=max(1, min(50, steps // 2)),
    )
    mixture = UNDERSTANDING if stage == "projector" else MIXTURE
    look_up = partial(show, views)
    stream = training_stream(tasks, mixture, steps * batch, batch, "visual_tokens", look_up, num_views=2**31)
    betas = (args.adam_beta1, args.adam_beta2)
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "betas": betas}
    optimizer = (lambda: MuonAdamW, options) if stage == "full" else None  # `Trainer` calls the first for the class
    trainer = VPiTTrainer(
        model, args, processing_class=processor, train_dataset=stream, optimizer_cls_and_kwargs=optimizer
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(out))
    model.config.use_cache = model.config.text_config.use_cache = True  # `Trainer` has turned it off
    model.save_pretrained(out / "final")


def choose_visualizer_images(tasks: EmojiTasks) -> list[int]:
    """Choose the images that the visualizer learns.

    Google's base images come three times as often, skin tones seldom, and Twitter's held-out images never.
    """
    rng, images = random.Random(6), []
    for i, row in enumerate(tasks.rows):
        if row["style"] == "twitter" and row["base"] in tasks.held_out_images:
            continue
        if row["skin_tone"] and (row["style"] != "google" or rng.random() < 0.5):
            continue
        images += [i] * (3 if i in tasks.crop_of else 1)
    scenes = rng.sample(range(len(tasks.scenes)), len(tasks.scenes) // 2)
    crops = rng.sample([*tasks.crop_of.values()], len(tasks.crop_of) // 4)
    return images + [len(tasks.rows) + scene for scene in scenes] + crops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EMOJI_CHECKPOINT, help="folder for the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji"), help="folder for unfinished steps")
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps, to see that it runs")
    args = parser.parse_args()
    steps, work = QUICK_STEPS if args.quick else STEPS, args.work
    tasks = EmojiTasks(load_rows(args.quick), **({"scenes": 40} if args.quick else {}))
    pixels, processor = load_images(tasks), build_processor(tasks)

    if not (work / "siglip" / "config.json").is_file():
        print("1/6 SigLIP")
        train_siglip(tasks, pixels, processor.tokenizer, work / "siglip", steps["siglip"], args.quick)
    if not (work / "language" / "config.json").is_file():
        print("2/6 Language model")
        train_language_model(tasks.words, processor.tokenizer, work / "language", steps["language"], args.quick)
    tower = SiglipModel.from_pretrained(work / "siglip").vision_model
    language_model = LlamaForCausalLM.from_pretrained(work / "language")
    model = build_model(processor, tower, language_model).to(DEVICE)

    chosen = choose_visualizer_images(tasks)[:: 10 if args.quick else 1]
    if not (work / "autoencoder" / "config.json").is_file():
        print("3/6 Autoencoder")
        autoencoder = train_autoencoder(pixels[chosen], work / "autoencoder", steps["autoencoder"], args.quick)
        autoencoder.save_pretrained(work / "autoencoder")
    autoencoder = PatchAutoencoder.from_pretrained(work / "autoencoder")
    if not (work / "visualizer" / "unet" / "config.json").is_file():
        print("4/6 Visualizer")
        data = (pixels[chosen], encode_images(model, pixels[chosen]).half())
        parts = train_visualizer(*data, autoencoder, work / "visualizer", steps["unet"], args.quick)
        for name, part in zip(VISUALIZER, parts):
            part.save_pretrained(work / "visualizer" / name)
    projector, unet, scheduler = (
        kind.from_pretrained(work / "visualizer" / name) for name, kind in VISUALIZER.items()
    )

    views = None
    for number, stage in enumerate(("projector", "full"), start=1):
        folder = work / f"stage{number}"
        if not (folder / "final").is_dir():
            print(f"{number + 4}/6 VPiT stage {number}")
            if views is None:
                views = encode_views(model, pixels, 1 if args.quick else VIEWS)
                # The differences between look-alikes are a small part of their tokens, and so of the loss.
                tasks.emphasis = (1 + find_look_alikes(views[0, tasks.bases]).float()).tolist()
            if not args.quick:  # it takes a minute, and nearly halves the time of a step on a CPU
                model.model.language_model.compile(dynamic=True)
            train_stage(stage, model, processor, tasks, views, folder, steps[stage], 4 if args.quick else 64)
        model = MetaMorphForConditionalGeneration.from_pretrained(folder / "final").to(DEVICE)

    defaults = {"default_num_inference_steps": 15, "default_guidance_scale": 1.5}
    pipeline = MetaMorphPipeline(model, processor, projector, unet, autoencoder, scheduler, **defaults)
    pipeline.to(dtype=torch.float16).save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
