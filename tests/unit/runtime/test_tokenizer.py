"""Streaming text: pieces add up to the whole, and no piece ends within a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from awq_compile.errors import ArtifactError
from awq_compile.runtime.tokenizer import Tokenizer

TEXT = "naïve 🙂 日本 done"


@pytest.fixture(scope="module", params=["byte level", "metaspace with byte fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Two tokenizers in which every byte beyond ASCII is a token of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        made = HFTokenizer(models.BPE(vocab, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:
        letters = [*"abcdefghijklmnopqrstuvwxyz", "▁"]
        vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
        vocab |= {letter: len(vocab) + i for i, letter in enumerate(letters)}
        made = HFTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def test_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) > len(TEXT)
    pieces = list(tokenizer.stream(tokens))
    assert "".join(pieces) == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "🙂" in "".join(pieces)


def test_a_continuation_keeps_its_leading_space(tokenizer: Tokenizer) -> None:
    """Decoded alone the first token would lose its space; behind the prompt it keeps it."""
    prompt = tokenizer.encode("one")
    tokens = tokenizer.encode("one two")[len(prompt) :]
    assert "".join(tokenizer.stream(tokens, after=prompt)) == " two"


def test_an_unfinished_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    """Bytes that never become a character are shown as such, not lost."""
    tokens = tokenizer.encode("a日")[:-1]
    pieces = list(tokenizer.stream(tokens))
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "".join(pieces).startswith("a\N{REPLACEMENT CHARACTER}")


def test_missing_and_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer.json is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer.json is damaged"):
        Tokenizer(tmp_path)
