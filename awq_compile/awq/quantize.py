"""`quantize_model`: the driver over layers, from a Hugging Face directory to a quantised checkpoint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

import awq_compile
from awq_compile.awq.block import Block, final_norm, hf_config
from awq_compile.awq.calibrate import I64, CalibrationSpec, calibration_tokens
from awq_compile.awq.checkpoint import (
    COPIED_FILES,
    FORMAT_VERSION,
    MAX_COPIED_BYTES,
    META_FILE,
    LinearReport,
    QuantizedModel,
    checkpoint_arrays,
    is_checkpoint,
    open_checkpoint,
)
from awq_compile.awq.layer import LayerQuantizer, gram_of
from awq_compile.awq.outer import report as outer_report
from awq_compile.awq.outer import round_rows
from awq_compile.awq.rounding import decode, encode, pack, plain_grid
from awq_compile.awq.work import Arrays, WorkDirectory, clear_finished
from awq_compile.errors import AwqCompileError, ModelError, UsageError
from awq_compile.formats import GROUPS, Float16Spec, QuantizedMatrix, QuantScheme, QuantSpec, dequantize_matrix
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.models.weights import Weights, to_float16

Method = Literal["awq", "rtn"]
Progress = Callable[[int, int, float | None, str], None]
_MARGIN_BYTES: Final = 16 << 20


def _no_progress(_done: int, _total: int, _seconds_left: float | None, _message: str) -> None:
    pass


def check_groups(config: ModelConfig, scheme: QuantScheme, where: Path) -> None:
    """Refuses a group size that does not divide K of some matrix, naming it and the sizes that would do."""
    ks = {f"{name}.weight": config.linear_shape(name)[1] for name in config.architecture.linears}
    if isinstance(scheme.head, QuantSpec):
        ks["model.embed_tokens.weight"] = config.hidden_size
    group = scheme.linear.group
    for name, k in ks.items():
        if k % group:
            fitting = [g for g in GROUPS if all(other % g == 0 for other in ks.values())]
            works = " or ".join(map(str, fitting)) if fitting else "no group size that awq-compile knows"
            raise UsageError(
                f"{where}: group size {group} does not divide K = {k} of {name}; for this model {works} would work",
                hint=f"--group-size {fitting[-1]}" if fitting else None,
            )


def quantize_model(
    model_dir: Path,
    out: Path,
    scheme: QuantScheme,
    calibration: CalibrationSpec,
    *,
    method: Method = "awq",
    on_progress: Progress = _no_progress,
    replace: bool = False,
) -> QuantizedModel:
    """Quantises a model directory into the checkpoint `out` and opens it.

    Everything that can be refused without computing is refused before anything is written. A run that was
    stopped is resumed from `<out>.partial`; a checkpoint of the same inputs at `out` is returned as it is,
    another one is replaced only with `replace`. `on_progress` is called with (layers done, layers, seconds
    left or None, message).
    """
    model_dir, out = Path(model_dir), Path(out)
    config = read_config(model_dir)
    if scheme.linear.order != "NK":
        raise UsageError(
            f"a checkpoint is in the order NK, and {scheme.name} was asked for",
            hint=f"quantise as {scheme.in_order('NK').name}, then compile that with --scheme {scheme.name}",
        )
    check_groups(config, scheme, model_dir)
    weights = Weights(model_dir, config)
    if method == "awq" and calibration.length > config.context_window_size:
        calibration = replace_field(calibration, length=config.context_window_size)
        on_progress(
            0, config.num_layers, None, f"calibrating on windows of {calibration.length} tokens, the model's context"
        )
    tokens, text_sha256 = calibration_tokens(calibration, model_dir, config) if method == "awq" else (None, "")
    key = _key(model_dir, weights, scheme, method, calibration, text_sha256)
    if out.exists():
        if is_checkpoint(out) and _is_current(out, key):
            clear_finished(out)
            on_progress(config.num_layers, config.num_layers, 0.0, f"{out} is up to date")
            return open_checkpoint(out)
        if not (replace and is_checkpoint(out)):
            what = "a checkpoint of other inputs or options" if is_checkpoint(out) else "no checkpoint"
            raise UsageError(f"{out} exists and is {what}", hint=f"choose another -o, or remove {out}")
    hidden_bytes = 0 if tokens is None else 2 * 4 * tokens.size * config.hidden_size
    work = WorkDirectory(out, _checkpoint_bytes(config, scheme) + hidden_bytes + _MARGIN_BYTES)
    try:
        _run(work, weights, config, scheme, tokens, key, on_progress)
    except AwqCompileError:
        work.discard()
        raise
    finally:
        work.close()
    return open_checkpoint(out)


def _checkpoint_bytes(config: ModelConfig, scheme: QuantScheme) -> int:
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for _, shape, dtype in checkpoint_arrays(config, scheme))


def _copied(model_dir: Path) -> list[Path]:
    found = [model_dir / name for name in COPIED_FILES if (model_dir / name).is_file()]
    for path in found:
        if path.stat().st_size > MAX_COPIED_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, and at most {MAX_COPIED_BYTES} are copied")
    return found


def _key(
    model_dir: Path,
    weights: Weights,
    scheme: QuantScheme,
    method: Method,
    calibration: CalibrationSpec,
    text_sha256: str,
) -> dict[str, Any]:
    """Everything that determines the checkpoint's bytes."""
    import transformers

    source = weights.fingerprint()
    source |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _copied(model_dir)}
    return {
        "format": FORMAT_VERSION,
        "scheme": scheme.name,
        "method": method,
        "calibration": {
            "source": calibration.label,
            "text_sha256": text_sha256,
            "samples": calibration.samples,
            "length": calibration.length,
            "seed": calibration.seed,
        }
        if method == "awq"
        else None,
        "versions": {
            "awq_compile": awq_compile.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "source": source,
    }


def _is_current(out: Path, key: dict[str, Any]) -> bool:
    try:
        meta = open_checkpoint(out).meta
    except AwqCompileError:
        return False
    return all(meta.get(name) == value for name, value in key.items())


def _run(
    work: WorkDirectory,
    weights: Weights,
    config: ModelConfig,
    scheme: QuantScheme,
    tokens: I64 | None,
    key: dict[str, Any],
    on_progress: Progress,
) -> None:
    total = config.num_layers
    done, dropped = work.prepare({**key, "threads": torch.get_num_threads()})
    if dropped:
        on_progress(0, total, None, f"{work.root} is of other inputs or options: starting afresh")
    if done:
        on_progress(done, total, None, f"resuming after layer {done} of {total}")
    started = time.monotonic()
    hidden: torch.Tensor | None = None
    hf = hf_config(config, weights.model_dir)
    if not work.embedding_file.exists():
        work.commit(work.embedding_file, *_embedding(weights, config, scheme, searched=tokens is not None))
    if tokens is not None:
        hidden = torch.from_numpy(work.hidden(done - 1)["hidden"]) if done else _embed(work, scheme, tokens)
        hidden = hidden.clone()  # loaded and computed states aligned alike, else sums may differ in their last bits
    for index in range(done, total):
        if hidden is None:
            arrays, reports = _rtn_layer(weights, scheme.linear, index)
        else:
            arrays, reports, hidden = _awq_layer(weights, config, scheme.linear, index, hidden, hf)
        work.commit_layer(index, arrays, reports, {} if hidden is None else {"hidden": hidden.numpy()})
        finished = index + 1 - done
        left = (time.monotonic() - started) / finished * (total - index - 1)
        on_progress(index + 1, total, left, f"layer {index + 1} of {total}")
    if not work.head_file.exists():
        work.commit(work.head_file, *_head(weights, config, scheme, hidden, hf))
    _finish(work, weights.model_dir, total, key)


def _finish(work: WorkDirectory, model_dir: Path, layers: int, key: dict[str, Any]) -> None:
    for path in _copied(model_dir):
        work.copy(path)
    work.write_index()
    files = [work.embedding_file, *(work.layer_file(i) for i in range(layers)), work.head_file]
    reports = [report.to_json() for path in files for report in work.reports(path)]
    work.write_json(META_FILE, {**key, "reports": reports})
    work.finish()


def named_arrays(name: str, matrix: QuantizedMatrix) -> Arrays:
    """`….weight` → the arrays that hold it, by their checkpoint names."""
    stem = name.removesuffix("weight")
    return {stem + suffix: array for suffix, array in matrix.arrays().items()}


def _rtn(name: str, weight: torch.Tensor, spec: QuantSpec) -> tuple[Arrays, LinearReport]:
    grid = plain_grid(weight, spec)
    codes = encode(weight, grid, spec)
    error = float((decode(codes, grid, spec) - weight).norm() / weight.norm().clamp(min=1e-30))
    n, k = weight.shape
    report = LinearReport(name, (n, k), spec.name, error, error, note="error of the weights, no calibration")
    return named_arrays(name, pack(codes, grid, spec, name)), report


def _embed(work: WorkDirectory, scheme: QuantScheme, tokens: I64) -> torch.Tensor:
    """(B, T, H) inputs of the first layer, from the embedding as it is stored."""
    stored = work.arrays(work.embedding_file)
    arrays = {name.removeprefix("model.embed_tokens."): value for name, value in stored.items()}
    if isinstance(scheme.head, Float16Spec):
        return torch.from_numpy(arrays["weight"][tokens]).float()
    used, index = np.unique(tokens, return_inverse=True)
    rows = QuantizedMatrix(scheme.head, *(arrays[key][used] for key in scheme.head.arrays(1, scheme.head.group)))
    return torch.from_numpy(dequantize_matrix(rows)[index.reshape(tokens.shape)])


def _awq_layer(
    weights: Weights, config: ModelConfig, spec: QuantSpec, index: int, hidden: torch.Tensor, hf: Any
) -> tuple[Arrays, list[LinearReport], torch.Tensor]:
    tensors, name = weights.layer(index), f"model.layers.{index}"
    with torch.inference_mode():
        block = Block(config, hf, tensors, hidden.shape[1])
        layer, out = LayerQuantizer(block, tensors, config, spec, name).run(hidden)
    arrays: Arrays = {f"{name}.{key}": to_float16(value, f"{name}.{key}") for key, value in layer.vectors.items()}
    for key, found in layer.linears.items():
        arrays |= named_arrays(f"{name}.{key}", pack(found.codes, found.grid, spec, f"{name}.{key}"))
    return arrays, layer.reports, out


def _rtn_layer(weights: Weights, spec: QuantSpec, index: int) -> tuple[Arrays, list[LinearReport]]:
    arrays: Arrays = {}
    reports = []
    for name, value in weights.layer(index).items():
        full = f"model.layers.{index}.{name}"
        if value.ndim == 1:
            arrays[full] = to_float16(value, full)
            continue
        packed, report = _rtn(full, value, spec)
        arrays |= packed
        reports.append(report)
    return arrays, reports


def _embedding(
    weights: Weights, config: ModelConfig, scheme: QuantScheme, *, searched: bool
) -> tuple[Arrays, list[LinearReport]]:
    name = "model.embed_tokens.weight"
    value = weights.head() if config.tie_word_embeddings else weights.tensor(name)
    return _outer(name, value, scheme, None, searched=searched)


def _head(
    weights: Weights, config: ModelConfig, scheme: QuantScheme, hidden: torch.Tensor | None, hf: Any
) -> tuple[Arrays, list[LinearReport]]:
    """Final norm and, unless tied, the LM head, calibrated by the final norm's outputs."""
    norm = weights.float16("model.norm.weight")
    arrays: Arrays = {"model.norm.weight": norm}
    if config.tie_word_embeddings:
        return arrays, []
    gram = None
    if hidden is not None and isinstance(scheme.head, QuantSpec):
        final = final_norm(config, hf, torch.from_numpy(norm.astype(np.float32)))
        with torch.inference_mode():
            gram, _ = gram_of(final(x) for x in hidden)
    name = "lm_head.weight"
    found, reports = _outer(name, weights.tensor(name), scheme, gram, searched=hidden is not None)
    return arrays | found, reports


def _outer(
    name: str, value: torch.Tensor, scheme: QuantScheme, gram: torch.Tensor | None, *, searched: bool
) -> tuple[Arrays, list[LinearReport]]:
    if isinstance(scheme.head, Float16Spec):
        return {name: to_float16(value, name)}, []
    if not searched:
        arrays, report = _rtn(name, value, scheme.head)
        return arrays, [report]
    with torch.inference_mode():
        found = round_rows(value, scheme.head, gram)
        report = outer_report(name, value, found, scheme.head, gram)
    return named_arrays(name, pack(found.codes, found.grid, scheme.head, name)), [report]
