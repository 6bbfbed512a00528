"""Conversations on a small floating-point library with a tokenizer of bytes: against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_build import save_hf_config
from helpers_chat import QWEN2
from helpers_dist import write_float_dist, write_manifest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from awq_compile.chat.select import select_template
from awq_compile.errors import ArtifactError, UsageError
from awq_compile.limits import CompileOptions
from awq_compile.manifest import CHAT_CONFIG, open_dist
from awq_compile.runtime.chat import Chat, Sampling, StopStrings, default_sampling

WINDOW = 400
GREEDY = Sampling(temperature=0, top_p=1, max_tokens=12)
SAID = ("Hi!", "¿y tú?", "and\nthen")


def byte_tokenizer(folder: Path) -> int:
    """A tokenizer with a token for each byte and ChatML's; returns its size."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_end|>", "<|im_start|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    data = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": QWEN2}
    (folder / "tokenizer_config.json").write_text(json.dumps(data))
    return int(tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(model, tokenizer) of transformers, and a DIST."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("chat")
    (folder / "hf").mkdir()
    hf_config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=byte_tokenizer(folder / "hf"),
        max_position_embeddings=WINDOW,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=256,
    )
    hf = LlamaForCausalLM(hf_config).eval()
    config = save_hf_config(hf_config, folder / "hf", "LlamaForCausalLM")
    dist = folder / "dist"
    write_float_dist(dist, config, hf.state_dict(), CompileOptions(WINDOW, prefill_chunk_size=64, max_batch_size=1))
    (dist / "tokenizer.json").write_bytes((folder / "hf" / "tokenizer.json").read_bytes())
    edit(dist, conv_template=select_template(folder / "hf", config).template.to_json())
    return hf, AutoTokenizer.from_pretrained(str(folder / "hf")), dist


def edit(dist: Path, **changed: Any) -> None:
    """Changes keys of mlc-chat-config.json."""
    path = dist / CHAT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    write_manifest(dist, "lib/tiny-cpu.so")


@pytest.fixture
def chat(made: tuple[Any, Any, Path]) -> Chat:
    """A new conversation."""
    return Chat(open_dist(made[2]))


def say(chat: Chat, message: str, sampling: Sampling = GREEDY, **options: Any) -> str:
    """The whole answer."""
    text = "".join(chat.answer(message, sampling, **options))
    assert chat.last is not None and chat.last.text == text
    return text


