"""`DistWriter`: what it writes, what it refuses to replace, and what a kill or a full disk leaves behind."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers_models import DEMO, write_model

from awq_compile import artifact
from awq_compile.artifact import DistWriter, disk_error
from awq_compile.chat.config import chat_config
from awq_compile.chat.select import select_template
from awq_compile.errors import ArtifactError, EnvironmentMissingError, ModelError, UsageError
from awq_compile.formats import QuantizedMatrix, QuantScheme, QuantSpec
from awq_compile.limits import CompileOptions
from awq_compile.manifest import CHAT_CONFIG, file_sha256, open_dist
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.models.parameters import model_parameters

CONFIG_KEYS_CPP = ("model_type", "vocab_size", "prefill_chunk_size", "model_config", "conv_template")
CONFIG_KEYS_PYTHON = (
    "quantization",
    "context_window_size",
    "sliding_window_size",
    "attention_sink_size",
    "tensor_parallel_shards",
)
TEMPLATE_KEYS = (
    "system_template",
    "system_message",
    "add_role_after_system_message",
    "roles",
    "messages",
    "seps",
    "role_content_sep",
    "role_empty_sep",
    "stop_str",
    "stop_token_ids",
)


class RandomWeights:
    """Stands in for a `QuantizedModel`: random packed matrices, the same for the same name."""

    def __init__(self, config: ModelConfig, scheme: QuantScheme) -> None:
        self.config, self.scheme = config, scheme

    def _random(self, name: str) -> np.random.Generator:
        return np.random.default_rng(list(name.encode()))

    def matrix(self, name: str) -> QuantizedMatrix | npt.NDArray[np.float16]:
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        spec = self.scheme.head if outer else self.scheme.linear
        linear = name.removesuffix(".weight").partition("model.layers.")[2].partition(".")[2]
        n, k = (self.config.vocab_size, self.config.hidden_size) if outer else self.config.linear_shape(linear)
        random = self._random(name)
        if not isinstance(spec, QuantSpec):
            return random.normal(0, 1, (n, k)).astype(np.float16)
        arrays: dict[str, Any] = {}
        for suffix, (shape, dtype) in spec.arrays(n, k).items():
            arrays[suffix] = random.integers(0, 15, shape).astype(dtype)
        return QuantizedMatrix(spec, **arrays)

    def vector(self, name: str) -> npt.NDArray[np.float16]:
        size = self.config.hidden_size
        return self._random(name).normal(0, 1, size).astype(np.float16)


def model_config(folder: Path) -> ModelConfig:
    """Configuration of the small model, which is written to `folder`."""
    return read_config(write_model(folder))


def write(
    final: Path,
    config: ModelConfig,
    scheme: QuantScheme,
    *,
    tokenizer: Path = DEMO,
    libraries: tuple[str, ...] = ("cpu",),
) -> None:
    """A whole DIST around random weights and a library of a few bytes."""
    with DistWriter(final) as dist:
        dist.write_parameters(model_parameters(config, scheme), RandomWeights(config, scheme))
        names = dist.write_tokenizer(tokenizer)
        sizes = CompileOptions(context_window_size=128, prefill_chunk_size=64, max_batch_size=4)
        plain = select_template(tokenizer, config).template
        text = chat_config(config, scheme, sizes, plain, tokenizer_dir=tokenizer, tokenizer_files=names)
        dist.write_text(CHAT_CONFIG, text)
        for target in libraries:
            dist.library_path("tiny", scheme, target, ".so", {"kind": "llvm"}).write_bytes(b"library")
        dist.manifest("tiny", scheme, asdict(sizes))
        dist.commit()


def tree(folder: Path) -> dict[str, str]:
    """Relative path → digest of every file."""
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["w4g128", "w3g64a", "w8g32-h8", "w4g32a-h4", "w4g32kn", "w3g32akn-h8"])
def test_what_is_written_reads_back(tmp_path: Path, name: str) -> None:
    """Every parameter comes back with the rows of its sources stacked, in MLC's order, for every format."""
    config, scheme = model_config(tmp_path / "model"), QuantScheme.parse(name)
    write(tmp_path / "dist", config, scheme)
    dist = open_dist(tmp_path / "dist")
    dist.verify()
    source = RandomWeights(config, scheme)
    expected: dict[str, npt.NDArray[Any]] = {}
    for parameter in model_parameters(config, scheme):
        stem = parameter.name.removesuffix("weight")
        for tensor in parameter.sources:
            if parameter.spec is None:
                parts: dict[str, npt.NDArray[Any]] = {parameter.name: source.vector(tensor)}
            else:
                matrix = source.matrix(tensor)
                arrays = matrix.arrays() if isinstance(matrix, QuantizedMatrix) else {"weight": matrix}
                parts = {stem + suffix: array for suffix, array in arrays.items()}
            for full, array in parts.items():
                kn = isinstance(parameter.spec, QuantSpec) and parameter.spec.order == "KN"
                expected[full] = np.concatenate([expected[full], array], int(kn)) if full in expected else array
    assert [record.name for record in dist.tensors] == list(expected)
    for record in dist.tensors:
        np.testing.assert_array_equal(dist.read(record), expected[record.name])


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    """Two directories, and one written over another DIST, hold the same bytes, and no machine path."""
    config, scheme = model_config(tmp_path / "model"), QuantScheme.parse("w4g128")
    write(tmp_path / "a", config, scheme)
    write(tmp_path / "b", config, QuantScheme.parse("w8g64"))
    write(tmp_path / "b", config, scheme)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "model"]
    for path in (tmp_path / "a").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_shards_are_filled_up_to_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard takes parameters while they fit, and a larger parameter gets a shard of its own."""
    monkeypatch.setattr(artifact, "SHARD_BYTES", 40_000)
    config, scheme = model_config(tmp_path / "model"), QuantScheme.parse("w4g128")
    write(tmp_path / "dist", config, scheme)
    shards = json.loads((tmp_path / "dist" / "tensor-cache.json").read_text())["records"]
    assert len(shards) > 3
    for shard in shards:
        assert shard["nbytes"] <= 40_000 or len(shard["records"]) == 1
        assert shard["nbytes"] == sum(record["nbytes"] for record in shard["records"])
    open_dist(tmp_path / "dist").verify()


def test_the_mlc_runtime_finds_every_key(tmp_path: Path) -> None:
    """mlc-chat-config.json has the keys that MLC's engines insist on, and stop tokens where they look for them."""
    config, scheme = model_config(tmp_path / "model"), QuantScheme.parse("w4g128")
    write(tmp_path / "dist", config, scheme)
    data = open_dist(tmp_path / "dist").chat_config
    assert [key for key in (*CONFIG_KEYS_CPP, *CONFIG_KEYS_PYTHON) if key not in data] == []
    assert [key for key in TEMPLATE_KEYS if key not in data["conv_template"]] == []
    assert data["model_config"]["vocab_size"] == data["vocab_size"] == config.vocab_size
    assert data["model_config"]["prefill_chunk_size"] == data["prefill_chunk_size"] == 64
    assert data["conv_template"]["stop_token_ids"] == [1]
    assert all((tmp_path / "dist" / name).is_file() for name in data["tokenizer_files"])


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    """When writing fails half way, neither the final nor the hidden directory stays."""
    with pytest.raises(ModelError, match=r"tokenizer\.json"), DistWriter(tmp_path / "dist") as dist:
        dist.write_text("some.json", "{}")
        dist.write_tokenizer(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), DistWriter(tmp_path / "new" / "folders" / "dist"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_only_a_dist_is_replaced(tmp_path: Path) -> None:
    """A directory with anything else in it, and a file, are refused and left alone."""
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_text("x")
    with pytest.raises(UsageError, match="not written by awq-compile"), DistWriter(other):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not a directory"), DistWriter(tmp_path / "file"):
        pass
    assert [p.name for p in other.iterdir()] == ["a.jpg"]
    (tmp_path / "empty").mkdir()
    config = model_config(tmp_path / "model")
    write(tmp_path / "empty", config, QuantScheme.parse("w4g128"))
    open_dist(tmp_path / "empty")


@pytest.mark.parametrize("name", [".dist.partial", ".dist.old"])
@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_lies_where_we_work_is_left_alone(tmp_path: Path, name: str, what: str) -> None:
    """Something of the user's with the name of a hidden sibling is refused by name, before any work."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    if what == "folder":
        (tmp_path / "mine").rename(tmp_path / name)
    elif what == "file":
        (tmp_path / name).write_text("x")
    else:
        (tmp_path / name).symlink_to(tmp_path / "mine")
    before = tree(tmp_path)
    for refuse in (artifact.check_output, lambda final: DistWriter(final).__enter__()):
        with pytest.raises(UsageError, match=rf"/{name} is needed .* did not write"):
            refuse(tmp_path / "dist")
    assert tree(tmp_path) == before and not (tmp_path / "dist").exists()


def test_a_dist_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    """Files that the user put into a DIST are named, and stay, also those that appear while another is written."""
    config, scheme = model_config(tmp_path / "model"), QuantScheme.parse("w4g128")
    write(tmp_path / "dist", config, scheme)
    refused = pytest.raises(UsageError, match=r"manifest\.json does not name.*: lib/notes\.txt")
    with refused, DistWriter(tmp_path / "dist") as dist:
        (tmp_path / "dist" / "lib" / "notes.txt").write_text("mine")
        dist.manifest("tiny", scheme, {})
        dist.commit()
    before = tree(tmp_path / "dist")
    with pytest.raises(UsageError, match=r"lib/notes\.txt"):
        artifact.check_output(tmp_path / "dist")
    assert tree(tmp_path / "dist") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dist", "model"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    """A second process that writes the same DIST is told to wait."""
    with DistWriter(tmp_path / "dist"):
        code = "import sys; from pathlib import Path; from awq_compile.artifact import DistWriter\n"
        code += "with DistWriter(Path(sys.argv[1])): pass"
        command = [sys.executable, "-c", code, str(tmp_path / "dist")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another awq-compile is writing" in done.stderr


def test_exchange_falls_back_to_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system cannot swap two names, the old DIST is moved aside and then removed."""
    monkeypatch.setattr(artifact, "_exchange", lambda one, other: False)
    config = model_config(tmp_path / "model")
    write(tmp_path / "dist", config, QuantScheme.parse("w8g64"))
    write(tmp_path / "dist", config, QuantScheme.parse("w4g128"))
    assert open_dist(tmp_path / "dist").manifest.scheme == "w4g128"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dist", "model"]


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
sys.path.insert(0, {unit!r})
import test_artifact as t
from awq_compile import artifact, ours
from awq_compile.formats import QuantScheme
from awq_compile.models.config import read_config

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

point = {point!r}
if point == "parameters":
    calls = []
    real = t.RandomWeights.matrix
    t.RandomWeights.matrix = lambda self, name: die() if len(calls) > 5 else (calls.append(name), real(self, name))[1]
elif point == "exchanged":
    real_exchange = artifact._exchange
    artifact._exchange = lambda one, other: real_exchange(one, other) and die()
elif point == "removing":
    clear = ours.clear
    ours.clear = lambda folder, *kept: (clear(folder, *kept), die())
elif point == "renamed":
    artifact._exchange = lambda one, other: False
    real_rename = Path.rename
    Path.rename = lambda self, to: (real_rename(self, to), to.name.endswith(".old") and die())
else:
    setattr(artifact.DistWriter, point, die)
t.write(Path({final!r}), read_config(Path({model!r})), QuantScheme.parse("w4g128"))
"""


BEFORE_RENAME = ("parameters", "write_tokenizer", "write_text", "manifest", "commit")


@pytest.mark.parametrize(
    ("point", "before"),
    [
        *((point, before) for point in BEFORE_RENAME for before in (False, True)),
        ("exchanged", True),
        ("removing", True),
        ("renamed", True),
    ],
)
def test_a_kill_leaves_no_partial_dist(tmp_path: Path, point: str, before: bool) -> None:
    """After SIGKILL at any point the final name holds nothing or a whole DIST, and the next run ends in equal bytes."""
    model, final = write_model(tmp_path / "model"), tmp_path / "out" / "dist"
    config, scheme = read_config(model), QuantScheme.parse("w4g128")
    write(tmp_path / "undisturbed", config, scheme)
    if before:
        write(final, config, QuantScheme.parse("w8g64"))
    here = Path(__file__).parent
    code = _KILLED.format(point=point, final=str(final), model=str(model), tests=str(here.parent), unit=str(here))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if final.exists():
        found = open_dist(final)
        found.verify()
        assert found.manifest.scheme == ("w4g128" if point in ("exchanged", "removing") else "w8g64")
    else:
        assert not before or point == "renamed"
    write(final, config, scheme)
    assert tree(final) == tree(tmp_path / "undisturbed")
    assert [p.name for p in final.parent.iterdir()] == ["dist"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; where mounting is not allowed, a limit on the size of a file."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=False, capture_output=True
        ).returncode
        == 0
    ):
        yield folder
        subprocess.run(["umount", folder], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_clear_error(tmp_path: Path, small_disk: Path) -> None:
    """Running out of space says so, with the path, and leaves the disk as it was."""
    config = model_config(tmp_path / "model")
    with pytest.raises(EnvironmentMissingError, match=r"cannot write .*dist: the (disk is full|file would exceed)"):
        write(small_disk / "dist", config, QuantScheme.parse("w8g32"))
    assert list(small_disk.iterdir()) == []


def test_disk_errors_of_other_libraries_are_recognised() -> None:
    """The text of an error without errno is enough; another error stays what it is."""
    found = disk_error(RuntimeError("ld: write failed: No space left on device (os error 28)"), "x")
    assert found is not None and "the disk is full" in str(found)
    assert disk_error(RuntimeError("no such function")) is None
    assert disk_error(OSError(13, "Permission denied", "/x")) is not None


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A source whose rows do not stack to the parameter's shape stops the job, naming the parameter."""
    config, scheme = model_config(tmp_path / "model"), QuantScheme.parse("w4g128")
    source = RandomWeights(config, QuantScheme.parse("w4g64"))
    with pytest.raises(ArtifactError, match=r"qkv_proj\.q_scale"), DistWriter(tmp_path / "dist") as dist:
        dist.write_parameters(model_parameters(config, scheme), source)


def test_unwritable_parent(tmp_path: Path) -> None:
    """A path through a file cannot be made, and the error says which and why."""
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentMissingError, match=r"dist: "), DistWriter(tmp_path / "file" / "dist"):
        pass
