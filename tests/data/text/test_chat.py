"""Chat templates as open models have them, in small: every part of each, and what cannot be asked."""

import datetime

import pytest
from transformers import PreTrainedTokenizerFast

from brewjax.data.text.chat import Chat, ChatTemplate, chat_parts
from brewjax.data.text.tokenizer import Tokenizer

USUAL = ChatTemplate()
REFUSES_SYSTEM = """\
{%- if messages[0].role == 'system' %}{{ raise_exception('only user and assistant') }}{% endif -%}
{%- for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"""
# Mistral's of 2024: what the system says stands before the user's last turn.
LAST_TURN = """\
{%- if messages[0].role == 'system' %}{% set said, turns = messages[0].content, messages[1:] %}\
{% else %}{% set said, turns = '', messages %}{% endif -%}
{%- for m in turns %}{% if m.role == 'user' %}\
[INST]{% if loop.last and said %}{{ said }} {% endif %}{{ m.content }}[/INST]\
{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"""
DROPS_SYSTEM = """\
{%- for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""
QWEN3 = """\
{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
{%- if add_generation_prompt %}<|im_start|>assistant\n\
{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"""
LLAMA32 = """\
{%- for m in messages %}{% if loop.first %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}\
<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
ALWAYS_THINKS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant><think>\n"
UPSIDE_DOWN = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"


def with_template(template: str) -> Tokenizer:
    backend = Tokenizer.byte_level().hf.backend_tokenizer
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template))


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, LAST_TURN])
def test_where_there_is_no_system_its_text_is_the_users(template):
    space = " " if template is REFUSES_SYSTEM else ""
    parts = chat_parts(with_template(template), USUAL)
    assert parts == Chat(f"[INST]{space}", "\n\n", f"{space}[/INST]", " ", f"</s>[INST]{space}")


def test_a_system_that_is_dropped_is_not_lost():
    assert chat_parts(with_template(DROPS_SYSTEM), USUAL) == Chat("<user>", "\n\n", "\n<assistant>", "", "\n<user>")


def test_an_answer_is_read_where_it_is_asked_for_and_not_where_thinking_begins():
    tokenizer = with_template(QWEN3)
    empty = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat_parts(tokenizer, USUAL).assistant == empty
    thinks = ChatTemplate(arguments={"enable_thinking": True})
    assert chat_parts(tokenizer, thinks).assistant == empty.split("<think>")[0]
    with pytest.raises(ValueError, match=r"lets the assistant think before it answers \('<assistant><think>'\)"):
        chat_parts(with_template(ALWAYS_THINKS), USUAL)


def test_the_date_is_a_setting():
    tokenizer = with_template(LLAMA32)
    assert chat_parts(tokenizer, USUAL).begin == "Today: 26 Jul 2024\n<system>"
    later = ChatTemplate(date=datetime.date(2030, 1, 2))
    assert chat_parts(tokenizer, later).begin == "Today: 02 Jan 2030\n<system>"
    assert ChatTemplate.parse("date: 2030-01-02") == later


def test_arguments_reach_the_template():
    tokenizer = with_template("{{ greeting }}" + QWEN3)
    assert chat_parts(tokenizer, ChatTemplate(arguments={"greeting": "Hi\n"})).begin == "Hi\n<|im_start|>system\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (UPSIDE_DOWN, "does not render the turns of user, assistant, user once each and in order"),
        ("{{ raise_exception('not for you') }}", "cannot render the turns of user, assistant, user: not for you"),
        ("{% for m in messages %}", "cannot render the turns of user, assistant, user: Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "cannot render the turns of user, assistant, user: can only concatenate str"),
    ],
)
def test_a_template_that_cannot_render_the_turns_is_refused(template, message):
    with pytest.raises(ValueError, match=f"its chat template {message}"):
        chat_parts(with_template(template), USUAL)
