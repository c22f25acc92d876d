"""Chat templates: that of the released code, and any language model's own with images and generation marks."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase


TEXT, METAMORPH, FLATTEN, MARK_TURNS = (
    (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("text", "metamorph", "flatten", "mark_turns")
)
METAMORPH_CHAT_TEMPLATE = TEXT + METAMORPH
METAMORPH_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def extend_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Extend the tokenizer's chat template by images in any turn and `{% generation %}` marks around answers.

    TRL's training template is used where TRL has one for this model. Any other template is rendered turn by turn.
    """
    from trl.chat_template_utils import get_training_chat_template

    if tokenizer.chat_template is None:
        raise ValueError("This tokenizer has no chat template: use --chat-format default or metamorph.")
    tokenizer.chat_template = tokenizer.get_chat_template()  # the default one where there are several
    try:
        return TEXT + FLATTEN + (get_training_chat_template(tokenizer) or tokenizer.chat_template)
    except ValueError:  # TRL does not know this template.
        template = TEXT + FLATTEN + MARK_TURNS.replace("<template>", tokenizer.chat_template)
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
