"""mlc-package-config.json and mlc-app-config.json, and the names of the libraries in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_phone import write_dist

from awq_compile.cli.main import main
from awq_compile.compiler import model_lib, system_lib_prefix
from awq_compile.deploy.package import estimated_vram_bytes, merge, model_id
from awq_compile.errors import ArtifactError, UsageError
from awq_compile.manifest import open_dist


def resolve(config: dict[str, Any], folder: Path) -> None:
    """What mlc_llm package demands of every entry, in a working directory."""
    for entry in config["model_list"]:
        assert (folder / entry["model"] / "mlc-chat-config.json").is_file()
        assert (folder / entry["model"] / "tensor-cache.json").is_file()
        assert entry["bundle_weight"] is True and isinstance(entry["estimated_vram_bytes"], int)
        assert (folder / config["model_lib_path_for_prepare_libs"][entry["model_lib"]]).is_file()


def test_a_dist_says_how_to_package_it(tmp_path: Path) -> None:
    """Both files, with paths from where they lie, no machine's path, and in the manifest."""
    dist = write_dist(tmp_path / "tiny-w4g32", ("cpu", "android:adreno", "android:mali"))
    config = json.loads((dist / "mlc-package-config.json").read_text())
    resolve(config, dist)
    assert config["device"] == "android"
    libs = ["tiny_w4g32_android_adreno", "tiny_w4g32_android_mali"]
    assert [entry["model_lib"] for entry in config["model_list"]] == libs
    assert config["model_list"][0]["overrides"] == {"context_window_size": 1024, "prefill_chunk_size": 128}
    app = json.loads((dist / "mlc-app-config.json").read_text())["model_list"]
    assert [entry["model_lib"] for entry in app] == libs and all(entry["model_url"] for entry in app)
    assert {"mlc-package-config.json", "mlc-app-config.json"} <= open_dist(dist).manifest.files.keys()
    assert str(tmp_path) not in (dist / "mlc-package-config.json").read_text()


def test_two_kinds_of_device(tmp_path: Path) -> None:
    """The iPhone's files lie in a folder of their own; alone they lie at the top. Neither for other targets."""
    both = write_dist(tmp_path / "both", ("android:adreno", "metal:ios"))
    config = json.loads((both / "iphone/mlc-package-config.json").read_text())
    resolve(config, both / "iphone")
    assert config["device"] == "iphone"
    app = json.loads((both / "iphone/mlc-app-config.json").read_text())["model_list"][0]
    assert app["model_path"] == app["model_id"] == "tiny-w4g32-metal-ios" and "model_url" not in app
    alone = write_dist(tmp_path / "alone", ("metal:ios",))
    assert json.loads((alone / "mlc-package-config.json").read_text())["device"] == "iphone"
    none = write_dist(tmp_path / "none", ("cpu", "android:so", "metal"))
    assert not (none / "mlc-package-config.json").exists()


@pytest.mark.parametrize(
    ("name", "lib", "model"),
    [
        ("llama-3.2-w4g32-android-adreno.tar", "llama_3_2_w4g32_android_adreno", "llama-3.2-w4g32-android-adreno"),
        ("lib.tar", "model_lib", "lib"),
        ("abcdef.tar", "model_abcdef", "abcdef"),
        ("7b-chat-w4g32.tar", "model_7b_chat_w4g32", "7b-chat-w4g32"),
        ("größe-w4g32.tar", "gr__e_w4g32", "gr--e-w4g32"),
    ],
)
def test_names(name: str, lib: str, model: str) -> None:
    """model_lib is an identifier of C, and its prefix is what MLC looks up; ids are plain file names."""
    assert model_lib(Path(name)) == lib and model_id(name) == model
    assert system_lib_prefix(Path(name)) == lib.replace("-", "_") + "_"
    assert lib.isidentifier() and lib.isascii() and len(lib) > 6


