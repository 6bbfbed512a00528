"""The engine on a small floating-point library: against transformers, and on damaged directories."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_build import save_hf_config
from helpers_dist import write_float_dist, write_manifest
from transformers import LlamaConfig, LlamaForCausalLM

from awq_compile.cli.main import main
from awq_compile.errors import ArtifactError, UsageError
from awq_compile.limits import CompileOptions
from awq_compile.manifest import Dist, LibraryEntry, open_dist
from awq_compile.runtime.engine import Engine, library_for_here, sample

SIZES = CompileOptions(context_window_size=80, prefill_chunk_size=16, max_batch_size=2)
LIBRARY = "lib/tiny-cpu.so"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("engine")
    hf_config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=59,
        max_position_embeddings=80,
        initializer_range=0.2,
    )
    hf = LlamaForCausalLM(hf_config).eval()
    config = save_hf_config(hf_config, folder / "hf", "LlamaForCausalLM")
    write_float_dist(folder / "dist", config, hf.state_dict(), SIZES)
    return hf, folder / "dist"


@pytest.fixture(scope="module")
def engine(made: tuple[Any, Path]) -> Engine:
    return Engine(made[1])


def test_logits_of_every_position(made: tuple[Any, Path], engine: Engine) -> None:
    """Longer than the chunk size, so in chunks; a second call starts afresh."""
    for seed in (0, 1):
        tokens = np.random.default_rng(seed).integers(0, 59, 43)
        with torch.no_grad():
            expected = made[0](torch.tensor(tokens[None])).logits[0].numpy()
        np.testing.assert_allclose(engine.logits(tokens), expected, rtol=0, atol=5e-5)


def test_greedy_text_is_that_of_transformers(made: tuple[Any, Path], engine: Engine) -> None:
    prompt = [3, 14, 15, 9, 2, 6] * 4
    expected = made[0].generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert list(engine.generate(prompt, max_tokens=40)) == expected[0, len(prompt) :].tolist()


def test_padding_of_the_vocabulary_is_not_chosen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the LM head behind the tokenizer's last token."""
    assert max(engine.generate([3, 14, 15], max_tokens=20)) >= 7
    monkeypatch.setattr(engine, "metadata", replace(engine.metadata, active_vocab_size=7))
    for temperature in (0.0, 2.0):
        assert max(engine.generate([3, 5, 6], max_tokens=20, temperature=temperature)) < 7


def test_stop_tokens_end_a_generation(engine: Engine) -> None:
    """The stop token is not given out; those of mlc-chat-config.json are known."""
    tokens = list(engine.generate([5, 6, 7], max_tokens=20))
    stop = tokens[7]
    assert list(engine.generate([5, 6, 7], max_tokens=20, stop_ids={stop})) == tokens[: tokens.index(stop)]
    assert engine.stop_ids == {1}


