"""The whole quantiser: equal bytes after any kill, nothing left behind after any refusal."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_quant import edit_json, make_model, write_text

from awq_compile.awq import work as work_module
from awq_compile.awq.calibrate import CalibrationSpec
from awq_compile.awq.checkpoint import is_checkpoint, open_checkpoint
from awq_compile.awq.quantize import quantize_model
from awq_compile.errors import (
    AwqCompileError,
    CalibrationError,
    CheckpointError,
    EnvironmentMissingError,
    ModelError,
    UsageError,
)
from awq_compile.formats import QuantScheme
from awq_compile.ours import MARK

SCHEME = QuantScheme.parse("w4g32-h8")

# Quantises once for every (output, kill) that it is given, each time in a fork that kills itself when the
# quantiser syncs a path that ends with `kill`; forks, because importing torch again takes seconds.
CHILD = """
import json, os, signal, sys
from pathlib import Path
import transformers.models.qwen3.modeling_qwen3
from awq_compile.awq import quantize, work
from awq_compile.awq.calibrate import CalibrationSpec
from awq_compile.formats import QuantScheme
model, text, runs = sys.argv[1:]
def run(out, kill, log):
    real = work.sync
    def sync(path):
        real(path)
        if kill and str(path).endswith(kill):
            os.kill(os.getpid(), signal.SIGKILL)
    work.sync = sync
    quantize.quantize_model(
        Path(model), Path(out), QuantScheme.parse("w4g32-h8"), CalibrationSpec(text, 8, 32),
        on_progress=lambda done, total, left, message: print(message, file=log, flush=True),
    )
found = []
for out, kill in json.loads(runs):
    with open(out + ".log", "w") as log:
        if not (pid := os.fork()):
            run(out, kill, log)
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found.append([status, Path(out).exists(), Path(out + ".log").read_text()])
    os.unlink(out + ".log")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen3-tied", num_hidden_layers=3, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 333, 600)


def spec(text: Path) -> CalibrationSpec:
    return CalibrationSpec(str(text), 8, 32)


def messages(**arguments: Any) -> list[str]:
    """What a run of the quantiser says."""
    seen: list[str] = []
    quantize_model(**arguments, on_progress=lambda _done, _total, _left, message: seen.append(message))
    return seen


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*"))}


def test_killed_at_any_moment_it_ends_in_the_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    """SIGKILL before a layer is renamed, between states and layer, in head and JSON, and after the last rename."""
    killed, whole = -signal.SIGKILL, str(tmp_path / "whole")
    runs = [
        # kill when this is synced, exit status, the output exists, what the run says first
        ("partial.json.tmp", killed, False, ""),
        ("layer-00000.safetensors.tmp", killed, False, ""),  # written, but under its other name
        ("hidden-00001.safetensors.tmp", killed, False, "layer 1 of 3"),
        ("layer-00001.safetensors.tmp", killed, False, "resuming after layer 1 of 3"),  # its states are there
        ("head.safetensors.tmp", killed, False, "resuming after layer 1 of 3"),
        ("awq_compile.json.tmp", killed, False, "resuming after layer 3 of 3"),
        (str(tmp_path), killed, True, "resuming after layer 3 of 3"),  # synced once, after the last rename
        ("", 0, True, f"{tmp_path / 'out'} is up to date"),
    ]
    asked = json.dumps([[whole, ""], *([str(tmp_path / "out"), run[0]] for run in runs)])
    command = [sys.executable, "-c", CHILD, str(model), str(text), asked]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert found[0][0] == 0
    for (kill, *expected, first), (*got, log) in zip(runs, found[1:], strict=True):
        assert got == expected, kill
        assert log.split("\n")[0] == first, kill
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_ctrl_c_resumes_at_the_last_finished_layer(model: Path, text: Path, tmp_path: Path) -> None:
    """Interrupted after layer 2 of 3: no output, and the next run computes only what is missing, to equal bytes."""
    quantize_model(model, tmp_path / "whole", SCHEME, spec(text))

    def interrupt(done: int, _total: int, _left: float | None, _message: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, tmp_path / "out", SCHEME, spec(text), on_progress=interrupt)
    assert not (tmp_path / "out").exists()
    seen: list[tuple[int, int, float | None, str]] = []
    quantize_model(model, tmp_path / "out", SCHEME, spec(text), on_progress=lambda *report: seen.append(report))
    assert [report[0] for report in seen] == [2, 3]
    assert seen[0][3] == "resuming after layer 2 of 3"
    assert seen[1][2] == 0.0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_options_start_afresh_and_say_so(model: Path, text: Path, tmp_path: Path) -> None:
    """A partial directory of another scheme, text, seed or model is not resumed from."""

    seen: list[str] = []

    def interrupt(done: int, _total: int, _left: float | None, message: str) -> None:
        seen.append(message)
        if done == 1:
            raise KeyboardInterrupt

    changes: list[dict[str, Any]] = [
        {"scheme": QuantScheme.parse("w3g32")},
        {"calibration": CalibrationSpec(str(text), 8, 32, seed=1)},
        {"calibration": CalibrationSpec(str(text), 7, 32)},
        {"calibration": CalibrationSpec(str(write_text(tmp_path / "text.txt", 333, 600, seed=9)), 8, 32)},
        {"method": "rtn"},
        {"model_dir": make_model(tmp_path / "other", "qwen3-tied", num_hidden_layers=3, hidden_size=96)},
    ]
    for i, change in enumerate(changes):
        base = {"model_dir": model, "out": tmp_path / f"out{i}", "scheme": SCHEME, "calibration": spec(text)}
        with pytest.raises(KeyboardInterrupt):
            quantize_model(**base, on_progress=interrupt)
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            quantize_model(**{**base, **change}, on_progress=interrupt)
        assert "starting afresh" in seen[0], change
        assert seen[1] == "layer 1 of 3", change


