"""What chat templates do differently: with system messages, dates, and marks before and after an answer."""

from functools import cache

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
def answer_start(tokenizer) -> str:
    """The marks that some templates write before an answer and do not ask for, as gpt-oss its channel."""
    messages = [{"role": "user", "content": "x"}]
    prompt = fill_template(tokenizer, messages, add_generation_prompt=True)
    whole = fill_template(tokenizer, [*messages, {"role": "assistant", "content": "<<>>"}])
    return whole.removeprefix(prompt).partition("<<>>")[0].rstrip() if whole.startswith(prompt) else ""
