"""``fxfuse export FOLDER``: what a checkpoint's folder holds is what is exported, in a type that the runtime runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from fxfuse.cli import main
from fxfuse.errors import FxfuseError
from fxfuse.runtime import Session
from tests.pretrained.checkpoints import DECODER, IMAGES, T5, TEXT, configured, copied, save

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder in bfloat16, as most are."""
    options = {**DECODER, "num_hidden_layers": 1}
    return save("LlamaForCausalLM", tmp_path_factory.mktemp("llama"), options, torch.bfloat16)


@pytest.mark.parametrize(
    "name, options, outputs",
    [
        ("BertForMaskedLM", TEXT, ["logits"]),
        ("ModernBertModel", {**TEXT, "bos_token_id": 3, "eos_token_id": 1}, ["last_hidden_state"]),
        ("LlamaForSequenceClassification", DECODER, ["logits"]),
        ("T5EncoderModel", T5, ["last_hidden_state"]),
        ("ViTModel", IMAGES, ["last_hidden_state", "pooler_output"]),
    ],
)
def test_an_encoder(name: str, options: dict[str, Any], outputs: list[str], tmp_path: Path, capsys: Printed) -> None:
    """Its own class, without a cache; compared by the command, and here by its names at sizes of our own."""
    folder, out = save(name, tmp_path / "in", options), tmp_path / "out"
    (folder / "tokenizer.json").write_text("{}")
    assert main(["export", str(folder), "--out", str(out)]) == 0, capsys.readouterr().err
    names = {path.name for path in out.iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "report.json", "config.json", "tokenizer.json"}
    record = json.loads((out / "report.json").read_text())
    assert record["counts"]["Attention"] == 2
    assert len({check["sizes"] for check in record["parity"]}) == 3 and "ONNX Runtime" in str(record["parity"])

    model = getattr(transformers, name).from_pretrained(folder).eval()
    if model.main_input_name == "pixel_values":
        given = {"pixel_values": torch.randn(5, 3, 32, 32)}
    else:
        ids = torch.randint(4, 64, (3, 9))
        mask = torch.ones_like(ids)
        mask[1, 6:], ids[1, 6:] = 0, model.config.pad_token_id
        given = {"input_ids": ids, "attention_mask": mask}
    session = onnxruntime.InferenceSession(out / "model.onnx")
    if "token_type_ids" in (taken := [i.name for i in session.get_inputs()]):
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    assert taken == list(given)
    found = dict(zip(outputs, session.run(outputs, {key: value.numpy() for key, value in given.items()}), strict=True))
    assert [o.name for o in session.get_outputs()] == outputs
    with torch.no_grad():
        expected = model(**given)
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key].numpy(), rtol=1e-4, atol=1e-4)


def test_bfloat16_becomes_what_a_cpu_runs(llama: Path, tmp_path: Path, capsys: Printed) -> None:
    """The folder runs where it was made."""
    assert main(["export", str(llama), "--out", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "written in float32: the checkpoint is in bfloat16" in printed
    session = Session(tmp_path / "out")
    assert session.manifest.cache.dtype == "float32"
    ids = torch.randint(4, 64, (2, 5))
    model = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    torch.testing.assert_close(session.prefill(ids), model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_bfloat16_on_request(llama: Path, tmp_path: Path, capsys: Printed) -> None:
    """The last line says what runs it, and what to pass for a CPU; it names no session that then refuses."""
    assert main(["export", str(llama), "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "runtime that has bfloat16 kernels" in printed and printed.endswith("--dtype float32 or --dtype float16")
    assert "Session(" not in printed and "ONNX Runtime (f32)" in printed
    with pytest.raises(FxfuseError, match="does not run bfloat16"):
        Session(tmp_path / "out")


def test_an_encoder_in_bfloat16_on_request(tmp_path: Path, capsys: Printed) -> None:
    folder = save("BertModel", tmp_path / "in", TEXT)
    assert main(["export", str(folder), "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    assert "for a CPU pass --dtype float32" in " ".join(capsys.readouterr().out.split())
    weights = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer
    assert onnx.TensorProto.BFLOAT16 in {weight.data_type for weight in weights}


def test_half_a_model(tmp_path: Path, capsys: Printed) -> None:
    """Never the decoder of an encoder–decoder, or the text model of a multimodal one."""
    bart = save(
        "BartForConditionalGeneration", tmp_path / "bart", {"vocab_size": 64, "d_model": 32, "encoder_layers": 1}
    )
    llava = configured("LlavaForConditionalGeneration", tmp_path / "llava", {})
    for folder, said in ((bart, "is an encoder–decoder"), (llava, "is multimodal")):
        for command in (["export", "--out", str(tmp_path / "out")], ["inspect"], ["parity"]):
            assert main([command[0], str(folder), *command[1:]]) == 2
            assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_missing_weights(llama: Path, tmp_path: Path, capsys: Printed) -> None:
    folder, out = copied(llama, tmp_path / "in", lambda weights: weights.pop("lm_head.weight")), tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out)]) == 2
    assert "random: lm_head.weight" in " ".join(capsys.readouterr().err.split()) and not out.exists()
    assert main(["export", str(folder), "--allow-missing", "--no-parity", "--out", str(out)]) == 0
    assert "at random: lm_head.weight" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "options, said",
    [
        (["--package", "genai"], "--package is for a model that generates text: BertModel keeps no cache"),
        (["--cache", "static"], "--cache is for a model that generates text: BertModel keeps no cache"),
        (["--pair"], "--pair is for a model that generates text"),
        (["--set", "a=1"], "--set does not apply to a checkpoint's folder"),
        (["--seq", "65"], "at most 64 tokens"),
    ],
)
def test_options_that_do_not_fit_an_encoder(options: list[str], said: str, tmp_path: Path, capsys: Printed) -> None:
    folder = save("BertModel", tmp_path / "in", TEXT)
    assert main(["export", str(folder), *options, "--out", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--package", "genai", "--dtype", "bfloat16"], "no bfloat16 attention"),
        (["--seq", "8"], "--seq does not apply to a graph with a cache"),
        (["--checkpoint", "x"], "--checkpoint does not apply to a checkpoint's folder"),
    ],
)
def test_options_that_do_not_fit_a_decoder(
    options: list[str], said: str, llama: Path, tmp_path: Path, capsys: Printed
) -> None:
    assert main(["export", str(llama), *options, "--out", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


def test_a_folder_without_a_configuration(tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "model.safetensors").touch()
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "it has no config.json" in " ".join(capsys.readouterr().err.split())


def test_allow_missing_is_for_folders(tmp_path: Path, capsys: Printed) -> None:
    assert main(["export", "torchtune:llama3_2_1b", "--allow-missing", "--out", str(tmp_path / "out")]) == 2
    assert "--allow-missing is for a checkpoint's folder" in " ".join(capsys.readouterr().err.split())


def test_inspect_and_parity_of_an_encoder(tmp_path: Path, capsys: Printed) -> None:
    folder = str(save("BertModel", tmp_path / "in", {**TEXT, "num_hidden_layers": 1}, torch.bfloat16))
    assert main(["inspect", folder, "--batch", "3", "--seq", "7"]) == 0
    assert "Attention" in capsys.readouterr().out
    assert main(["parity", folder, "--dtype", "float32", "--device", "cpu"]) == 0
    assert "other shape" in capsys.readouterr().out
