"""Chat templates: the released code's, and any language model's own with images in all turns and generation marks."""

from transformers import PreTrainedTokenizerBase


# A turn's text: strings stay, images become `<image>`.
RENDER_CONTENT = """\
{%- macro metamorph_text(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# One newline after the header, and two times BOS: the released code wrote one, its tokenizer added another.
METAMORPH_CHAT_TEMPLATE = (
    RENDER_CONTENT
    + """\
{{- bos_token + bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ('user', 'assistant') -%}
{{- raise_exception('The released chat format has user and assistant turns only, not ' + message['role'] + '.') -}}
{%- endif -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- metamorph_text(message['content']) + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}{{- metamorph_text(message['content']) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n' -}}{%- endif -%}
"""
)
METAMORPH_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Contents become strings before the model's own template, which may know strings only, sees them.
FLATTEN_MESSAGES = (
    RENDER_CONTENT
    + """\
{%- set metamorph = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- set metamorph.messages = metamorph.messages + [dict(message, content=metamorph_text(message['content']))] -%}
{%- endfor -%}
{%- set messages = metamorph.messages -%}
"""
)

# The model's own template, rendered turn by turn: an assistant turn is what it adds to its generation prompt.
MARK_ASSISTANT_TURNS = """\
{%- macro metamorph_render(messages, add_generation_prompt) -%}
<template>
{%- endmacro -%}
{%- macro metamorph_rest(whole) -%}
{%- if not whole.startswith(metamorph.text) -%}
{{- raise_exception('This chat template changes earlier turns when later ones follow: turns cannot be told apart.') -}}
{%- endif -%}
{{- whole[metamorph.text | length:] -}}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set prompt = metamorph_render(messages[:loop.index0], true) -%}
{{- metamorph_rest(prompt) -}}
{%- set metamorph.text = prompt -%}
{%- set whole = metamorph_render(messages[:loop.index], false) -%}
{%- set turn = metamorph_rest(whole) -%}
{%- generation -%}{{- turn.rstrip() -}}{%- endgeneration -%}
{{- turn[turn.rstrip() | length:] -}}
{%- set metamorph.text = whole -%}
{%- endif -%}
{%- endfor -%}
{%- if not messages or messages[-1]['role'] != 'assistant' or add_generation_prompt -%}
{{- metamorph_rest(metamorph_render(messages, add_generation_prompt)) -}}
{%- endif -%}
"""


def extend_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own chat template, with images in any turn and `{% generation %}` marks around what is learned.

    TRL's training template is taken where TRL knows the model's. Any other is rendered turn by turn.

    Raises:
        ValueError: if there is no chat template, or TRL does not know it and it cannot be rendered turn by turn.
    """
    from trl.chat_template_utils import get_training_chat_template

    if tokenizer.chat_template is None:
        raise ValueError("This tokenizer has no chat template: use --chat-format default or metamorph.")
    try:
        trained = get_training_chat_template(tokenizer) or tokenizer.chat_template
        return FLATTEN_MESSAGES + trained
    except ValueError:  # TRL does not know this template
        template = FLATTEN_MESSAGES + MARK_ASSISTANT_TURNS.replace("<template>", tokenizer.chat_template)
    conversation = [
        {"role": role, "content": text}
        for role, text in (("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four."))
    ]
    expected = tokenizer.apply_chat_template(conversation, tokenize=False)
    if lost := [turn["content"] for turn in conversation if turn["content"] not in expected]:
        raise ValueError(
            f"This chat template leaves out the text {lost[0]!r} (it may read contents as lists only): use "
            "--chat-format default."
        )
    try:
        found = tokenizer.apply_chat_template(conversation, tokenize=False, chat_template=template)
    except Exception as error:
        raise ValueError(f"This chat template cannot be rendered turn by turn: {error}") from error
    if found != expected:
        raise ValueError(f"Rendered turn by turn, this chat template gives {found!r} instead of {expected!r}.")
    return template
