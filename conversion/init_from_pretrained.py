"""Make a fresh MetaMorph from any causal language model and any vision encoder with a square patch grid.

    python conversion/init_from_pretrained.py --llm HuggingFaceTB/SmolLM2-135M-Instruct \\
        --vision-tower google/siglip-so400m-patch14-384 DST

The language model answers text as before. Projector and vision head are random: train them, stage 1 first.
"""

import argparse
from pathlib import Path

import torch
from chat_formats import METAMORPH_CHAT_TEMPLATE, extend_chat_template
from common import (
    DTYPES,
    ConversionError,
    check_forward,
    check_target,
    load_whole,
    prepare_tokenizer,
    print_table,
    run,
    size_of,
    whole_folder,
)
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration, MetaMorphProcessor
from metamorph_hf.model_cards import create_model_card
from metamorph_hf.processing_metamorph import DEFAULT_CHAT_TEMPLATE


IMAGE_TOKENS = ("<image_start>", "<image_end>", "<image>")


def add_image_tokens(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the tokenizer and the model the three image tokens; returns their ids.

    New rows, input and output, are the mean of the rows that the tokenizer uses: many models have more rows than
    tokens, and those were never trained (the released code takes the mean, too).
    """
    rows = llm.get_input_embeddings().weight.shape[0]
    used = [id for id in tokenizer.get_vocab().values() if id < rows]
    unknown = [token for token in IMAGE_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": unknown}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    new = set(tokenizer.get_vocab().values()) - set(used)
    if max(new, default=0) >= rows:
        llm.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    with torch.no_grad():
        for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            module.weight[sorted(new)] = module.weight[used].float().mean(0).to(module.weight.dtype)
    return ids


def load_llm(name: str, gguf_file: str | None, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    llm = load_whole(AutoModelForCausalLM, name, dtype=dtype, **source).eval()
    if gguf_file is not None:
        del llm.config.quantization_config  # its weights were dequantised, and can be trained
    elif hasattr(llm.config, "quantization_config"):
        raise ConversionError(f"The weights of {name} are quantised: name the model that they were made from.")
    head = llm.get_output_embeddings()
    if head is None:
        raise ConversionError(f"{name} is a {type(llm).__name__} without output embeddings: it cannot predict tokens.")
    if llm.config.get_text_config() is not llm.config:
        raise ConversionError(
            f"{name} is a {type(llm).__name__}, which has more than a language model: name one that has text alone."
        )
    # A scale or cap of the logits; small ones would slip through the comparison of `join`.
    changed = [n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(llm.config, n, None)]
    if any(getattr(llm.config, n) != 1 for n in changed):
        raise ConversionError(
            f"{name} ({type(llm).__name__}) does more than a matrix product after its last layer "
            f"({', '.join(changed)}), which MetaMorph does not: its logits would be wrong. Choose another one."
        )
    if head.bias is not None:
        raise ConversionError(
            f"The lm_head of {name} ({type(llm).__name__}) has a bias, which MetaMorph's has not: it would be lost."
        )
    return llm, AutoTokenizer.from_pretrained(name, **source)


def load_tower(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A vision encoder, or the one of a model that has more (CLIP, SigLIP, a MetaMorph)."""
    config = AutoConfig.from_pretrained(name)
    if isinstance(config, MetaMorphConfig):
        return load_whole(MetaMorphForConditionalGeneration, name, dtype=dtype).model.vision_tower
    config = getattr(config, "vision_config", config)
    for needed in ("hidden_size", "patch_size", "image_size"):
        if not isinstance(getattr(config, needed, None), int):
            raise ConversionError(
                f"{name} ({config.model_type}) has no {needed} that is one number: a MetaMorph needs a vision encoder "
                "with a square patch grid, such as SigLIP, SigLIP 2 of a fixed resolution, CLIP or DINOv2."
            )
    config.tie_last_hidden_states = False
    config.name_or_path = name  # also of a tower taken out of a larger model
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False  # nobody reads what it pools
    return load_whole(type(AutoModel.from_config(config)), name, config=config, dtype=dtype)


def build_processor(
    image_processor, tokenizer: PreTrainedTokenizerBase, num_image_tokens: int, chat_format: str
) -> MetaMorphProcessor:
    if chat_format == "auto":
        chat_format = "default" if tokenizer.chat_template is None else "own"
    prepare_tokenizer(tokenizer, chat_format)
    template = {
        "own": lambda: extend_chat_template(tokenizer),
        "default": lambda: DEFAULT_CHAT_TEMPLATE,
        "metamorph": lambda: METAMORPH_CHAT_TEMPLATE,
    }[chat_format]()
    return MetaMorphProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens, chat_template=template)