def test_estimated_memory() -> None:
    """The sum that MLC's engine prints for a 2-layer model, worked out by hand."""
    chat = {
        "context_window_size": 1000,
        "prefill_chunk_size": 100,
        "model_config": {
            "vocab_size": 800,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "head_dim": 64,
        },
    }
    cache = 1000 * (2 * 2 * 2 * 2 * 64) + 1250  # K and V, layers, heads, bytes, width; 1.25 bytes of bookkeeping
    attention = 176 + 100 * 5 * 8 + 100 * 64 * 6 * 4 + 50_331_648
    inputs = 400 + 4 + 201 * 256 * 2
    total = 5_000_000 + 2 * 70_000 + cache + attention + inputs + 20 + 12_900
    assert estimated_vram_bytes(chat, 5_000_000, {"decode": 10, "prefill": 70_000}) == total
    assert estimated_vram_bytes(chat | {"sliding_window_size": 500}, 0, {}) < total - 5_000_000 - cache / 2 + 1


def test_several_models_in_one_app(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`package` writes paths from the app's folder, replaces a file only when told, and leaves nothing else."""
    one, two = write_dist(tmp_path / "d/one"), write_dist(tmp_path / "d/two", model="other")
    app = tmp_path / "android" / "MLCChat"
    app.mkdir(parents=True)
    assert main(["package", str(one), str(two), "-o", str(app), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["config"]
    config = json.loads((app / "mlc-package-config.json").read_text())
    assert config == printed
    resolve(config, app)
    assert set(config["model_lib_path_for_prepare_libs"]) == {"tiny_w4g32_android_adreno", "other_w4g32_android_adreno"}
    assert [entry["model"] for entry in config["model_list"]] == ["../../d/one", "../../d/two"]
    assert main(["package", str(one), "-o", str(app)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["package", str(one), "-o", str(app), "--force"]) == 0
    assert [path.name for path in app.iterdir()] == ["mlc-package-config.json"]


def test_what_does_not_go_together(tmp_path: Path) -> None:
    """Equal names, a missing device and an ambiguous one are named."""
    one, two = open_dist(write_dist(tmp_path / "one")), open_dist(write_dist(tmp_path / "two"))
    with pytest.raises(UsageError, match=r"one and .*two both have the library 'tiny_w4g32_android_adreno'"):
        merge([one, two], None, tmp_path)
    iphone = open_dist(write_dist(tmp_path / "iphone", ("metal:ios",)))
    with pytest.raises(UsageError, match="no device is served by every directory"):
        merge([one, iphone], None, tmp_path)
    with pytest.raises(UsageError, match="iphone has no library for android"):
        merge([one, iphone], "android", tmp_path)
    both = open_dist(write_dist(tmp_path / "both", ("android:adreno", "metal:ios")))
    with pytest.raises(UsageError, match="both Android and iPhone"):
        merge([both], None, tmp_path)
    assert merge([both], "iphone", tmp_path)["device"] == "iphone"
    cpu = open_dist(write_dist(tmp_path / "cpu", ("cpu",)))
    with pytest.raises(UsageError, match="cpu has libraries for cpu"):
        merge([cpu], None, tmp_path)


def test_a_tampered_configuration_is_refused(tmp_path: Path) -> None:
    """Values of another type do not reach the app's configuration."""
    folder = write_dist(tmp_path / "dist")
    path = folder / "mlc-package-config.json"
    text = path.read_text()
    data = json.loads(text)
    data["model_list"][0]["estimated_vram_bytes"] = "x" * (len(str(data["model_list"][0]["estimated_vram_bytes"])) - 2)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    assert path.stat().st_size == len(text.encode())
    with pytest.raises(ArtifactError, match="estimated_vram_bytes is 'x"):
        merge([open_dist(folder)], None, tmp_path)


def test_the_configuration_of_an_app_is_relative_to_its_folder(tmp_path: Path) -> None:
    """Also where the app's folder is the working directory, or reached through a link."""
    dist = open_dist(write_dist(tmp_path / "a/dist"))
    (tmp_path / "b/c").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "b/c")
    config = merge([dist], None, tmp_path / "link")
    resolve(config, tmp_path / "b/c")
    assert config["model_list"][0]["model"] == "../../a/dist"
