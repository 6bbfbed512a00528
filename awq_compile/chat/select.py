"""Which conversation template a DIST gets: the model's own, one from a file, or none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from awq_compile.chat.conv_template import PLAIN, ConvTemplate
from awq_compile.chat.derive import Derived, Vocabulary, derive
from awq_compile.chat.render import read_jinja_template, special_tokens
from awq_compile.errors import ModelError, UsageError
from awq_compile.models.config import JsonFile, ModelConfig, load_tokenizer, token_ids


def select_template(folder: Path, config: ModelConfig, asked: str | None = None) -> Derived:
    """The conversation template for the model in `folder`, with its stop tokens, and notes for the user.

    `asked` is --conv-template: a file in MLC's form, or `plain`, in which a prompt reaches the model as it is. Without
    it the model's own chat template is taken. Raises `ModelError` when that has no equal in MLC's form, and
    `UsageError` for a file that does not fit.
    """
    tokenizer = load_tokenizer(folder)
    stops = _end_tokens(folder, config, tokenizer)
    if asked is not None and asked != PLAIN:
        return Derived(_from_file(Path(asked), config, stops), ())
    source = read_jinja_template(folder) if asked is None else None
    if source is None:
        prefix = tokenizer.encode("", add_special_tokens=True).ids  # a begin token, or none
        plain = ConvTemplate(
            name=PLAIN,
            roles={"user": "", "assistant": ""},
            seps=("",),
            system_prefix_token_ids=tuple(prefix),
            stop_token_ids=stops,
        )
        note = "the model has no chat template: prompts reach it as they are (--conv-template FILE gives one)"
        return Derived(plain, () if asked else (note,))
    found = derive(source, Vocabulary(tokenizer), config.model_type)
    ids = _unique((*stops, *found.template.stop_token_ids))
    _check_ids(ids, config, f"{folder}: the stop tokens", ModelError)
    return replace(found, template=replace(found.template, stop_token_ids=ids))


def _end_tokens(folder: Path, config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """End tokens by generation_config.json, by config.json and by the tokenizer; each family fills another one."""
    own = token_ids(JsonFile(folder / "config.json"), "eos_token_id")
    named = tokenizer.token_to_id(special_tokens(folder).get("eos_token", ""))
    ids = _unique((*config.eos_token_ids, *own, *(() if named is None else (named,))))
    _check_ids(ids, config, f"{folder}: eos_token_id", ModelError)
    return ids


def _unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))


def _check_ids(ids: Iterable[int], config: ModelConfig, what: str, error: type[ModelError | UsageError]) -> None:
    for one in ids:
        if one >= config.vocab_size:
            raise error(f"{what}: {one} is outside the vocabulary of {config.vocab_size}")


def _from_file(path: Path, config: ModelConfig, stops: tuple[int, ...]) -> ConvTemplate:
    """A template in MLC's form, or the one of an mlc-chat-config.json; without stop tokens it gets the model's."""
    try:
        data = JsonFile(path).data
    except ModelError as error:
        raise UsageError(f"--conv-template: {error}", hint="--conv-template FILE.json, or plain") from None
    template = ConvTemplate.from_json(data.get("conv_template", data), str(path), UsageError)
    for key in ("stop_token_ids", "system_prefix_token_ids"):
        _check_ids(getattr(template, key), config, f"{path}: {key}", UsageError)
    return template if template.stop_token_ids else replace(template, stop_token_ids=stops)
