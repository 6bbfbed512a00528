"""Calibration: which text, cut into which windows of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.errors import CalibrationError, EnvironmentMissingError, ModelError, UsageError
from awq_compile.json_input import parse_json
from awq_compile.models.config import ModelConfig

BUNDLED: Final = "bundled"
MAX_TEXT_BYTES: Final = 32 << 20  # more text than any sensible number of windows needs
_MAX_TOKENIZER_BYTES: Final = 256 << 20

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CalibrationSpec:
    """Calibration as asked: `samples` windows of `length` tokens, drawn without overlap from a text with `seed`.

    `source` is "bundled", the path of a plain text or of JSON lines (key "text"), or "datasets:NAME" or
    "datasets:NAME,CONFIG" for the train split of a `datasets` dataset.
    """

    source: str = BUNDLED
    samples: int = 64
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 1 << 16:
            raise UsageError(f"calibration samples must be 1 to 65536, got {self.samples}")
        if not 2 <= self.length <= 1 << 16:
            raise UsageError(f"calibration length must be 2 to 65536 tokens, got {self.length}")

    @property
    def label(self) -> str:
        """The source without the folder it lies in, for the checkpoint's record."""
        return self.source if self.source == BUNDLED or self.source.startswith("datasets:") else Path(self.source).name


def bundled_text() -> Path:
    """The calibration text that comes with the package."""
    return Path(__file__).resolve().parent.parent / "data" / "demo" / "calibration.txt"


def read_text(path: Path) -> str:
    """Plain text, or the "text" values of JSON lines joined by blank lines; at most `MAX_TEXT_BYTES` of it."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_TEXT_BYTES)
    except OSError as problem:
        raise CalibrationError(f"{path} cannot be read: {problem.strerror}", hint="--calib FILE") from None
    text = raw.decode("utf-8", errors="ignore" if len(raw) == MAX_TEXT_BYTES else "strict") if _is_utf8(raw) else None
    if text is None:
        raise CalibrationError(f"{path} is not UTF-8 text", hint="give plain text, or JSON lines with the key 'text'")
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        return text
    lines = text.splitlines()
    if len(raw) == MAX_TEXT_BYTES:
        lines.pop()  # cut in its middle
    return "\n\n".join(_line_text(line, number, path) for number, line in enumerate(lines, 1) if line.strip())


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        return len(raw) == MAX_TEXT_BYTES and problem.start >= len(raw) - 4
    return True


def _line_text(line: str, number: int, path: Path) -> str:
    try:
        value = parse_json(line)
    except ValueError as problem:
        raise CalibrationError(f"{path}, line {number}: {problem}", hint="correct the line, or leave it out") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise CalibrationError(
            f"{path}, line {number}: expected an object with a string under 'text', found {line:.60}"
        )
    return text


def _datasets_text(name: str, characters: int) -> str:
    """The first `characters` or so of the train split's "text" column."""
    try:
        import datasets
    except ImportError:
        raise EnvironmentMissingError(
            f"calibrating on datasets:{name} needs the package datasets, which is not installed",
            hint="pip install datasets, or --calib FILE, or leave --calib out for the bundled text",
        ) from None
    try:
        path, _, subset = name.partition(",")
        rows = datasets.load_dataset(path, subset or None, split="train", streaming=True)
        parts: list[str] = []
        total = 0
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise CalibrationError(f"datasets:{name} has no text column; its columns are {', '.join(row)}")
            parts.append(row["text"])
            total += len(row["text"])
            if total >= characters:
                break
    except CalibrationError:
        raise
    except Exception as problem:  # datasets raises many kinds, most of them when offline
        raise EnvironmentMissingError(
            f"datasets:{name} cannot be loaded: {type(problem).__name__}: {problem!s:.200}",
            hint="check the name and the network, or use --calib FILE",
        ) from None
    return "\n\n".join(parts)


def load_text(spec: CalibrationSpec) -> str:
    """The calibration text that `spec` names."""
    if spec.source == BUNDLED:
        return read_text(bundled_text())
    if spec.source.startswith("datasets:"):
        return _datasets_text(spec.source.removeprefix("datasets:"), spec.samples * spec.length * 16)
    return read_text(Path(spec.source))


def load_tokenizer(model_dir: Path) -> Any:
    """The model's tokenizer as `text, add_special_tokens → ids`; no code from the directory is run."""
    path = model_dir / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            if path.stat().st_size > _MAX_TOKENIZER_BYTES:
                raise ModelError(f"{path} has {path.stat().st_size} bytes, and at most {_MAX_TOKENIZER_BYTES} are read")
            tokenizer = Tokenizer.from_file(str(path))
        except ModelError:
            raise
        except Exception as problem:  # tokenizers raises bare Exception
            raise ModelError(f"{path} is not a tokenizer: {problem}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids
    if not any((model_dir / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise ModelError(f"{model_dir} holds no tokenizer", hint="download tokenizer.json into it")
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # missing converters, damaged files
        raise ModelError(
            f"{model_dir}: its tokenizer cannot be read: {problem!s:.200}", hint="add tokenizer.json"
        ) from None
    return lambda text, special: slow(text, add_special_tokens=special)["input_ids"]


def calibration_tokens(spec: CalibrationSpec, model_dir: Path, config: ModelConfig) -> tuple[I64, str]:
    """(samples, length) token ids, and the sha256 of the text they come from.

    The text is cut into consecutive windows, of which `samples` are drawn with `seed` and kept in their
    order; each starts with the tokens that the tokenizer puts before a text (Llama's begin token).
    """
    if spec.length > config.context_window_size:
        raise CalibrationError(
            f"calibration windows of {spec.length} tokens exceed the model's context of {config.context_window_size}",
            hint=f"--calib-length {config.context_window_size}",
        )
    encode = load_tokenizer(model_dir)
    text = load_text(spec)
    if not text.strip():
        raise CalibrationError(
            f"the calibration text {spec.label} is empty, and {spec.samples} windows of {spec.length} tokens are needed"
        )
    ids = np.asarray(encode(text, False), np.int64)
    prefix = np.asarray(encode("", True), np.int64)
    if prefix.size and config.eos_token_ids and int(prefix[-1]) in config.eos_token_ids:
        prefix = prefix[:-1]
    body = spec.length - prefix.size
    if body < 1 or len(ids) < spec.samples * body:
        most = len(ids) // max(1, body)
        raise CalibrationError(
            f"the calibration text {spec.label} has {len(ids)} tokens, and {spec.samples} windows of {body} need "
            f"{spec.samples * body}",
            hint=f"give a longer text, or --calib-samples {most}" if most else "give a longer text",
        )
    if int(ids.max()) >= config.vocab_size:
        raise ModelError(
            f"{model_dir}: the tokenizer gives token {int(ids.max())}, "
            f"and config.json's vocab_size is {config.vocab_size}"
        )
    windows = ids[: len(ids) // body * body].reshape(-1, body)
    chosen = np.sort(np.random.default_rng(spec.seed).permutation(len(windows))[: spec.samples])
    tokens = np.concatenate([np.broadcast_to(prefix, (spec.samples, prefix.size)), windows[chosen]], axis=1)
    return tokens, hashlib.sha256(text.encode()).hexdigest()
