"""The main job and the verbs around it, on small models, with a stand-in for the compiler."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cli import Run
from helpers_models import write_model

from awq_compile import verification
from awq_compile.contract import check
from awq_compile.contract.check import require_contract
from awq_compile.manifest import open_dist
from awq_compile.verification import Verification, round_up

pytestmark = pytest.mark.usefixtures("no_compiler")
RTN = ("--method", "rtn")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model."""
    return write_model(tmp_path / "tiny")


def files(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_main_job(run: Run, model: Path) -> None:
    """A DIST appears under dist/<model>-<scheme>, whole, and the words say where things are."""
    code, out, err = run(model, *RTN)
    assert code == 0, err
    dist = Path("dist/tiny-w4g128")
    open_dist(dist).verify()
    assert "dist/tiny-w4g128/report.html" in out and "bits per weight" in out
    assert "compiling for cpu" in err
    assert {"report.json", "report.html", "lib/tiny-w4g128-cpu.so"} <= files(dist).keys()
    assert [p.name for p in Path("dist").iterdir()] == ["tiny-w4g128"]


def test_json_owns_stdout(run: Run, model: Path) -> None:
    """With --json stdout is one JSON value, and people's words go to stderr."""
    code, out, err = run(model, *RTN, "--json")
    data = json.loads(out)
    assert code == 0 and data["report"]["scheme"] == "w4g128"
    assert "report.html" in err
    assert json.loads((Path(data["dist"]) / "report.json").read_text()) == data["report"]


def test_equal_runs_give_equal_bytes(run: Run, model: Path, private_cache: Path) -> None:
    """From the cache, into another folder, or after the cache is gone: the same bytes."""
    assert run(model, *RTN)[0] == 0
    assert run(model, *RTN, "-o", "other")[0] == 0
    first = files(Path("dist/tiny-w4g128"))
    assert files(Path("other")) == first
    subprocess.run(["rm", "-r", str(private_cache)], check=True)
    assert run(model, *RTN)[0] == 0
    assert files(Path("dist/tiny-w4g128")) == first


def test_a_checkpoint_compiles_to_the_same_parameters(run: Run, model: Path) -> None:
    """quantize, then compile from the checkpoint: the parameters of the main job."""
    assert run("quantize", model, "-o", "q", *RTN)[0] == 0
    assert run("q", "-o", "from-q")[0] == 0
    assert run(model, *RTN, "-o", "direct")[0] == 0
    for name in ("params_shard_0.bin", "tensor-cache.json", "mlc-chat-config.json"):
        assert (Path("from-q") / name).read_bytes() == (Path("direct") / name).read_bytes()
    code, _, err = run("q", "--scheme", "w3g64")
    assert code == 2 and "is quantised as w4g128, and w3g64 was asked for" in err
    code, _, err = run("quantize", "q", "-o", "q2")
    assert code == 2 and "quantised already" in err


def test_scheme_options(run: Run, model: Path) -> None:
    """Single options and --scheme describe the same thing, and not both at once."""
    assert run(model, *RTN, "--bits", "3", "--group-size", "64", "--asymmetric", "--head-bits", "8")[0] == 0
    assert open_dist(Path("dist/tiny-w3g64a-h8")).manifest.scheme == "w3g64a-h8"
    assert run(model, "--scheme", "w4g32", "--bits", "4")[0] == 2
    assert run(model, "--head-bits", "5")[0] == 2
    assert run(model, "--method", "gptq")[0] == 2


def test_orders_share_one_quantisation(run: Run, model: Path) -> None:
    """KN is a DIST of its own from the same checkpoint, transposed; a CPU reads NK only, and says so."""
    assert run(model, *RTN, "-t", "android", "-o", "nk")[0] == 0
    assert run(model, *RTN, "-t", "android", "--scheme", "w4g32kn")[0] == 0
    kn, nk = open_dist(Path("dist/tiny-w4g32kn")), open_dist(Path("nk"))
    assert (kn.manifest.scheme, nk.manifest.scheme) == ("w4g32kn", "w4g32")
    assert kn.chat_config["quantization"] == "w4g32kn"
    for one, other in zip(kn.tensors, nk.tensors, strict=True):
        a, b = kn.read(one), nk.read(other)
        linear = "layers" in one.name and "q_" in one.name.rpartition(".")[2]
        assert one.name == other.name and np.array_equal(a, b.T if linear else b)
    assert run("quantize", model, "-o", "q", *RTN, "--scheme", "w4g32")[0] == 0
    assert run("q", "-t", "android", "--scheme", "w4g32kn", "-o", "from-q")[0] == 0
    assert (Path("from-q") / "params_shard_0.bin").read_bytes() == (kn.path / "params_shard_0.bin").read_bytes()
    code, _, err = run(model, *RTN, "-t", "android", "-t", "cpu", "--scheme", "w4g32kn")
    assert code == 2 and "cpu reads weights in the order NK, and w4g32kn has them in KN" in err
    code, _, err = run("quantize", model, "-o", "q2", *RTN, "--scheme", "w4g32kn")
    assert code == 2 and "quantise as w4g32, then" in err


def test_one_scheme_for_several_targets(run: Run, model: Path) -> None:
    """A phone among them: group 32, symmetric, NK."""
    assert run(model, *RTN, "-t", "cpu", "-t", "android", "-t", "vulkan")[0] == 0
    assert run(model, *RTN, "-t", "cpu", "-t", "vulkan")[0] == 0
    assert sorted(p.name for p in Path("dist").iterdir()) == ["tiny-w4g128", "tiny-w4g32"]


def test_current_directory(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MODEL the current directory is taken if it holds a config.json, else the error names scripts/demo."""
    code, _, err = run()
    assert code == 2 and "scripts/demo" in err
    monkeypatch.chdir(model)
    assert run(*RTN)[0] == 0
    assert Path("dist/tiny-w4g128/manifest.json").is_file()


def test_limits(run: Run, model: Path) -> None:
    """Limits reach the configuration, and a window beyond the model's is refused."""
    assert run(model, *RTN, "--context-window-size", "64", "--max-batch-size", "2", "-o", "d")[0] == 0
    config = open_dist(Path("d")).chat_config
    assert (config["context_window_size"], config["prefill_chunk_size"], config["max_batch_size"]) == (64, 64, 2)
    code, _, err = run(model, *RTN, "--context-window-size", "129", "-o", "e")
    assert code == 2 and "129 is more than the model's own 128" in err


def test_cuda_graphs(run: Run, model: Path) -> None:
    """Recorded for verify, with other targets beside CUDA; refused where no target is CUDA."""
    assert run(model, *RTN, "-t", "cuda:sm_90", "-t", "cpu", "--cuda-graphs", "-o", "d")[0] == 0
    assert open_dist(Path("d")).manifest.options["cuda_graphs"] is True
    assert "cuda_graphs True" in run("inspect", "d")[1]
    assert run(model, *RTN, "-t", "cpu", "-o", "e")[0] == 0
    assert "cuda_graphs" not in run("inspect", "e")[1]
    code, _, err = run(model, *RTN, "-t", "cpu", "--cuda-graphs", "-o", "f")
    assert code == 2 and "--cuda-graphs is for CUDA" in err


def test_inspect(run: Run, model: Path) -> None:
    """inspect tells a DIST from a checkpoint, and finds a changed byte with --verify."""
    run(model, *RTN, "-o", "d")
    run("quantize", model, "-o", "q", *RTN)
    code, out, _ = run("inspect", "d", "--json", "--verify")
    assert code == 0 and json.loads(out)["kind"] == "dist"
    code, out, _ = run("inspect", "q", "--json")
    assert code == 0 and len(json.loads(out)["layers"]) == 14
    library = Path("d/lib/tiny-w4g128-cpu.so")
    library.write_bytes(b"LIBRARY")
    assert run("inspect", "d")[0] == 0
    code, _, err = run("inspect", "d", "--verify")
    assert code == 1 and "sha256" in err
    code, _, err = run("inspect", model)
    assert code == 1 and "not a compiled model" in err


def test_a_library_that_is_wrong_is_not_packaged(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that differ from torch's stop the job, and nothing appears."""
    bad = Verification(ran=True, tokens=48, max_difference=0.5)
    monkeypatch.setattr(verification, "verify_library", lambda *a: bad)
    code, _, err = run(model, *RTN)
    assert code == 1 and "differ from torch's by 0.5" in err
    assert not Path("dist").exists()


def test_a_library_that_breaks_the_contract_is_not_packaged(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the MLC runtime could not load stops the job, and nothing appears."""
    monkeypatch.setattr(check, "require_contract", require_contract)
    code, _, err = run(model, *RTN)
    assert code == 1 and "MLC's runtime would not take what was compiled" in err
    assert "tiny-w4g128-cpu.so" in err and "not an object file" in err
    assert not Path("dist").exists()


def test_doctor_and_targets(run: Run) -> None:
    """Both answer, for people and as JSON."""
    code, out, _ = run("doctor", "--json")
    assert code == 0 and all(finding["good"] for finding in json.loads(out)["findings"] if finding["needed"])
    code, out, _ = run("targets", "--json")
    assert code == 0 and "cpu" in [target["name"] for target in json.loads(out)]
    assert "cpu:aarch64-linux-gnu" in run("targets")[1]


def change_config(**changed: Any) -> Callable[[Path], None]:
    """Edits config.json."""

    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def pickled(model: Path) -> None:
    """Replaces the weights by a pickle."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated(model: Path) -> None:
    """Cuts the weights."""
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)


def escaping(model: Path) -> None:
    """An index that names a file outside."""
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')


def without(name: str) -> Callable[[Path], None]:
    """Removes a file."""
    return lambda model: (model / name).unlink()


REFUSED: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "no config": (without("config.json"), [], 1, "config.json does not exist"),
    "no weights": (without("model.safetensors"), [], 1, "holds neither"),
    "no tokenizer": (without("tokenizer.json"), [], 1, "tokenizer.json"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), [], 1, "expected a JSON object"),
    "unknown architecture": (
        change_config(architectures=["LamaForCausalLM"]),
        [],
        1,
        "did you mean a LlamaForCausalLM",
    ),
    "remote code": (change_config(auto_map={"AutoModel": "x.Y"}), [], 1, "needs remote code"),
    "contradicting shapes": (change_config(intermediate_size=384), [], 1, "[256, 128]"),
    "pickle": (pickled, [], 1, "pickle"),
    "truncated": (truncated, [], 1, "not a whole safetensors file"),
    "index escapes": (escaping, [], 1, "../x.safetensors"),
    "other tool": (change_config(quantization_config={"quant_method": "awq"}), [], 2, "quant_method 'awq'"),
    "autogptq": (lambda m: (m / "quantize_config.json").write_text("{}"), [], 2, "not available in this version"),
    "group": (change_config(), ["--group-size", "16"], 2, "group size must be one of"),
    "bits": (change_config(), ["--bits", "5"], 2, "bits must be one of"),
    "scheme": (change_config(), ["--scheme", "q4f32_1"], 2, "unknown quantisation format"),
    "target": (change_config(), ["--target", "cpi"], 2, "did you mean cpu"),
    "triple": (change_config(), ["--target", "cpu:!"], 2, "not an LLVM triple"),
    "calib missing, not read": (change_config(), ["--method", "rtn", "--calib", "none.txt"], 1, "none.txt"),
    "batch": (change_config(), ["--max-batch-size", "1000000000000"], 2, "1000000000000 is more than 524287"),
    "calib missing": (change_config(), ["--method", "awq", "--calib", "none.txt"], 1, "none.txt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(run: Run, model: Path, name: str, private_cache: Path) -> None:
    """Each unusable input: one clear error, its exit code, and nothing left behind."""
    change, words, code, message = REFUSED[name]
    change(model)
    found, out, err = run(model, *(() if "--method" in words else RTN), *words)
    assert (found, out) == (code, ""), err
    assert message in err and "Traceback" not in err
    assert list(Path().iterdir()) == []
    assert not private_cache.exists() or not [p for p in private_cache.rglob("*") if p.is_file()]


def test_group_size_that_does_not_divide(run: Run, tmp_path: Path) -> None:
    """The matrix, its K and a group size that would do are named."""
    model = write_model(tmp_path / "odd", intermediate_size=192)
    code, _, err = run(model, *RTN)
    assert code == 2
    assert "K = 192" in err and "--group-size 64" in err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("text", ["", "too short"])
def test_calibration_text_too_short(run: Run, model: Path, tmp_path: Path, text: str) -> None:
    """An empty and a too short calibration text are refused before anything is written."""
    (tmp_path / "calib.txt").write_text(text)
    code, _, err = run(model, "--calib", tmp_path / "calib.txt")
    assert code == 1 and "calib.txt" in err
    assert list(Path().iterdir()) == []


def test_rounding_says_that_it_reads_no_text(run: Run, model: Path, tmp_path: Path) -> None:
    """A calibration text beside --method rtn, of the main job and of quantize."""
    text = tmp_path / "calib.txt"
    text.write_text("x")
    for words in ((model,), ("quantize", model, "-o", "q")):
        code, _, err = run(*words, *RTN, "--calib", text)
        assert code == 0 and "calib.txt is not read" in err


def test_an_evaluated_rounding_is_no_awq(run: Run, model: Path, tmp_path: Path) -> None:
    """Rows of the report: the original, what was made, and no row for a method that was not used."""
    text = tmp_path / "text.txt"
    text.write_text("Now is the winter of our discontent. " * 40)
    code, out, err = run(model, *RTN, "--target", "cpu:aarch64-linux-gnu", "--eval", text, "--json")
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["report"]["evaluation"]["rows"]] == ["original", "rtn"]


@pytest.mark.parametrize("content", [None, "too short", b"\xff\xfe\xff"])
def test_an_evaluation_text_is_checked_first(
    run: Run, model: Path, tmp_path: Path, content: str | bytes | None, private_cache: Path
) -> None:
    """A missing, a too short and a binary text: one error that names the option, before anything is quantised."""
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    for words, option in (((model, *RTN, "--eval"), "--eval FILE"), (("eval", model, "--text"), "--text FILE")):
        code, out, err = run(*words, text)
        assert (code, out) == (1, "") and "text.txt" in err and "rounding" not in err
        assert f"hint: {option} with UTF-8 text of " in err and "--calib" not in err
    assert list(Path().iterdir()) == [] and not private_cache.exists()


@pytest.mark.parametrize("name", ["model.onnx", "folder"])
def test_onnx_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    """An .onnx file, or a folder with nothing else, is not available in this version."""
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"onnx")
    else:
        path.mkdir()
        (path / "model.onnx").write_bytes(b"onnx")
    code, _, err = run(path)
    assert code == 2 and "not available in this version" in err


def test_missing_models(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that does not exist is a usage error, a hub id without a hub an environment error."""
    assert run("no/such/model/here")[0] == 2
    code, _, err = run("none.onnx")
    assert code == 2 and "not available" in err
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    code, _, err = run("organisation/model-1B")
    assert code == 3 and "cannot be reached" in err
    code, _, err = run(tmp_path / "cache", *RTN)
    assert code == 2


def test_hub_downloads_take_no_code_and_no_pickle(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id fetches safetensors, JSON and tokenizer files only, and names the output after the model."""
    import fnmatch

    import huggingface_hub

    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    code, _, err = run("organisation/Model-1B", *RTN)
    assert code == 0, err
    assert Path("dist/Model-1B-w4g128").is_dir()
    taken = [n for n in ("modeling.py", "pytorch_model.bin", "a.pt") if any(fnmatch.fnmatch(n, p) for p in asked[0])]
    assert taken == []
    assert any(fnmatch.fnmatch("model-00001-of-00002.safetensors", p) for p in asked[0])


def test_output_that_is_taken(run: Run, model: Path) -> None:
    """A folder with other files is refused before the model is quantised, and left alone."""
    Path("mine").mkdir()
    Path("mine/file").write_text("x")
    code, _, err = run(model, *RTN, "-o", "mine")
    assert code == 2 and "not written by awq-compile" in err
    assert "rounding" not in err
    assert [p.name for p in Path("mine").iterdir()] == ["file"]
    assert run(model, *RTN, "-o", "mine/file")[0] == 2
    assert run(model, *RTN, "-o", "mine/file/dist")[0] == 3


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written, also by root where mounting is allowed."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)]
    if os.getuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    elif os.getuid() == 0:
        yield Path("/proc/1/fdinfo")  # root may write anything but here
    else:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)


def test_unwritable_output(run: Run, model: Path, read_only: Path) -> None:
    """An output that cannot be written ends with 3 and names the path."""
    code, _, err = run(model, *RTN, "-o", read_only / "dist")
    assert code == 3 and "cannot write" in err and "dist" in err and "rounding" not in err


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        ("-o", "file/sub", "a part of the path is not a directory"),
        ("-o", "/proc/dist", "no folder can be made there"),
        ("-o", "x" * 300, "the name is too long"),
        ("-o", "x" * 250, "the name is too long"),  # that of what is written until the end
        ("--dump", "file", "a file of that name is in the way"),
        ("--dump", "/proc/dist", "no folder can be made there"),
        ("--dump", "x" * 300, "the name is too long"),
    ],
)
def test_folders_that_cannot_be_made(run: Run, model: Path, option: str, name: str, reason: str) -> None:
    """Each option names its own folder before anything is quantised, and leaves nothing."""
    Path("file").write_text("x")
    code, out, err = run(model, *RTN, option, name)
    assert (code, out) == (3, "") and "rounding" not in err
    assert "cannot write" in err and name in err and reason in err
    assert f"choose another folder with {option} DIR" in err
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_what_is_checked_is_taken_back(run: Run, model: Path) -> None:
    """A model that is refused after its output was found writable leaves no folder."""
    (model / "tokenizer.json").unlink()
    assert run(model, *RTN, "-o", "a/b/c", "--dump", "d/e")[0] == 1
    assert list(Path().iterdir()) == []


