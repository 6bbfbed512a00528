"""What MODEL names: a Hugging Face directory, a checkpoint of ours, or a model id on the hub."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from awq_compile.cli.console import Output, shown
from awq_compile.errors import EnvironmentMissingError, ModelError, UsageError

if TYPE_CHECKING:
    from awq_compile.awq.calibrate import CalibrationSpec
    from awq_compile.awq.checkpoint import QuantizedModel
    from awq_compile.awq.quantize import Method
    from awq_compile.formats import QuantScheme

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES: Final = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template.jinja")


@dataclass(frozen=True)
class Source:
    """A model on this machine. `name` names the output; `quantised` says it is a checkpoint of ours."""

    path: Path
    name: str
    quantised: bool


def find_model(model: str | None, output: Output) -> Source:
    """Resolves MODEL, downloading it when it is a hub id; raises for everything that is not supported."""
    if model is None:
        if not Path("config.json").is_file():
            raise UsageError(
                "no MODEL given, and the current directory holds no config.json",
                hint="awq-compile MODEL takes a Hugging Face directory; scripts/demo needs no model",
            )
        model = "."
    path = Path(model).expanduser()
    if not path.exists():
        if _HUB_ID.fullmatch(model) and not model.endswith(".onnx"):
            return Source(_download(model, output), _safe_name(model.rpartition("/")[2]), quantised=False)
        if path.suffix == ".onnx":
            raise _not_available("an .onnx file")
        raise UsageError(
            f"{model} does not exist, and it is not a model id (organisation/name) either",
            hint="give a Hugging Face directory: config.json, *.safetensors, tokenizer.json",
        )
    path = path.resolve()
    if path.is_file():
        if path.suffix == ".onnx":
            raise _not_available("an .onnx file")
        raise UsageError(f"{model} is a file", hint="give the directory that holds config.json")
    return _in_directory(path)


def _in_directory(path: Path) -> Source:
    from awq_compile.awq.checkpoint import is_checkpoint
    from awq_compile.manifest import is_dist

    if is_checkpoint(path):
        return Source(path, _safe_name(path.name), quantised=True)
    if is_dist(path):
        raise UsageError(f"{shown(path)} is compiled already", hint=f"awq-compile run {shown(path)} --prompt TEXT")
    _refuse_foreign(path)
    return Source(path, _safe_name(path.name), quantised=False)


def _refuse_foreign(path: Path) -> None:
    """Refuses checkpoints of other quantisers, and directories with nothing but an .onnx file."""
    config = path / "config.json"
    if not config.is_file() and (onnx := next(iter(sorted(path.glob("*.onnx"))), None)) is not None:
        raise _not_available(f"an .onnx file ({onnx.name})")
    if (path / "quantize_config.json").is_file() or (path / "quant_config.json").is_file():
        raise _not_available("a checkpoint of another quantiser (AutoGPTQ or AutoAWQ)")
    if not config.is_file():
        return  # `read_config` says what is wrong with it
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # read_config says what is wrong with it
    for key in ("quantization_config", "compression_config"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            method = data[key].get("quant_method", "unknown")
            raise _not_available(f"a checkpoint quantised by another tool ({key}: quant_method {method!r:.40})")


def _not_available(what: str) -> UsageError:
    return UsageError(
        f"{what} as MODEL is not available in this version",
        hint="give the original floating-point model: a directory with config.json and *.safetensors",
    )


def _safe_name(name: str) -> str:
    """A directory's name as a part of file names."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _download(model: str, output: Output) -> Path:
    """A hub model's safetensors, JSON and tokenizer files; never code, never pickle."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise EnvironmentMissingError(
            f"{model} is not on this machine, and the package huggingface_hub is missing",
            hint="pip install huggingface_hub",
        ) from None
    output.step(f"fetching {model} from the model hub")
    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the client raises many kinds, and all mean that the model is not here
        kind = type(error).__name__
        if kind in ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "HFValidationError"):
            raise ModelError(
                f"the model hub has no {model} for you: {kind}", hint="check the name and your access"
            ) from None
        raise EnvironmentMissingError(
            f"{model} is not a directory here, and the model hub cannot be reached: {kind}",
            hint="download the model elsewhere, copy it here, and give its directory",
        ) from None


def checkpoint_key(path: Path, scheme: QuantScheme, calibration: CalibrationSpec, method: str) -> str:
    """Hash of everything that a checkpoint's bytes depend on, for the name of its cache folder."""
    from dataclasses import asdict

    from awq_compile.artifact import versions
    from awq_compile.awq.checkpoint import COPIED_FILES
    from awq_compile.manifest import file_sha256
    from awq_compile.models.config import read_config
    from awq_compile.models.weights import Weights

    data: dict[str, Any] = {
        "files": {name: file_sha256(path / name) for name in COPIED_FILES if (path / name).is_file()},
        "weights": Weights(path, read_config(path)).fingerprint(),
        "scheme": scheme.name,
        "method": method,
        "calibration": {**asdict(calibration), "source": _content(calibration.source), "label": calibration.label},
        "versions": versions(),
        "code": _quantiser_digest(),
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _quantiser_digest() -> str:
    """Digest of the quantiser's own sources: a changed algorithm does not find what the former one made."""
    import awq_compile

    package = Path(awq_compile.__file__).parent
    digest = hashlib.sha256()
    for path in [package / "formats.py", *sorted((package / "awq").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _content(text: str) -> str:
    """A calibration text counts by its bytes: the file's digest, or the name of a text that is no file."""
    from awq_compile.awq.calibrate import BUNDLED, bundled_text
    from awq_compile.manifest import file_sha256

    path = bundled_text() if text == BUNDLED else Path(text)
    return file_sha256(path) if path.is_file() else text


def cached_checkpoint(source: Source, scheme: QuantScheme, calibration: CalibrationSpec, method: str) -> Path:
    """Where the quantised form of `source` is kept, so that several targets and later runs share it."""
    from awq_compile import settings

    key = checkpoint_key(source.path, scheme, calibration, method)
    return settings.cache_dir() / "checkpoints" / f"{source.name}-{scheme.name}-{method}-{key}"


def quantised(
    source: Source, out: Path, scheme: QuantScheme, calibration: CalibrationSpec, method: Method, output: Output
) -> QuantizedModel:
    """Quantises `source` into `out`, going on where an earlier run was stopped."""
    from awq_compile.awq.quantize import quantize_model

    what = "rounding to nearest" if method == "rtn" else "quantising by AWQ"
    with output.bar(what) as bar:
        return quantize_model(source.path, out, scheme, calibration, method=method, on_progress=bar.update)
