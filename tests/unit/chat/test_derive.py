"""MLC's form of each family's chat template, against transformers' prompts of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_chat import FAMILIES, MISTRAL1, QWEN2, Conversation, cpp_prompt, family, write_chat_model
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from awq_compile.chat.derive import DEFAULT_SYSTEM, Derived
from awq_compile.chat.select import select_template
from awq_compile.errors import ModelError
from awq_compile.models.config import read_config

TURNS: Conversation = [
    ("user", "What is 2+2?"),
    ("assistant", "4, i.e. \"four\"\n\n\tand 'vier' ✓"),
    ("user", "¿Por qué? {user_message}"),
    ("assistant", ""),
    ("user", "再见 {{ x }} <|no|>"),
]
SYSTEM = ("system", "Answer in rhymes.\nÄlways. {system_message}")
NO_DEFAULT = "without a system message"
TRIMS = "trims white space"

# family → the beginnings of the notes that are expected
NOTES = {
    "llama-2": [NO_DEFAULT, "the model's own template trims white space around messages (user, assistant)"],
    "llama-3": [NO_DEFAULT, "the model's own template trims white space around messages (system, user, assistant)"],
    "llama-3.1": ["the model's own template trims", "the model's own template writes today's date"],
    "mistral-0.1": ["MLC puts a system message before the first role"],
    "mistral-0.2": [NO_DEFAULT],
    "mistral-0.3": ["MLC puts a system message before the first role"],
    "qwen2": [],
    "qwen3": [NO_DEFAULT],
}


def derived(folder: Path) -> Derived:
    return select_template(folder, read_config(folder))


def oracle(folder: Path) -> Any:
    """transformers' tokenizer of a model."""
    return AutoTokenizer.from_pretrained(str(folder))


