"""The folder: what is in it, that one manifest describes it, and that on failure nothing of it is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import onnx_ir as ir
import pytest
import torch

import fxfuse.package
from fxfuse.cli import main
from fxfuse.decoder.description import Layer
from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError, ParityError
from fxfuse.package import write as package
from fxfuse.package.genai import genai_config
from fxfuse.package.manifest import MANIFEST, manifest_of, read_manifest
from fxfuse.package.write import facts, write_package
from fxfuse.runtime import EagerSession, Session, generate
from fxfuse.runtime.check import check_package
from fxfuse.versions import cache_name
from tests.generation import tiny

SCHEMA = json.loads((Path(fxfuse.package.__file__).parent / "manifest.schema.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def program() -> ir.Model:
    return export_decoder(tiny.trained("llama"), names="genai")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "llama"
    assert main(["export", str(checkpoint), "--package", "genai", "--pair", "--out", str(out)]) == 0
    return out


def test_the_command_writes_everything(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names >= {"prefill.onnx", "decode.onnx", "weights.data", MANIFEST, "genai_config.json", "report.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    report = json.loads((exported / "report.json").read_text())
    assert [check["case"] for check in report["parity"]] == ["prompt", "step 1", "step 2", "step 3"]
    assert all(check["result"]["passed"] for check in report["parity"])
    assert [path.name for path in exported.parent.iterdir()] == ["llama"], "nothing is left beside it"


def test_both_graphs_read_one_weights_file(exported: Path) -> None:
    weights = sum(p.nbytes for p in tiny.trained("llama").parameters())
    assert (exported / "weights.data").stat().st_size < 1.2 * weights
    for name in ("prefill.onnx", "decode.onnx"):
        initializers = ir.load(exported / name).graph.initializers.values()
        large = [value.const_value for value in initializers if value.const_value.nbytes > 1024]  # type: ignore[union-attr]
        assert len(large) > 10
        assert {tensor.location for tensor in large} == {"weights.data"}  # type: ignore[union-attr]


def test_the_manifest(exported: Path) -> None:
    data = json.loads((exported / MANIFEST).read_text())
    jsonschema.validate(data, SCHEMA)
    folder, manifest = read_manifest(exported)
    assert (folder, manifest.to_json()) == (exported, data)
    assert (manifest.cache.form, list(manifest.cache.layers)) == ("growing", [Layer(2, 16)] * 2)
    assert data["model"] == {
        "vocab_size": tiny.VOCABULARY,
        "context_length": 512,
        "hidden_size": 64,
        "heads": 4,
        "pad": tiny.PAD,
        "bos": None,
        "eos": [tiny.EOS],
    }
    assert data["links"][0] == {"output": "present.0.key", "input": "past_key_values.0.key", "shared": False}


def test_names(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of transformers' own exporters are run as well; what they have no words for is refused."""
    out, prompt = tmp_path / "hf", tiny.tokenizer().encode(tiny.PROMPTS[0]).ids
    assert main(["export", str(checkpoint), "--names", "hf", "--out", str(out)]) == 0
    jsonschema.validate(json.loads((out / MANIFEST).read_text()), SCHEMA)
    assert read_manifest(out)[1].links[1].input == f"input.{cache_name(tiny.trained('llama'))}.layers.0.values"
    assert generate(Session(out, threads=1), [prompt], max_new_tokens=24) == [tiny.continued("llama", prompt, 24)]
    capsys.readouterr()
    for words in (["--package", "genai"], ["--cache", "static"]):
        assert main(["export", str(checkpoint), "--names", "hf", *words, "--out", str(tmp_path / "none")]) == 2
        assert "names" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_users_own_runtime(exported: Path) -> None:
    """Nothing but the JSON and onnxruntime: how one drives the folder without fxfuse."""
    import numpy as np
    import onnxruntime

    manifest = json.loads((exported / MANIFEST).read_text())
    sessions = {
        name: onnxruntime.InferenceSession(exported / stage["file"]) for name, stage in manifest["stages"].items()
    }
    layers = manifest["cache"]["layers"]
    cache = {
        link["input"]: np.zeros((1, layer["heads"], 0, layer["head_dim"]), manifest["cache"]["dtype"])
        for link, layer in zip(manifest["links"], [layer for layer in layers for _ in ("key", "value")], strict=True)
    }
    prompt = tiny.tokenizer().encode(tiny.PROMPTS[0]).ids
    new, said, total = prompt, [], 0
    for _ in range(24):
        name = "decode" if total and len(new) == 1 else "prefill"
        total += len(new)
        feed = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - len(new), total)[None],
        }
        outputs = sessions[name].run(None, {**feed, **cache})
        values = dict(zip(manifest["stages"][name]["outputs"], outputs, strict=True))
        cache = {link["input"]: values[link["output"]] for link in manifest["links"]}
        new = [int(values["logits"][0, -1].argmax())]
        said += new
    assert said == tiny.continued("llama", prompt, 24)