def expected(made: tuple[Any, Any, Path], messages: list[dict[str, str]]) -> str:
    """transformers' greedy answer."""
    hf, tokenizer, _ = made
    ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
    mask = torch.ones_like(ids)
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=256, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_answers_are_those_of_transformers(made: tuple[Any, Any, Path], system: str | None) -> None:
    """Three turns, with the cache of the turns before; what it keeps grows by the turn."""
    chat = Chat(open_dist(made[2]), system=system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    kept = []
    for said in SAID:
        messages.append({"role": "user", "content": said})
        answer = expected(made, messages)
        assert say(chat, said) == answer
        messages.append({"role": "assistant", "content": answer})
        assert chat.last is not None
        kept.append(chat.last.reused_tokens)
    assert kept[0] == 0 < kept[1] < kept[2]


def test_a_new_conversation(made: tuple[Any, Any, Path], chat: Chat) -> None:
    """After a reset, and after other turns, the same words get the same answer."""
    first = [say(chat, said) for said in SAID]
    chat.reset()
    assert chat.messages == []
    assert [say(chat, said) for said in SAID] == first
    assert say(chat, SAID[0]) != "" and chat.messages[-2] == ("user", SAID[0])


def test_an_answer_ends_where_it_should(made: tuple[Any, Any, Path], chat: Chat) -> None:
    """At --max-tokens, at a stop token, at a stop string, at the window's end, and when the user ends it."""
    text = say(chat, "Hi!", Sampling(0, 1, max_tokens=40))
    assert chat.last is not None and chat.last.finish == "max_tokens" and len(chat.last.tokens) == 40
    tokens = chat.last.tokens
    config = json.loads((made[2] / CHAT_CONFIG).read_text())["conv_template"]
    own = open_dist(made[2])
    for key, value, whole in (
        ("stop_token_ids", [tokens[5]], tokens.index(tokens[5])),
        ("stop_str", [text[8:11]], None),
    ):
        own.chat_config["conv_template"] = config | {key: value}
        other = Chat(own)
        cut = say(other, "Hi!", Sampling(0, 1, max_tokens=40))
        assert other.last is not None and other.last.finish == "stop"
        assert cut == text[: text.index(text[8:11])] if whole is None else other.last.tokens == tokens[:whole]
    chat.reset()
    endless = Sampling(1.0, 1.0)
    while chat.last.finish != "context":
        try:
            say(chat, "x" * 20, endless)
        except UsageError as error:
            assert f"context window is {WINDOW}" in str(error) and "/reset" in str(error.hint)
            break
    chat.reset()
    polls = iter([False, False, True])
    begun = say(chat, "Hi!", interrupted=lambda: next(polls))
    assert chat.last.finish == "interrupted" and len(chat.last.tokens) == 3 and text.startswith(begun.rstrip("\ufffd"))
    again = Chat(open_dist(made[2]))
    again.messages = list(chat.messages)
    assert say(chat, "go on") == say(again, "go on")


def test_what_does_not_fit_is_not_remembered(chat: Chat) -> None:
    """A message longer than the window is refused, and the conversation goes on without it."""
    say(chat, "Hi!")
    before = list(chat.messages)
    with pytest.raises(UsageError, match=rf"the conversation has \d+ tokens, .* context window is {WINDOW}"):
        say(chat, "x" * WINDOW)
    assert chat.messages == before
    say(chat, "short")


def test_an_interrupted_call_is_not_gone_on_from(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """When computing breaks off half way, the cache is not trusted again."""
    first = say(chat, "Hi!")
    function = chat.engine._function

    def broken(name: str) -> Any:
        if name == "decode":
            raise KeyboardInterrupt
        return function(name)

    with monkeypatch.context() as patch:
        patch.setattr(chat.engine, "_function", broken)
        with pytest.raises(KeyboardInterrupt):
            say(chat, "again")
    assert chat.engine.held_prefix([1] * 300) == 0
    chat.reset()
    assert say(chat, "Hi!") == first


def test_a_sliding_window_takes_nothing_back(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache has let go of tokens: a conversation that goes on is gone on from, another one begins anew."""
    say(chat, "Hi!")
    held = list(chat.engine._held)
    assert chat.engine.held_prefix([*held, 5]) == len(held) == chat.engine.held_prefix([*held[:-1], 5, 5]) + 1
    monkeypatch.setattr(chat.engine, "metadata", replace(chat.engine.metadata, sliding_window_size=64))
    assert chat.engine.held_prefix([*held, 5]) == len(held)
    assert chat.engine.held_prefix([*held[:-1], 5, 5]) == 0


def test_text_that_is_none(made: tuple[Any, Any, Path], chat: Chat) -> None:
    """Half a surrogate pair, as undecodable bytes of a command line become."""
    with pytest.raises(UsageError, match="not Unicode text"):
        say(chat, "\udcff")
    with pytest.raises(UsageError, match="not Unicode text"):
        Chat(open_dist(made[2]), system="\udcff")


def test_seeds(chat: Chat) -> None:
    """The same seed draws the same, and turns draw differently."""
    drawn = []
    for seed in (1, 1, 2):
        chat.reset()
        drawn.append([say(chat, "Hi!", Sampling(1.5, 1.0, seed, 20)) for _ in range(2)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_damaged_configurations(made: tuple[Any, Any, Path]) -> None:
    """The file, the key and the value are named."""
    dist = open_dist(made[2])
    for changed, message in (
        ({"conv_template": None}, "mlc-chat-config.json: conv_template: the conversation template is None"),
        ({"temperature": "hot"}, "temperature is 'hot', expected 0 to 100.0"),
        ({"top_p": 2}, "top_p is 2, expected 0 to 1.0"),
    ):
        own = open_dist(made[2])
        own.chat_config.update(changed)
        with pytest.raises(ArtifactError, match=message):
            default_sampling(own)
            Chat(own)
    assert default_sampling(dist) == (1.0, 1.0)


@given(
    text=st.text("ab|<>", max_size=30),
    strings=st.lists(st.text("ab|<>", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_in_pieces(text: str, strings: list[str], cuts: list[int]) -> None:
    """However the text is cut, what comes out is what precedes the string that is complete first, and never more."""
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(ends)]
    until = StopStrings(strings)
    out = "".join(until.cut(pieces))
    assert until.found == any(string in text for string in strings)
    assert text.startswith(out)
    assert not any(string in out for string in strings)
    if not until.found:
        assert out == text
    else:
        assert any(text.startswith(string, len(out)) for string in strings)