def hf(tokenizer: Any, messages: Conversation, *, tokenize: bool = False) -> Any:
    """transformers' prompt, with the date that the Llama 3.1 template falls back to."""
    said = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(
        said, tokenize=tokenize, add_generation_prompt=True, date_string="26 Jul 2024", return_dict=False
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Text and tokens of one to three turns, with and without a system message, by the rules of both MLC's engines."""
    folder = family(tmp_path / "m", name)
    found = derived(folder)
    template, tokenizer = found.template, oracle(folder)
    assert [note[: len(start)] for note, start in zip(found.notes, NOTES[name], strict=True)] == NOTES[name]
    default = any(note.startswith(NO_DEFAULT) for note in found.notes)
    takes_system = not any("before the first role" in note for note in found.notes)
    begin = tokenizer.bos_token if template.system_prefix_token_ids else ""
    for turns in (1, 3, 5):
        for before in ([], [SYSTEM]) if takes_system else ([],):
            messages = [*before, *TURNS[:turns]]
            same = messages if before or not default else [("system", DEFAULT_SYSTEM), *messages]
            prompt = template.prompt(messages)
            assert begin + prompt == hf(tokenizer, same)
            assert cpp_prompt(template.to_json(), messages) == prompt
            ids = [*template.system_prefix_token_ids, *tokenizer.encode(prompt, add_special_tokens=False)]
            assert ids == hf(tokenizer, same, tokenize=True)


@pytest.mark.parametrize(
    ("name", "stops"),
    [("llama-2", ["</s>"]), ("llama-3", ["<|end_of_text|>", "<|eot_id|>"]), ("qwen2", ["<|im_end|>"])],
)
def test_stop_tokens(tmp_path: Path, name: str, stops: list[str]) -> None:
    """The model's end token and the one that ends a turn, as ids, and the turn's as text."""
    folder = family(tmp_path / "m", name)
    template, tokenizer = derived(folder).template, oracle(folder)
    assert list(template.stop_token_ids) == tokenizer.convert_tokens_to_ids(stops)
    assert list(template.stop_str) == stops[-1:]


def test_end_tokens_of_all_three_files(tmp_path: Path) -> None:
    """generation_config.json first, then config.json, then the tokenizer's."""
    folder = write_chat_model(tmp_path / "m", None, ("", "<|end|>"), eos_token_id=[7, 5])
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert list(derived(folder).template.stop_token_ids) == [9, 7, 5, 4096]
    (folder / "generation_config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(ModelError, match=r"eos_token_id: 99999 is outside the vocabulary of 4097"):
        derived(folder)


def test_fields_are_as_people_write_them(tmp_path: Path) -> None:
    """For ChatML and Llama 3 the cuts fall where MLC's own templates have them."""
    chatml = derived(family(tmp_path / "a", "qwen2")).template
    assert chatml.roles == {"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"}
    assert (chatml.seps, chatml.role_content_sep, chatml.role_empty_sep) == (("<|im_end|>\n",), "\n", "\n")
    assert chatml.system_template == "<|im_start|>system\n{system_message}<|im_end|>\n"
    assert chatml.system_message == "You are a helpful assistant."
    llama = derived(family(tmp_path / "b", "llama-3")).template
    assert llama.roles["user"] == "<|start_header_id|>user"
    assert (llama.seps, llama.role_content_sep) == (("<|eot_id|>",), "<|end_header_id|>\n\n")
    assert llama.system_prefix_token_ids == (0,)


def test_reasoning_of_earlier_answers_goes(tmp_path: Path) -> None:
    """Qwen3's template drops it, Qwen2's keeps it, and so does MLC's form."""
    messages: Conversation = [SYSTEM, ("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c")]
    for name, strips in (("qwen3", True), ("qwen2", False)):
        folder = family(tmp_path / name, name)
        template = derived(folder).template
        assert template.strip_reasoning_in_history is strips
        assert template.prompt(messages) == hf(oracle(folder), messages) == cpp_prompt(template.to_json(), messages)


def test_an_answer_may_begin_otherwise_than_it_is_asked_for(tmp_path: Path) -> None:
    """One template opens <think> for the next answer, one writes earlier answers with a prefix of their own."""
    for name, template in {
        "opens": QWEN2.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"),
        "prefix": QWEN2.replace("m.content", "('> ' if m.role == 'assistant' else '') + m.content"),
    }.items():
        folder = write_chat_model(tmp_path / name, template, FAMILIES["qwen2"][1])
        found = derived(folder).template
        for messages in (TURNS, [SYSTEM, *TURNS]):
            assert found.prompt(messages) == hf(oracle(folder), messages) == cpp_prompt(found.to_json(), messages)


def test_begin_tokens_that_only_text_can_give(tmp_path: Path) -> None:
    """Where a begin token as id and the text after it tokenise otherwise than together, it stays text."""
    folder = write_chat_model(tmp_path / "m", MISTRAL1, ("<s>", "</s>"))
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    first = pre_tokenizers.Metaspace(prepend_scheme="first")  # a space before the text's first word alone
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.save(path)
    found = derived(folder).template
    assert found.system_prefix_token_ids == () and found.prompt(TURNS) == hf(oracle(folder), TURNS)


REFUSED = {
    "numbers the turns": "{% for m in messages %}[{{ m.role }} {{ loop.index }}] {{ m.content }}\n{% endfor %}",
    "shouts": "{% for m in messages %}<{{ m.role }}> {{ m.content | upper }}\n{% endfor %}",
    "repeats": "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ m.content }}\n{% endfor %}",
    "squeezes": "{% for m in messages %}<{{ m.role }}> {{ m.content.split() | join(' ') }}\n{% endfor %}<assistant>",
    "marks line ends": "{% for m in messages %}<{{ m.role }}>{{ m.content | replace(' \n', '¶') }}|{% endfor %}<ai>",
    "has no place for the user": "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
    "refuses everything": "{{ raise_exception('only tools') }}",
    "is no Jinja": "{% for m in messages %}",
    "asks for the date": "{{ strftime_now('%d') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}",
    "reaches for Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "opens a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_equal_is_refused(tmp_path: Path, what: str) -> None:
    """One error that says why and names the option that overrides it."""
    folder = write_chat_model(tmp_path / "m", REFUSED[what], ("", "</s>"))
    with pytest.raises(ModelError, match="chat_template has no equal in MLC's form") as caught:
        derived(folder)
    assert caught.value.hint is not None and "--conv-template FILE" in caught.value.hint
    assert ("today's date" in str(caught.value)) == (what == "asks for the date")