def test_run_refuses_what_is_no_dist(run: Run, model: Path) -> None:
    """run, bench and eval on something else say so."""
    code, _, err = run("run", model, "--prompt", "x")
    assert code == 1 and "not a compiled model" in err
    assert run("bench", model)[0] == 1
    code, _, err = run("eval", "nothing-here")
    assert code == 2 and "does not exist" in err


def test_rounding_up_for_the_report() -> None:
    """Differences are reported as the next of 1, 2, 5 × 10^k."""
    cases = [(0, 0), (1e-6, 1e-6), (1.1e-6, 2e-6), (3e-4, 5e-4), (7, 10), (5.0001, 10)]
    assert [round_up(value) for value, _ in cases] == [expected for _, expected in cases]


def test_conversation_templates(run: Run, model: Path, tmp_path: Path) -> None:
    """What the model's template cannot give is said; a file replaces it, and a wrong one ends the job at once."""
    code, _, err = run(model, *RTN)
    assert code == 0 and "the model has no chat template" in err
    file = tmp_path / "form.json"
    file.write_text(json.dumps({"roles": {"user": "U:", "assistant": "A:"}, "seps": ["|"]}))
    code, _, err = run(model, *RTN, "-o", "own", "--conv-template", file)
    assert code == 0 and "chat template" not in err
    template = open_dist(Path("own")).chat_config["conv_template"]
    assert template["roles"]["user"] == "U:" and template["stop_token_ids"] == [1]
    file.write_text('{"roles": 5, "seps": [""]}')
    code, _, err = run(model, *RTN, "-o", "wrong", "--conv-template", file)
    assert code == 2 and "form.json: roles is 5" in err
    assert not Path("wrong").exists()
