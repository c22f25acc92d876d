"""What a repository of a MetaMorph says of itself: which parts it was made of, and how to use it."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .configuration_metamorph import MetaMorphConfig


CARD = """---
{metadata}
---

# {title}

A [MetaMorph](https://arxiv.org/abs/2412.14164) model: one autoregressive model of text and continuous visual tokens.
It reads and draws images; each is {num_image_tokens} visual tokens, {visual_token_dim} wide.

| part | comes from | type | width |
|---|---|---|---|
| language model | {llm} | {llm_type} | {llm_width} |
| vision tower | {tower} | {tower_type} | {tower_width} |

Projector (`{projector}`) and vision head (`{head}`) join the two.

## How to use it

With the package `metamorph_hf` installed, or else `trust_remote_code=True` in both calls of `from_pretrained`:

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
print(output.visual_tokens)  # per row, the images it drew: (images, {num_image_tokens}, {visual_token_dim})
```

Questions about an image: add `{{"type": "image", "image": picture}}` to the content. Visual tokens become pixels in a
`MetaMorphPipeline`, whose U-Net was trained for this vision tower.
"""


def create_model_card(config: MetaMorphConfig, name: str, tags: Iterable[str] = ()) -> ModelCard:
    """
    The card that `push_to_hub` writes where there is none.

    Args:
        config ([`MetaMorphConfig`]): Its sub-configurations' `name_or_path` say what the parts were made of.
        name (`str`): What users load the model by, such as `"user/model"`.
        tags (`Iterable[str]`): More tags.
    """
    sources = [config.text_config.name_or_path, config.vision_config.name_or_path]
    base_models = [source for source in sources if _is_repository(source)]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=list(dict.fromkeys(["metamorph", "image-text-to-text", "text-to-image", *tags])),
        base_model=base_models or None,
    )
    llm, tower = (
        f"[{source}](https://huggingface.co/{source})"
        if _is_repository(source)
        else Path(source).name or "not recorded"
        for source in sources
    )
    return ModelCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            title=Path(name).name,
            name=name,
            num_image_tokens=config.num_image_tokens,
            visual_token_dim=config.visual_token_dim,
            llm=llm,
            llm_type=config.text_config.model_type,
            llm_width=config.text_config.hidden_size,
            tower=tower,
            tower_type=config.vision_config.model_type,
            tower_width=config.vision_config.hidden_size,
            projector=config.projector_type,
            head=config.vision_head_type,
        )
    )


def _is_repository(name: str) -> bool:
    """`user/model`, and no folder of this machine, whose path is nobody's business."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


__all__ = ["create_model_card"]
