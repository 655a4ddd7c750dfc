"""What tokenizers and their chat templates do differently: system messages, dates, marks, known words."""

from functools import cache

from support.files import UserError

PLAIN_TEMPLATE = (  # for a base model without a chat template: "input -> answer<eos>", one per line
    "{% for m in messages if m.content or m.role != 'system' %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}\n{% else %}{{ m.content }} ->{% endif %}"
    "{% endfor %}"
)


@cache
def takes_system_message(tokenizer) -> bool:
    """Some chat templates (Gemma's) refuse a system message."""
    try:
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": "x"}]
        return bool(fill_template(tokenizer, messages))
    except Exception:  # templates raise arbitrary exceptions
        return False


# some templates print the date; fix it, so that training and use agree (the default of Llama 3.1)
DAY = "26 Jul 2024"
FIXED_DAY = "{%- macro strftime_now(format) %}" + DAY + "{%- endmacro +%}"


def fill_template(tokenizer, messages: list[dict], **settings) -> str:
    """The text that the chat template makes of messages."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = FIXED_DAY + template
    settings |= dict(chat_template=template, date_string=DAY, enable_thinking=False, tokenize=False)
    return tokenizer.apply_chat_template(messages, **settings)


@cache
def around_answer(tokenizer) -> tuple[str, str]:
    """What the template writes between a prompt and an answer (gpt-oss: its channel), and after it.

    ("", "") if it does not put answers where it asks for them.
    """
    messages = [{"role": "user", "content": "x"}]
    try:
        prompt = fill_template(tokenizer, messages, add_generation_prompt=True)
        whole = fill_template(tokenizer, [*messages, {"role": "assistant", "content": "<<>>"}])
    except Exception:  # templates raise arbitrary exceptions
        return "", ""
    before, _, after = whole.removeprefix(prompt).partition("<<>>")
    return (before.rstrip(), after) if whole.startswith(prompt) else ("", "")


def check_known(tokenizer, texts: list[str]) -> None:
    """Raise UserError for words that the tokenizer has no token for (the tiny one knows few)."""
    if tokenizer.unk_token_id is None:
        return
    words = sorted({word for text in texts for word in text.split()})
    if tokenizer.unk_token_id not in tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]:
        return
    unknown = [word for word in words if tokenizer.unk_token_id in tokenizer(word)["input_ids"]]
    if unknown:
        some = ", ".join(unknown[:20]) + (", ..." if len(unknown) > 20 else "")
        known = ", ".join(tokenizer.convert_ids_to_tokens(range(20, 120, 20)))
        message = f"the base model has no token for {some}; it knows words such as {known}"
        raise UserError(f"{message} (all those of the tiny one: tasks/tiny.json)")