def join(
    llm: PreTrainedModel, tower: PreTrainedModel, image_ids: list[int], **config
) -> MetaMorphForConditionalGeneration:
    """The language model and the tower in a MetaMorph with a random projector and vision head.

    Raises:
        ConversionError: if it does not give the language model's own logits.
    """
    image_start_token_id, image_end_token_id, image_token_id = image_ids
    config = MetaMorphConfig(
        text_config=llm.config,
        vision_config=tower.config,
        image_start_token_id=image_start_token_id,
        image_end_token_id=image_end_token_id,
        image_token_id=image_token_id,
        tie_word_embeddings=llm.config.tie_word_embeddings,
        **config,
    )
    # Not `.to(dtype)`, which would round the rotary frequencies, too.
    model = MetaMorphForConditionalGeneration._from_config(config, dtype=llm.dtype).eval()
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config = llm.generation_config

    ids = torch.arange(16).unsqueeze(0) % llm.config.vocab_size
    with torch.no_grad():
        expected, found = llm(input_ids=ids).logits.float(), model(input_ids=ids).logits.float()
    if (expected - found).abs().max() > 1e-3 * expected.abs().max():
        raise ConversionError(
            f"{type(llm).__name__} does more than a matrix product after its last layer (a logit scale, a soft cap), "
            "which MetaMorph does not: its logits would be wrong. Choose another language model."
        )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--llm", metavar="P", required=True, help="folder or repository of a causal language model")
    parser.add_argument("--gguf-file", metavar="F", help="a GGUF file in --llm to read the language model from")
    parser.add_argument("--vision-tower", metavar="P", required=True, help="folder or repository of a vision encoder")
    parser.add_argument(
        "--image-processor", metavar="P", help="folder or repository of its image processor (default: --vision-tower)"
    )
    parser.add_argument("--num-image-tokens", metavar="N", type=int, default=64, help="a square number (default: 64)")
    parser.add_argument(
        "--token-reduction",
        choices=("interpolation", "concat_interpolation"),
        default="interpolation",
        help="how patches become visual tokens (default: interpolation)",
    )
    parser.add_argument(
        "--projector", metavar="TYPE", default="mlp2x_gelu", help="linear or mlpNx_gelu (default: mlp2x_gelu)"
    )
    parser.add_argument(
        "--vision-head", choices=("linear", "mlp", "mlp2x_gelu"), default="mlp", help="1, 2 or 3 layers (default: mlp)"
    )
    parser.add_argument(
        "--chat-format",
        choices=("auto", "own", "default", "metamorph"),
        default="auto",
        help="own: the language model's, extended by images; metamorph: the released code's, for Llama 3; "
        "default: a plain one; auto: own if there is one (default: auto)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the written weights (default: bfloat16)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random projector and vision head (default: 0)")
    args = parser.parse_args()

    check_target(args.target, args.llm, args.vision_tower)
    torch.manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    with whole_folder(args.target) as folder:
        llm, tokenizer = load_llm(args.llm, args.gguf_file, dtype)
        tower = load_tower(args.vision_tower, dtype)
        image_ids = add_image_tokens(llm, tokenizer)
        processor = build_processor(
            AutoImageProcessor.from_pretrained(args.image_processor or args.vision_tower),
            tokenizer,
            args.num_image_tokens,
            args.chat_format,
        )
        model = join(
            llm,
            tower,
            image_ids,
            num_image_tokens=args.num_image_tokens,
            token_reduction=args.token_reduction,
            projector_type=args.projector,
            vision_head_type=args.vision_head,
        )
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        pixels = processor.image_processor(Image.new("RGB", (64, 48)), return_tensors="pt").pixel_values
        if pixels.shape[-1] != pixels.shape[-2]:
            raise ConversionError(
                f"The image processor of {args.vision_tower} gives pictures of {tuple(pixels.shape[-2:])} pixels, "
                "which is no square: choose one whose pictures are."
            )
        model.get_visual_tokens(pixels)
        model.save_pretrained(folder)
        create_model_card(model.config, args.target.name).save(folder / "README.md")
        processor.save_pretrained(folder)
        seen = check_forward(folder, on_disk=False)
    counts = {
        "language model": model.model.language_model,
        "vision tower": model.model.vision_tower,
        "projector (random)": model.model.projector,
        "vision head (random)": model.vision_head,
    }
    side = pixels.shape[-1] // tower.config.patch_size
    print_table(
        {
            "tensors": len(model.state_dict()),
            **{
                f"{name} parameters": f"{sum(p.numel() for p in part.parameters()):,}" for name, part in counts.items()
            },
            "visual tokens": f"{side}x{side} patches to {args.num_image_tokens}, {model.config.visual_token_dim} wide",
            "image token ids": ", ".join(f"{token} {id}" for token, id in zip(IMAGE_TOKENS, image_ids)),
            "dead keys": "the tower's pooling head" if tower.config.model_type == "siglip_vision_model" else "none",
            "dtype": args.dtype,
            "loaded again": seen,
            "target": f"{args.target}, {size_of(args.target)}",
        }
    )


if __name__ == "__main__":
    run(main)
