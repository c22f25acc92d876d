"""Model card of a MetaMorph: the parts it was made of, and how to use it."""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig


CARD = """---
{metadata}
---

# {title}

A [MetaMorph](https://arxiv.org/abs/2412.14164) model: one autoregressive model of text and continuous visual tokens.
It reads and generates images; each is {config.num_image_tokens} visual tokens of width {config.visual_token_dim}.

| part | comes from | type | width |
|---|---|---|---|
| language model | {llm} | {config.text_config.model_type} | {config.text_config.hidden_size} |
| vision tower | {tower} | {config.vision_config.model_type} | {config.vision_config.hidden_size} |

Projector (`{config.projector_type}`) and vision head (`{config.vision_head_type}`) join the two.

## How to use it

Install the package `metamorph_hf`, or pass `trust_remote_code=True` to both calls of `from_pretrained`:

```python
import metamorph_hf
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")

messages = [{{"role": "user", "content": [{{"type": "text", "text": "Generate an image of a red apple."}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
print(processor.decode_generated(output.sequences[:, inputs["input_ids"].shape[1] :]))
print(output.visual_tokens)  # for each row: (images, {config.num_image_tokens}, {config.visual_token_dim})
```

To ask about an image, add `{{"type": "image", "image": image}}` to the content. To decode visual tokens into an image,
use a `MetaMorphPipeline` whose U-Net was trained for this vision tower.
"""


def create_model_card(config: PreTrainedConfig, name: str, tags: Iterable[str] = ()) -> ModelCard:
    """
    Create the card of a model that is loaded by `name`, such as `"user/model"`, with further `tags`. Where its parts
    came from is the `name_or_path` of the sub-configurations.
    """
    sources = [config.text_config.name_or_path, config.vision_config.name_or_path]
    # A local path must not be published.
    is_repository = re.compile(r"\w[\w.-]*/\w[\w.-]*").fullmatch
    repositories = [source for source in sources if is_repository(source) and not Path(source).exists()]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=list(dict.fromkeys(["metamorph", "image-text-to-text", "text-to-image", *tags])),
        base_model=repositories or None,
    )
    llm, tower = (
        f"[{source}](https://huggingface.co/{source})"
        if source in repositories
        else Path(source).name or "not recorded"
        for source in sources
    )
    text = CARD.format(
        metadata=metadata.to_yaml(), title=Path(name).name, name=name, config=config, llm=llm, tower=tower
    )
    return ModelCard(text)
