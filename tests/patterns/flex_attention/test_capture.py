"""What torch.export does not capture by hand, or specialises, is captured within `fxfuse.flex_capture`."""

from __future__ import annotations

import functools
import threading

import pytest
import sympy
import torch
import torch._dynamo
import torch.nn.attention.flex_attention as torch_flex
from torch.export import Dim
from torch.utils import _pytree as pytree

import fxfuse
from fxfuse.patterns.flex_attention.calls import flex
from fxfuse.patterns.flex_attention.capturing.one_block import LARGE, OneBlockMask
from tests.patterns.flex_attention.models import INSIDE, MaskGiven, MaskInside, Plain, causal, documents, inputs

FREE = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


def export(model, args, dynamic_shapes=None, **options):
    with fxfuse.flex_capture():
        return torch.export.export(model, args, dynamic_shapes=dynamic_shapes, **options)


def guards(program):
    """The guards of a capture but for the ranges of its symbols, and that they are not 1."""
    node = next(n for n in program.graph.find_nodes(op="placeholder") if n.name == "x")
    found = [g.expr for g in node.meta["val"].fake_mode.shape_env.guards]
    return [g for g in found if not (isinstance(g, sympy.Ne) and 1 in g.args) and not isinstance(g, sympy.Ge)]


def calls(program):
    return [call for node in program.graph.nodes if (call := flex(node)) is not None]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("model", INSIDE, ids=lambda m: m.__name__)
def test_batch_and_length_are_free(model, strict):
    """Weights require grad, masks are made in `forward`, mods read tensors."""
    module = model()
    program = export(module, inputs(2, 12), (FREE, FREE), strict=strict)
    assert guards(program) == []
    for call in calls(program):
        assert call.block_mask["BLOCK_SIZE.0"] == LARGE
    with torch.no_grad():
        for args in (inputs(2, 12), inputs(3, 9, 1), inputs(1, 150, 2)):
            close(program.module()(*args), module(*args))


@pytest.mark.parametrize("model", INSIDE, ids=lambda m: m.__name__)
def test_static(model):
    module, args = model(), inputs(2, 130)
    program = export(module, args)
    with torch.no_grad():
        close(program.module()(*args), module(*args))


def test_a_captured_mask_is_a_handful_of_nodes():
    with torch.no_grad():
        plain = torch.export.export(MaskInside(), inputs(2, 12))
    assert sum(n.op == "call_function" for n in plain.graph.nodes) > 100
    assert sum(n.op == "call_function" for n in export(MaskInside(), inputs(2, 12)).graph.nodes) < 15


def test_captures_do_not_see_one_another():
    """A static capture leaves nothing that would specialise a dynamic one, nor the other way round."""
    for shapes in (None, (FREE, FREE), None, (FREE, FREE)):
        x, ids = inputs(2, 12)
        program = export(MaskInside(), (x.clone(), ids.clone()), shapes)
        assert guards(program) == []
        placeholder = next(n for n in program.graph.nodes if n.name == "x")
        assert all(isinstance(d, int) == (shapes is None) for d in placeholder.meta["val"].shape[:2])


def given(b, s):
    """x, and the mask of its documents, made as ever and made within a block."""
    x, ids = inputs(b, s, seed=s)
    with fxfuse.flex_capture():
        mine = torch_flex.create_block_mask(documents(ids), b, None, s, s, device="cpu")
    return x, torch_flex.create_block_mask(documents(ids), b, None, s, s, device="cpu"), mine


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_a_mask_made_in_the_block_is_an_argument(strict):
    module = MaskGiven()
    x, _, mask = given(2, 12)
    program = export(module, (x, mask), (FREE, [FREE]), strict=strict)
    assert program.graph_signature.user_inputs == ("x", "mask_0")
    assert guards(program) == []
    x, plain, mask = given(3, 140)
    with torch.no_grad():
        close(program.module()(x, mask), module(x, plain))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_a_mask_made_before_is_an_argument(strict):
    """Its lists say what its function says: they are no inputs. Dynamo keeps its type, which is no pytree elsewhere."""
    module = MaskGiven()
    x, plain, _ = given(2, 200)
    program = export(module, (x, plain), (FREE, [FREE]), strict=strict)
    assert program.graph_signature.user_inputs == ("x", "mask_0")
    x, plain, mask = given(3, 140)
    with torch.no_grad(), fxfuse.flex_capture():
        close(program.module()(x, plain if strict else mask), module(x, plain))


