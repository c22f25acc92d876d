"""Step 2 of the emoji recipe: a small Llama learns from sentences that define words."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from metamorph_hf.vpit.trainer import last_complete_checkpoint

from .siglip import ATTENTION, TRAINING


BLOCK_SIZE = 128  # tokens
BATCH_SIZE = 32

Sentences = Callable[[random.Random], Iterable[str]]


def build_language_model(
    tokenizer: PreTrainedTokenizerFast, quick: bool, width: int = 256, depth: int = 6
) -> LlamaForCausalLM:
    """Build a Llama, by default of 6.7 M parameters."""
    width, depth = (32, 2) if quick else (width, depth)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # At the default of 0.02, which suits far wider models, this one learns half as fast.
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def make_blocks(sentences: Sentences, tokenizer: PreTrainedTokenizerFast, count: int) -> Dataset:
    """Tokenize the sentences, in another order and wording in each pass, into `count` blocks of equal length."""
    rng, ids = random.Random(5), []
    while len(ids) < count * BLOCK_SIZE:
        for sentence in tokenizer([*sentences(rng)], add_special_tokens=False)["input_ids"]:
            ids += [*sentence, tokenizer.eos_token_id]
    blocks = [ids[start : start + BLOCK_SIZE] for start in range(0, count * BLOCK_SIZE, BLOCK_SIZE)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def train_language_model(
    sentences: Sentences,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    steps: int,
    quick: bool,
    start: Path | None = None,
) -> None:
    """
    Train a new language model, or the one in `start`, and save it in `out`; continue from a checkpoint in `out`.

    `sentences` yields all sentences in random order, at each call in another one.
    """
    torch.manual_seed(0)
    model = build_language_model(tokenizer, quick) if start is None else LlamaForCausalLM.from_pretrained(start)
    model.set_attn_implementation(ATTENTION)
    if not quick:  # it takes a minute, and saves a third of the time of a step on a CPU
        model.compile()
    args = TrainingArguments(
        str(out),
        **TRAINING,
        max_steps=steps,
        per_device_train_batch_size=4 if quick else BATCH_SIZE,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=50,
    )
    blocks = make_blocks(sentences, tokenizer, steps * (4 if quick else BATCH_SIZE))
    trainer = Trainer(model, args, train_dataset=blocks)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(out))
    model.config.use_cache = True  # `Trainer` has turned it off
    model.eval().save_pretrained(out)
