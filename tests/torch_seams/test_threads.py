"""Two threads fuse and export at once, a third runs plain torch: all results are right, and all is left as it was."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx.experimental._config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.nn.attention import flex_attention as flex

import fxfuse
import fxfuse.onnx
from fxfuse.patches import applied, attribute
from fxfuse.patterns.flex_attention.capturing.one_block import OneBlockMask
from fxfuse.torch_seams import silenced, sizes_of_one, uncached


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.linear(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))) + x
        return x


def program_of(module: nn.Module, dim: int) -> ExportedProgram:
    axes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    return torch.export.export(module, (torch.randn(2, 3, dim),), dynamic_shapes=axes)


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return, each run in a thread of its own from the same moment on."""
    results: list[Any] = [None] * len(functions)
    ready = threading.Barrier(len(functions))

    def run(place: int) -> None:
        ready.wait()
        try:
            results[place] = functions[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture(autouse=True)
def often_and_back() -> Iterator[None]:
    """Threads take turns often, and whatever torch has for the process is as it was in the end."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    before = _settings()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
    assert _settings() == before


def _settings() -> list[Any]:
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export._trace")
    loggers = [logging.getLogger(name) for name in names]
    env = torch.fx.experimental.symbolic_shapes.ShapeEnv
    return [
        torch.fx.experimental._config.backed_size_oblivious,
        torch.compiler.is_exporting(),
        [(logger.disabled, list(logger.filters)) for logger in loggers],
        flex.create_block_mask.__code__,
        flex._validate_device,
        getattr(env, "_get_sloc", None),
        nn.Module.__call__,
    ]


def test_two_threads_fuse_two_programs() -> None:
    modules = {dim: Block(dim).eval() for dim in (8, 16)}
    programs = {dim: program_of(module, dim) for dim, module in modules.items()}
    fused = at_once(*(lambda dim=dim: fxfuse.fuse(programs[dim]) for dim in modules))
    for (dim, module), program in zip(modules.items(), fused, strict=True):
        assert fxfuse.report(program).counts == {"RMSNormalization": 2}
        x = torch.randn(4, 5, dim)
        torch.testing.assert_close(program.module()(x), module(x))


def test_two_threads_fuse_one_program_whose_fake_tensors_they_share() -> None:
    module = Block(8).eval()
    program = program_of(module, 8)
    mode = next(n.meta["val"].fake_mode for n in program.graph.nodes if "val" in n.meta)
    assert mode.cache_enabled
    for fused in at_once(*(lambda: fxfuse.fuse(program) for _ in range(2))):
        assert fxfuse.report(fused).counts == {"RMSNormalization": 2}
        x = torch.randn(4, 5, 8)
        torch.testing.assert_close(fused.module()(x), module(x))
    assert mode.cache_enabled
    assert fxfuse.report(fxfuse.fuse(program)).counts == {"RMSNormalization": 2}


def test_two_threads_export_while_a_third_runs_plain_torch() -> None:
    modules = {dim: Block(dim).eval() for dim in (8, 16)}
    axes = ({0: "batch", 1: "sequence"},)
    other = Block(12).eval()
    x = torch.randn(2, 3, 12)
    expected = other(x)
    done = threading.Event()

    def export(dim: int) -> Any:
        try:
            return fxfuse.onnx.export(modules[dim], (torch.randn(2, 3, dim),), dynamic_shapes=axes)
        finally:
            done.set()

    def plain() -> int:
        count = 0
        while not done.is_set():
            assert not torch.fx.experimental._config.backed_size_oblivious
            torch.testing.assert_close(other(x), expected)
            count += 1
        return count

    first, second, count = at_once(lambda: export(8), lambda: export(16), plain)
    assert count > 0
    for made in (first, second):
        assert fxfuse.report(made).counts == {"RMSNormalization": 2}
        assert [node.op_type for node in made.model.graph].count("RMSNormalization") == 2


@pytest.mark.filterwarnings("ignore:Block is in training mode")
def test_a_module_in_training_mode_is_in_it_again_after_two_exports_at_once() -> None:
    module = Block(8).train()

    def export() -> Any:
        return fxfuse.onnx.export(module, (torch.randn(2, 3, 8),))

    at_once(export, export)
    assert all(part.training for part in module.modules())


def test_masks_are_torchs_own_in_a_thread_outside_the_block() -> None:
    inside, outside = threading.Event(), threading.Event()

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def captures() -> Any:
        with fxfuse.flex_capture():
            inside.set()
            made = flex.create_block_mask(mask, None, None, 256, 256, device="cpu")
            assert outside.wait(60)
        return made

    def plain() -> Any:
        assert inside.wait(60)
        try:
            return flex.create_block_mask(mask, None, None, 256, 256, device="cpu")
        finally:
            outside.set()

    ours, torchs = at_once(captures, plain)
    assert isinstance(ours, OneBlockMask)
    assert not isinstance(torchs, OneBlockMask) and torchs.kv_num_blocks.tolist() == [[[1, 1]]]
    assert torchs.full_kv_num_blocks.tolist() == [[[0, 1]]]


# ---- each setting, where blocks of two threads overlap and the first to begin ends first


def overlapping(block: Callable[[], Any], look: Callable[[], Any]) -> list[Any]:
    """What `look` gives in the thread whose block is the longer, after the other's has ended, and after both."""
    begun, ended = threading.Event(), threading.Event()
    seen: list[Any] = []

    def first() -> None:
        with block():
            begun.set()
            ended.wait(0.2)  # under a lock the other block only begins when this one has ended

    def second() -> None:
        assert begun.wait(60)
        with block():
            ended.set()
            threads[0].join(60)
            seen.append(look())

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [*seen, look()]


def test_sizes_of_one() -> None:
    config = torch.fx.experimental._config
    assert overlapping(sizes_of_one, lambda: config.backed_size_oblivious) == [True, False]


def test_the_cache_of_fake_tensors() -> None:
    mode = FakeTensorMode()
    assert overlapping(lambda: uncached(mode), lambda: mode.cache_enabled) == [False, True]


def test_a_replacement() -> None:
    class Owner:
        value = "original"

    assert overlapping(lambda: applied(lambda: [attribute(Owner, "value", "replaced")]), lambda: Owner.value) == [
        "replaced",
        "original",
    ]


def test_a_replacement_that_cannot_be_made_leaves_no_other() -> None:
    class Owner:
        value = "original"

    def patches() -> Iterator[Any]:
        yield attribute(Owner, "value", "replaced")
        raise RuntimeError("moved")

    with pytest.raises(RuntimeError, match="moved"), applied(patches):
        pass
    assert Owner.value == "original"


def test_what_other_threads_log_is_logged() -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with silenced(logger.name):
            logger.error("of this thread")
            at_once(lambda: logger.error("of another"))
        logger.error("after the block")
    finally:
        logger.removeHandler(handler)
    assert heard == ["of another", "after the block"]