def test_lists_that_say_something_else_are_inputs():
    x, _ = inputs(2, 12)
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    mask = torch_flex.BlockMask.from_kv_blocks(
        one, one[..., None] * 0, one, one[..., None] * 0, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(12, 12)
    )
    program = export(MaskGiven(), (x, mask))
    assert len(program.graph_signature.user_inputs) > 4
    (call,) = calls(program)
    assert call.block_mask["kv_num_blocks"].op == "placeholder"


def test_masks_of_masks_are_taken_apart():
    """`and_masks` holds functions in a tuple; a tensor that two of them read is one input."""
    x, ids = inputs(2, 12)
    combined = torch_flex.and_masks(causal, torch_flex.or_masks(documents(ids), lambda b, h, q, kv: ids[b, kv] == 0))
    with fxfuse.flex_capture():
        mask = torch_flex.create_block_mask(combined, 2, None, 12, 12, device="cpu")
    program = export(MaskGiven(), (x, mask))
    assert program.graph_signature.user_inputs == ("x", "mask_0")
    with torch.no_grad():
        close(program.module()(x, mask), MaskGiven()(x, mask))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_functions_of_every_kind_are_put_together(strict):
    """Defaults, a partial, a closure in a closure; traced by Dynamo too, which knows no cells."""
    x, ids = inputs(2, 12)
    lengths, width = torch.tensor([7, 12]), torch.tensor(2)

    def short(lengths, b, h, q, kv):
        return kv < lengths[b]

    def near(b, h, q, kv, more=1):
        return (q - kv < width + more) | documents(ids)(b, h, q, kv)

    mask_mod = torch_flex.and_masks(near, functools.partial(short, lengths))
    with fxfuse.flex_capture():
        mask = torch_flex.create_block_mask(mask_mod, 2, None, 12, 12, device="cpu")
    program = export(MaskGiven(), (x, mask), strict=strict)
    assert len(program.graph_signature.user_inputs) == 4
    with torch.no_grad():
        close(program.module()(x, mask), MaskGiven()(x, mask))


def _everything():
    operator = torch.ops.higher_order.flex_attention
    return (
        torch_flex.create_block_mask.__code__,
        torch_flex.create_block_mask.__defaults__,
        torch_flex._create_empty_block_mask,
        torch_flex._validate_device,
        torch_flex.setup_compilation_env,
        dict(operator.py_kernels),
        torch_flex.BlockMask in pytree.SUPPORTED_NODES,
    )


def test_everything_is_put_back():
    before = _everything()
    with pytest.raises(ZeroDivisionError), fxfuse.flex_capture(), fxfuse.flex_capture():
        assert _everything() != before
        raise ZeroDivisionError
    assert _everything() == before


def test_the_inner_of_two_blocks_leaves_the_outer_alone():
    with fxfuse.flex_capture():
        within = _everything()
        with fxfuse.flex_capture():
            pass
        assert _everything() == within


def test_another_thread_is_as_it_was():
    made = []

    def work():
        made.append(torch_flex.create_block_mask(causal, None, None, 256, 256, device="cpu"))
        q = torch.zeros(1, 1, 4, 4, requires_grad=True)
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            torch_flex.flex_attention(q, q, q)

    with fxfuse.flex_capture():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not isinstance(made[0], OneBlockMask)
    assert made[0].kv_indices.shape == (1, 1, 2, 2)


def test_eager_calls_in_the_block_are_checked_as_ever():
    q = torch.zeros(1, 1, 4, 4, requires_grad=True)
    with fxfuse.flex_capture(), pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        torch_flex.flex_attention(q, q, q)


def test_a_mask_that_is_no_mask_function_is_refused_as_ever():
    with fxfuse.flex_capture(), pytest.raises(AssertionError, match="mask_mod"):
        torch_flex.create_block_mask(lambda score, b, h, q, kv: score, None, None, 8, 8, device="cpu")


def test_a_sliced_mask_wants_its_function_again():
    """gpt-fast slices a row of blocks and sets the function anew."""
    with fxfuse.flex_capture():
        mask = torch_flex.create_block_mask(causal, None, None, 256, 256, device="cpu")
    row = mask[:, :, 1]
    q = torch.zeros(1, 1, 1, 4)
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        torch_flex.flex_attention(q, q, q, block_mask=row)
    row.mask_mod = lambda b, h, q, kv: q + 3 >= kv
    torch_flex.flex_attention(q, q, q, block_mask=row)


def test_prepass_captures_within_a_block():
    program = fxfuse.prepass(torch.export.export)(Plain(), inputs(2, 12), dynamic_shapes=(FREE, FREE))
    assert guards(program) == []
