"""Every weight of the class is in the checkpoint, and every weight in it is used; otherwise they are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxfuse.errors import FxfuseError
from fxfuse.pretrained import dtype_for_cpu, load, look
from tests.pretrained.checkpoints import DECODER, change_config, copied, save

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("LlamaForCausalLM", tmp_path_factory.mktemp("llama"), DECODER)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("LlamaForCausalLM", tmp_path_factory.mktemp("tied"), {**DECODER, "tie_word_embeddings": True})


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[str]]:
    return load(look(str(folder)), dtype, **options)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights.update({name: value})


def test_a_whole_one(llama: Path) -> None:
    model, notes = loaded(llama)
    assert type(model).__name__ == "LlamaForCausalLM" and notes == [] and not model.training


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda weights: weights.pop(HEAD), "1 weight is not in the checkpoint.*at random: lm_head.weight"),
        (lambda weights: weights.pop(UP), f"1 weight is not in the checkpoint.*: {UP}"),
        (put(UP, torch.zeros(32, 32)), rf"1 weight is of another shape.*{UP} \(\[32, 32\], not \[48, 32\]\)"),
        (put("extra.weight", torch.zeros(2)), "that the class in config.json does not use: extra.weight"),
        (put(f"{UP[:-7]}.lora_A.default.weight", torch.zeros(2, 32)), "lora_A.default.weight(.|\n)*merge the adapters"),
        (lambda weights: weights.update(score=weights.pop(HEAD)), "it has score, which the class does not use"),
    ],
    ids=["no head", "no up_proj", "shape", "unused", "adapter", "other name"],
)
def test_weights_that_do_not_fit(change: Any, said: str, llama: Path, tmp_path: Path) -> None:
    """An error that names them, unless they are allowed: then they are told."""
    folder = copied(llama, tmp_path / "changed", change)
    with pytest.raises(FxfuseError, match=said) as raised:
        loaded(folder)
    assert "--allow-missing" in str(raised.value)
    _, notes = loaded(folder, allow_missing=True)
    assert notes and notes[0] == raised.value.what


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD])
def test_tied_weights_are_there_once(kept: str, tied: Path, tmp_path: Path) -> None:
    given = torch.randn(64, 32)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights.pop(EMBEDDING)
        weights[kept] = given

    model, notes = loaded(copied(tied, tmp_path / "once", change))
    assert notes == []
    torch.testing.assert_close(model.lm_head.weight, given)
    torch.testing.assert_close(model.model.embed_tokens.weight, given)


def test_tied_weights_that_are_not_there(tied: Path, tmp_path: Path) -> None:
    folder = copied(tied, tmp_path / "none", lambda weights: weights.pop(EMBEDDING))
    with pytest.raises(FxfuseError, match=f"2 weights are not in the checkpoint.*{HEAD}, {EMBEDDING}"):
        loaded(folder)


def test_the_class_is_not_that_of_the_weights(llama: Path, tmp_path: Path) -> None:
    folder = change_config(copied(llama, tmp_path / "head"), architectures=["LlamaForSequenceClassification"])
    with pytest.raises(FxfuseError, match=r"it has lm_head.weight.*at random: score.weight"):
        loaded(folder)


def test_no_weights(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "none")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FxfuseError, match="cannot be loaded"):
        loaded(folder)


@pytest.mark.parametrize(
    "quantised, said",
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\)"),
        (
            {"quant_method": "of_their_own", "bits": 4},
            r"of_their_own\), which this transformers does not know",
        ),
    ],
)
def test_quantised_weights(quantised: dict[str, Any], said: str, llama: Path, tmp_path: Path) -> None:
    """GPTQ's reader is not installed here; a method that transformers does not know it passes over in silence."""
    folder = change_config(copied(llama, tmp_path / "quantised"), quantization_config=quantised)
    with pytest.raises(FxfuseError, match=said):
        loaded(folder)


def test_what_does_not_fit_into_float16(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "large", put(UP, torch.full((48, 32), 1e5)))
    loaded(folder)
    with pytest.raises(FxfuseError, match=f"{UP} does not fit into float16"):
        loaded(folder, torch.float16)


def test_nobody_elses_random_numbers_are_drawn(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "changed", lambda weights: weights.pop(UP))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    loaded(folder, allow_missing=True)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    "stored, asked, chosen, told",
    [
        (torch.float32, None, torch.float32, False),
        (torch.float16, None, torch.float16, False),
        ("bfloat16", None, torch.float32, True),
        (torch.bfloat16, None, torch.float32, True),
        (None, None, torch.float32, True),
        (torch.bfloat16, torch.float16, torch.float16, False),
        (torch.float32, torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_the_type_is_one_that_the_runtime_runs(stored: Any, asked: Any, chosen: torch.dtype, told: bool) -> None:
    config = type("Config", (), {"dtype": stored})
    dtype, note = dtype_for_cpu(config, asked)
    assert (dtype, note is not None) == (chosen, told)
