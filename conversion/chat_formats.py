"""Chat templates: that of the released code, and any language model's own with images and generation marks."""

from transformers import PreTrainedTokenizerBase


# Render the content of a message: text stays as it is, an image becomes `<image>`.
RENDER_CONTENT = """\
{%- macro metamorph_text(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content is not none -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception('This chat format knows text and images only, not ' ~ part['type'] ~ '.') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# Sequences begin with two BOS tokens: the released template writes one, and its tokenizer adds another.
METAMORPH_CHAT_TEMPLATE = (
    RENDER_CONTENT
    + """\
{{- bos_token + bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ('user', 'assistant') -%}
{{- raise_exception('The released chat format has user and assistant turns only, not ' ~ message['role'] ~ '.') -}}
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

# A language model's own template may expect contents to be strings, so they become strings first.
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

# Render the template turn by turn: an assistant turn is the text that it adds to its generation prompt.
MARK_ASSISTANT_TURNS = """\
{%- macro metamorph_render(messages, add_generation_prompt) -%}
<template>
{%- endmacro -%}
{%- macro metamorph_rest(whole) -%}
{%- if not whole.startswith(metamorph.text) -%}
{{- raise_exception('it changes earlier turns when later ones follow') -}}
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
    """Extend the tokenizer's chat template by images in any turn and `{% generation %}` marks around answers.

    TRL's training template is used where TRL has one for this model. Any other template is rendered turn by turn.

    Raises:
        ValueError: If there is no chat template, or neither TRL nor rendering by turns can extend it.
    """
    from trl.chat_template_utils import get_training_chat_template

    if tokenizer.chat_template is None:
        raise ValueError("This tokenizer has no chat template: use --chat-format default or metamorph.")
    tokenizer.chat_template = tokenizer.get_chat_template()  # the default one where there are several
    try:
        return FLATTEN_MESSAGES + (get_training_chat_template(tokenizer) or tokenizer.chat_template)
    except ValueError:  # TRL does not know this template.
        template = FLATTEN_MESSAGES + MARK_ASSISTANT_TURNS.replace("<template>", tokenizer.chat_template)
    texts = ["One?", "Two.", "Three?", "Four."]
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]
    expected = tokenizer.apply_chat_template(turns, tokenize=False)
    if lost := [text for text in texts if text not in expected]:
        raise ValueError(f"This chat template leaves out the text {lost[0]!r}: use --chat-format default.")
    try:
        found = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
    except Exception as error:  # Templates raise errors of any class.
        raise ValueError(f"This chat template cannot be rendered turn by turn: {error}.") from error
    if found != expected:
        raise ValueError(f"Rendered turn by turn, this chat template gives {found!r} instead of {expected!r}.")
    return template