def test_a_finished_checkpoint_is_kept_or_replaced_only_on_request(model: Path, text: Path, tmp_path: Path) -> None:
    """Same inputs: returned as it is. Others: refused, or replaced when asked. A foreign directory: never touched."""
    out = tmp_path / "out"
    quantize_model(model, out, SCHEME, spec(text))
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    quantize_model(model, out, SCHEME, spec(text))
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    other = QuantScheme.parse("w3g32")
    with pytest.raises(UsageError, match="of other inputs or options"):
        quantize_model(model, out, other, spec(text))
    assert open_checkpoint(out).scheme == SCHEME
    assert quantize_model(model, out, other, spec(text), replace=True).scheme == other
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="is no checkpoint"):
        quantize_model(model, tmp_path / "mine", other, spec(text), replace=True)


@pytest.mark.parametrize("names", [("notes.txt",), ("checkpoint/m",), ("a.b/c", "lock"), ("lock", "partial.json")])
def test_a_folder_of_the_users_in_our_place_is_left_alone(
    model: Path, text: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """`q.partial` without our mark is refused by name, whatever is in it."""
    for name in names:
        (tmp_path / "q.partial" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "q.partial" / name).write_text("{}")
    with pytest.raises(UsageError, match=r"q\.partial is needed .* did not write"):
        quantize_model(model, tmp_path / "q", SCHEME, spec(text))
    found = (p.relative_to(tmp_path / "q.partial").as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert sorted(found) == sorted(names)


def test_anything_goes_from_a_folder_of_ours(model: Path, text: Path, tmp_path: Path) -> None:
    """What a kill left of other inputs is cleared, directories as well, before the work starts afresh."""
    left = tmp_path / "q.partial"
    for folder in ("checkpoint", "replaced", "a.b"):
        (left / folder).mkdir(parents=True)
        (left / folder / "x").write_text("x")
    (left / MARK).touch()
    quantize_model(model, tmp_path / "q", SCHEME, spec(text), method="rtn", replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_two_at_once_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    """The second process on the same output stops, and does not disturb the first."""

    def second(done: int, _total: int, _left: float | None, _message: str) -> None:
        if done == 1:
            with pytest.raises(CheckpointError, match=r"another awq-compile is writing .*/out") as caught:
                quantize_model(model, tmp_path / "out", SCHEME, spec(text))
            assert (caught.value.exit_code, caught.value.hint) == (
                1,
                "wait for it: then the same command takes what it made",
            )

    quantize_model(model, tmp_path / "out", SCHEME, spec(text), on_progress=second)
    assert is_checkpoint(tmp_path / "out")


def test_reports_cover_every_linear_and_the_record_reproduces(model: Path, text: Path, tmp_path: Path) -> None:
    """awq_compile.json: options, source hashes, one report per linear, embedding and head, better than RTN."""
    found = quantize_model(model, tmp_path / "out", SCHEME, spec(text))
    meta = json.loads((tmp_path / "out" / "awq_compile.json").read_text())
    assert meta["calibration"]["samples"] == 8 and len(meta["calibration"]["text_sha256"]) == 64
    assert meta["calibration"]["source"] == "text.txt"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= meta["source"].keys()
    assert len(found.reports) == 1 + 3 * 7 + 1
    for report in found.reports:
        assert report.error is not None and report.rtn_error is not None
        assert 0 < report.error <= report.rtn_error
        assert report.error < report.rtn_error or "embed" in report.name
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o644}


def test_group_that_does_not_divide_names_those_that_would(model: Path, text: Path, tmp_path: Path) -> None:
    """K = 96 of down_proj: 128 and 64 are refused, 32 is offered."""
    with pytest.raises(UsageError, match=r"128 does not divide K = 64 .* 32 would work"):
        quantize_model(model, tmp_path / "out", QuantScheme.parse("w4g128"), spec(text))
    with pytest.raises(UsageError, match=r"64 does not divide K = 96 of mlp\.down_proj\.weight; .* 32 would work"):
        quantize_model(model, tmp_path / "out", QuantScheme.parse("w4g64"), spec(text))
    assert not list(tmp_path.iterdir())


def test_bad_weights_found_on_the_way_leave_nothing(text: Path, tmp_path: Path) -> None:
    """A NaN in the last layer is met late; the error names the tensor and no directory stays, new parents included."""
    from safetensors.torch import load_file, save_file

    path = make_model(tmp_path / "model", "llama3")
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN or infinite"):
        quantize_model(path, tmp_path / "new" / "deep" / "out", SCHEME, spec(text))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_head_that_overflows_float16_is_refused(text: Path, tmp_path: Path) -> None:
    """A bfloat16 embedding of 70000 cannot be stored in float16."""
    from safetensors.torch import load_file, save_file

    path = make_model(tmp_path / "model", "llama3", dtype="bfloat16")
    state = load_file(path / "model.safetensors")
    state["model.embed_tokens.weight"][3, 4] = 7e4
    save_file(state, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight holds .*70144.* float16"):
        quantize_model(path, tmp_path / "out", QuantScheme.parse("w4g32"), spec(text))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_short_text_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """Refused before the work directory exists."""
    short = write_text(tmp_path / "short.txt", 333, 20)
    with pytest.raises(CalibrationError):
        quantize_model(model, tmp_path / "out", SCHEME, spec(short))
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_a_full_or_unwritable_disk_leaves_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little space from the start; a disk that fills up on the way; a parent that is a file."""
    with monkeypatch.context() as patch:
        usage = work_module.shutil.disk_usage(tmp_path)
        patch.setattr(work_module.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
        with pytest.raises(EnvironmentMissingError, match="MB free, and quantising needs"):
            quantize_model(model, tmp_path / "a" / "out", SCHEME, spec(text))
    calls = 0
    save = work_module.save_file

    def full(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "save_file", full)
        with pytest.raises(EnvironmentMissingError, match="No space left on device"):
            quantize_model(model, tmp_path / "b" / "out", SCHEME, spec(text))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(AwqCompileError, match="cannot be written"):
        quantize_model(model, tmp_path / "file" / "out", SCHEME, spec(text))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_windows_shrink_to_a_short_context(model: Path, text: Path, tmp_path: Path) -> None:
    """A model with a context of 16 tokens is calibrated on windows of 16, and that is said and recorded."""
    path = make_model(tmp_path / "model", "llama3", max_position_embeddings=16)
    seen: list[str] = []
    found = quantize_model(
        path, tmp_path / "out", SCHEME, spec(text), on_progress=lambda _d, _t, _l, message: seen.append(message)
    )
    assert "windows of 16 tokens" in seen[0]
    assert found.meta["calibration"]["length"] == 16


def test_memory_holds_one_layer_at_a_time(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer is read, no tensor of an earlier layer is alive any more."""
    import gc
    import weakref

    from awq_compile.models.weights import Weights

    alive: list[weakref.ref[torch.Tensor]] = []
    leftovers: list[int] = []
    real = Weights.layer

    def layer(self: Weights, index: int) -> dict[str, torch.Tensor]:
        gc.collect()
        leftovers.append(sum(ref() is not None for ref in alive))
        found = real(self, index)
        alive[:] = [weakref.ref(value) for value in found.values() if value.ndim == 2]
        return found

    monkeypatch.setattr(Weights, "layer", layer)
    quantize_model(model, tmp_path / "out", SCHEME, spec(text))
    assert leftovers == [0, 0, 0]


def test_a_sharded_checkpoint_gives_the_same_codes(text: Path, tmp_path: Path) -> None:
    """One file or many: the same arrays."""
    one = make_model(tmp_path / "one", "llama3")
    many = make_model(tmp_path / "many", "llama3", shards=True)
    assert (many / "model.safetensors.index.json").exists()
    edit_json(many / "config.json", transformers_version="x")
    edit_json(one / "config.json", transformers_version="x")
    outputs = [quantize_model(path, tmp_path / f"q-{path.name}", SCHEME, spec(text)).path for path in (one, many)]
    for name in ("embedding", "layer-00000", "layer-00001", "head"):
        first, second = ((path / f"{name}.safetensors").read_bytes() for path in outputs)
        assert first == second