def test_a_seed_repeats_a_sampled_text(engine: Engine) -> None:
    def run(seed: int) -> list[int]:
        return list(engine.generate([5], max_tokens=30, temperature=1.5, top_p=0.9, seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_context_window(engine: Engine) -> None:
    """Without a limit a text ends with the window; what cannot fit is refused before anything runs."""
    assert len(list(engine.generate([4] * 70))) == 10
    assert len(list(engine.generate([4] * 70, max_tokens=10))) == 10
    with pytest.raises(UsageError, match=r"70 tokens, and 11 new ones do not fit.* 80 tokens") as caught:
        engine.generate([4] * 70, max_tokens=11)
    assert caught.value.hint == "--max-tokens 10"
    with pytest.raises(UsageError, match="80 tokens, and no room"):
        engine.generate([4] * 80)
    with pytest.raises(UsageError, match="81 tokens do not fit"):
        engine.logits([4] * 81)
    assert engine.logits([4] * 80).shape == (80, 59)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": [1, 59]}, "token id 59 is outside the vocabulary of 59"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [1], "temperature": -0.5}, "temperature is -0.5"),
        ({"prompt": [1], "top_p": 0.0}, "top-p 0.0"),
    ],
)
def test_unusable_requests(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.generate(**arguments)


def test_sampling_follows_the_distribution() -> None:
    """Frequencies of many draws; top-p keeps the smallest set that reaches it, and always one token."""
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    random = np.random.default_rng(0)
    drawn = np.bincount([sample(logits, 1.0, 1.0, random) for _ in range(8000)], minlength=4) / 8000
    np.testing.assert_allclose(drawn, [0.1, 0.5, 0.15, 0.25], atol=0.02)
    drawn = np.bincount([sample(logits, 1.0, 0.7, random) for _ in range(8000)], minlength=4) / 8000
    np.testing.assert_allclose(drawn, [0, 2 / 3, 0, 1 / 3], atol=0.02)
    assert {sample(logits, 1.0, 1e-9, random) for _ in range(50)} == {1}
    assert sample(logits, 0.0, 1.0, random) == 1
    assert sample(np.array([0, 1e30, -1e30], np.float32), 1e-3, 1.0, random) == 1


def test_bench_reports_speeds(engine: Engine) -> None:
    result = engine.bench(20, 3, runs=2)
    assert 0 < result.prefill.least <= result.prefill.median <= result.prefill.most
    assert 0 < result.decode.least <= result.decode.median <= result.decode.most
    assert result.peak_memory_bytes > 1 << 20


def test_the_library_that_runs_here_is_taken(made: tuple[Any, Path], tmp_path: Path) -> None:
    """Whatever stands before it; a target that is named is taken, and one that no CPU loads is refused."""
    dist = open_dist(made[1])
    cpu = dist.manifest.libraries["cpu"]
    other = LibraryEntry("lib/other.so", {"kind": "llvm"})
    phone = LibraryEntry("lib/phone.tar", {"kind": "opencl"})

    def having(**libraries: LibraryEntry) -> Dist:
        return replace(dist, manifest=replace(dist.manifest, libraries=libraries))

    several = having(phone=phone, other=other, cpu=cpu)
    assert library_for_here(several) == Engine(several)._library == dist.path / LIBRARY
    assert library_for_here(several, "other") == library_for_here(having(phone=phone, other=other))
    for wrong, hint in ((several, "--target cpu"), (having(phone=phone), "compile for this machine")):
        with pytest.raises(ArtifactError, match=r"lib/phone.tar is no library that this machine's CPU loads") as caught:
            library_for_here(wrong, "phone")
        assert (caught.value.hint or "").startswith(hint)
    with pytest.raises(UsageError, match="no library for target 'vulkan', only for phone, other, cpu"):
        library_for_here(several, "vulkan")
    with pytest.raises(ArtifactError, match="names no library"):
        library_for_here(having())


def test_verbs_name_the_library(made: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """run, bench and eval have --target; one that DIST lacks is a usage error."""
    for words in (["run", "--prompt", "x"], ["bench"], ["eval"]):
        verb, *rest = words
        assert main([verb, str(made[1]), *rest, "--target", "metal"]) == 2
        assert "no library for target 'metal', only for cpu" in capsys.readouterr().err


def test_bench_fits_the_context_window(made: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """By default; what is asked for and does not fit is named with the option that would."""
    assert main(["bench", str(made[1]), "--runs", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prefill_tokens"], found["decode_tokens"]) == (40, 40)
    for words, hint in ((["--prompt-tokens", "99999"], "--prompt-tokens 40"), (["--new-tokens", "80"], "--new-tokens")):
        assert main(["bench", str(made[1]), *words]) == 2
        err = capsys.readouterr().err
        assert "do not fit the library's context window of 80" in err and f"hint: {hint}" in err


def _edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))
        if name != "manifest.json":
            write_manifest(folder, LIBRARY)

    return apply


def _record(data: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = data["records"][0]["records"][0]
    return record


def _flip_library_byte(folder: Path) -> None:
    data = bytearray((folder / LIBRARY).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / LIBRARY).write_bytes(data)


def _no_library(folder: Path) -> None:
    (folder / LIBRARY).write_bytes(b"\x7fELF not really")
    write_manifest(folder, LIBRARY)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "no library": (lambda f: (f / LIBRARY).unlink(), "tiny-cpu.so is missing"),
    "changed library": (_flip_library_byte, "sha256"),
    "not a library": (_no_library, "cannot be loaded"),
    "no shard": (lambda f: (f / "params_shard_1.bin").unlink(), "params_shard_1.bin is missing"),
    "short shard": (lambda f: (f / "params_shard_0.bin").write_bytes(b"1234"), "params_shard_0.bin: 4 bytes"),
    "no chat config": (lambda f: (f / "mlc-chat-config.json").unlink(), "mlc-chat-config.json is missing"),
    "parameter renamed": (_edit("tensor-cache.json", lambda d: _record(d).update(name="x")), "it is missing"),
    "parameter reshaped": (
        _edit("tensor-cache.json", lambda d: _record(d).update(shape=_record(d)["shape"][::-1])),
        r"embed_tokens.weight as float32 \(59, 48\), and it is float32 \(48, 59\)",
    ),
    "parameter outside": (_edit("tensor-cache.json", lambda d: _record(d).update(byteOffset=1 << 40)), "outside"),
    "another file": (
        _edit("tensor-cache.json", lambda d: d["records"][0].update(dataPath="../x")),
        "not a path within",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damaged_directories(made: tuple[Any, Path], tmp_path: Path, kind: str) -> None:
    """Each gives one ArtifactError that names the file or the parameter."""
    shutil.copytree(made[1], tmp_path / "dist")
    damage, message = DAMAGE[kind]
    damage(tmp_path / "dist")
    with pytest.raises(ArtifactError, match=message):
        Engine(tmp_path / "dist")


def test_chat_config_without_a_vocabulary(made: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "dist")
    _edit("mlc-chat-config.json", lambda d: d.update(vocab_size="many"))(tmp_path / "dist")
    with pytest.raises(ArtifactError, match="vocab_size is 'many'"):
        Engine(tmp_path / "dist").logits([1])


def test_threads_in_a_fresh_process(made: tuple[Any, Path]) -> None:
    """TVM's default is half of the processors; the engine uses as many threads as asked, and needs no torch."""
    program = (
        "import sys; from pathlib import Path; from awq_compile.runtime.engine import Engine;"
        "engine = Engine(Path(sys.argv[1]), threads=2); engine.logits([1, 2]); print(engine.threads);"
        "import tvm; print(tvm.get_global_func('runtime.NumThreads')(), {'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(made[1])], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2", "set()"]