def test_a_package_that_computes_something_else_is_not_written(program: ir.Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    eager = EagerSession(tiny.trained("llama"))
    write_package(out, program, check=lambda folder: check(folder, eager))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    embeddings = program.graph.initializers["model.embed_tokens.weight"]
    right = embeddings.const_value
    assert right is not None
    embeddings.const_value = ir.tensor(right.numpy()[::-1].copy(), name=embeddings.name)
    try:
        with pytest.raises(ParityError, match="does not give the model's logits"):
            write_package(out, program, decode=program, check=lambda folder: check(folder, eager))
    finally:
        embeddings.const_value = right
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before, "what stood there still does"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "and nothing beside it"


def check(folder: Path, eager: EagerSession) -> None:
    assert (folder / MANIFEST).is_file(), "the check sees the whole folder"
    check_package(folder, eager)


def test_a_new_package_leaves_nothing_of_the_old_one(program: ir.Model, tmp_path: Path) -> None:
    model = facts(tiny.trained("llama").config)
    write_package(tmp_path, program, decode=program, package="genai", model=model)
    (tmp_path / "notes.txt").write_text("mine")
    write_package(tmp_path, program, model=model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, "model.onnx", "notes.txt", "weights.data"]


def test_a_disk_that_fails(program: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package.ir, "save", full)
    with pytest.raises(FxfuseError, match="No space left"):
        write_package(tmp_path / "out", program)
    assert not list(tmp_path.iterdir())


def test_genai_has_no_words_for_some_models(program: ir.Model) -> None:
    known = facts(tiny.trained("llama").config)
    assert genai_config(manifest_of(program, "model.onnx", **known))["model"]["type"] == "decoder"
    for unknown, message in (({"context_length": None}, "how long"), ({"pad": None, "eos": []}, "neither a padding")):
        with pytest.raises(FxfuseError, match=message):
            genai_config(manifest_of(program, "model.onnx", **{**known, **unknown}))


def test_what_is_no_manifest(program: ir.Model, tmp_path: Path) -> None:
    write_package(tmp_path, program)
    data = json.loads((tmp_path / MANIFEST).read_text())
    for broken in ("{", "[]", {**data, "version": 2}, {**data, "links": 3}, {**data, "cache": {"form": "liquid"}}):
        (tmp_path / MANIFEST).write_text(broken if isinstance(broken, str) else json.dumps(broken))
        with pytest.raises(FxfuseError, match=r"not a pipeline's manifest|not fxfuse\.pipeline"):
            Session(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(FxfuseError, match=r"model\.onnx is missing"):
        Session(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "a=1"], "--set does not apply"),
        (["--batch", "3"], "--batch does not apply"),
        (["--dtype", "float17"], "unknown dtype"),
        (["--opset", "22"], "opset"),
    ],
)
def test_options_of_other_sources(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_package_of_what_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "program.pt2", "--package", "genai", "--out", str(tmp_path / "out")]) == 2
    assert "--package is for a model that generates text" in capsys.readouterr().err


def test_a_broken_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / dtype
    assert main(["export", str(checkpoint), "--dtype", dtype, "--out", str(out)]) == 0
    assert read_manifest(out)[1].cache.dtype == dtype
    prompt = tiny.tokenizer().encode(tiny.PROMPTS[0]).ids
    if dtype == "bfloat16":
        with pytest.raises(FxfuseError, match="does not run bfloat16"):
            Session(out)
    else:
        said = generate(Session(out), [prompt], max_new_tokens=8)[0]
        assert len(said) == 8 and said[0] == tiny.continued("llama", prompt, 1)[0]
    assert torch.get_default_dtype() == torch.float32
