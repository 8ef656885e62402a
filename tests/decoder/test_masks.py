"""Masks of decoders, told for every length; what is not what it seems at some length is not taken for it."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from fxfuse.decoder.forms.ragged import drop_padding, sees_otherwise
from fxfuse.decoder.masks.decided import Masks
from tests.decoder.test_reading import ordered

DECODER = """<ir_version: 10, opset_import: ["" : 24]>
decoder (int64[batch_size, sequence_length] input_ids, int64[batch_size, total_sequence_length] attention_mask,
         float[batch_size, 2, past_sequence_length, 8] past, float[batch_size, 2, sequence_length, 8] q)
    => (float[batch_size, 2, sequence_length, 8] y)
    <int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] middle = {1}, int64[2] axes = {1, 2},
     int64 chunk = {64}, int64 size = {4096}, int64 square = {16777216}, int64 late = {131072}, int64 twelve = {12},
     float milli = {0.001}, float unit = {1.0}, float none = {0.0}, float hidden = {-1e9}, float soft = {-1e4}>
{
    past_1 = Shape <start = 2, end = 3> (past)
    new_1 = Shape <start = 1, end = 2> (input_ids)
    p = Squeeze (past_1)
    s = Squeeze (new_1)
    t = Add (p, s)
    j = Range (zero, t, one)
    counted = Range (p, t, one)
    i = Unsqueeze (counted, middle)
    back = Sub (i, j)
    BODY
    kept_2 = Cast <to = 9> (attention_mask)
    kept = Unsqueeze (kept_2, axes)
    mask_4 = And (seen, kept)
    LAST
    y = Attention (q, q, q, mask, past, past)
}"""
HOSTILE = {
    "a window by shifts": "a = Cast <to = 13> (i)\n b = Cast <to = 13> (j)\n n = Cast <to = 13> (twelve)\n"
    ' c = BitShift <direction = "RIGHT"> (a, n)\n d = BitShift <direction = "RIGHT"> (b, n)\n near = Equal (c, d)',
    "a window by float products": "f = Cast <to = 1> (back)\n w = Mul (f, milli)\n near = Less (w, unit)",
    "a window by float quotients": "f = Cast <to = 1> (back)\n g = Cast <to = 1> (size)\n w = Div (f, g)\n"
    " near = Less (w, unit)",
    "a window by squares": "w = Mul (back, back)\n near = Less (w, square)",
    "a window by powers": "w = Pow (back, two)\n near = Less (w, square)",
    "chunks of chunks": "a = Div (i, chunk)\n b = Div (a, chunk)\n c = Div (j, chunk)\n d = Div (c, chunk)\n"
    " near = Equal (b, d)",
    "a hole in a table": "m = Mod (j, size)\n near = Gather (table, m)",
    "a window that starts at 2^17": "near = Less (back, late)",
    "a square that does not fit": "b = Cast <to = 6> (back)\n w = Mul (b, b)\n z = Cast <to = 6> (zero)\n"
    " near = GreaterOrEqual (w, z)",
    "places that wrap": "a = Cast <to = 2> (i)\n b = Cast <to = 2> (j)\n near = LessOrEqual (b, a)",
    "places in half precision": "a = Cast <to = 10> (back)\n b = Cast <to = 10> (size)\n near = Less (a, b)",
    "a number of keys": "near = Less (t, late)",
    "a place modulo": "m = Mod (back, size)\n q1 = Sub (size, one)\n near = Less (m, q1)",
}
PLAIN = {
    "as it is": "seen = LessOrEqual (j, i)",
    "the other way round": "later = Less (i, j)\n seen = Not (later)",
    "a triangle": "w = Concat <axis = 0> (new_1, t_1)\n t_1 = Reshape (t, last)\n"
    " last = Constant <value_ints = [-1]> ()\n o = ConstantOfShape <value = int64[1] {1}> (w)\n"
    " l = Trilu <upper = 0> (o, p)\n seen = Cast <to = 9> (l)",
    "by distance in floats": "f = Cast <to = 1> (back)\n seen = GreaterOrEqual (f, none)",
    "by chunks of one": "a = Div (i, one)\n seen = LessOrEqual (j, a)",
    "a window of everything": "near = Less (back, t)\n causal = LessOrEqual (j, i)\n seen = And (causal, near)",
}


def decoder(body: str, last: str = "mask = Identity (mask_4)") -> ir.Model:
    text = DECODER.replace("BODY", ordered(body)).replace("LAST", last)
    if "table" in body:  # all True but one
        numbers = ", ".join("0" if n == 3000 else "1" for n in range(4096))
        text = text.replace("float milli", f"bool[4096] table = {{{numbers}}}, float milli")
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_causal_at_some_length_is_not_taken_for_it(name: str) -> None:
    graph = decoder("causal = LessOrEqual (j, i)\n" + HOSTILE[name] + "\nseen = And (causal, near)").graph
    why = sees_otherwise(graph)
    assert why is not None and "does not see just the tokens before" in why


@pytest.mark.parametrize("name", PLAIN)
def test_causal_masks_are_causal_however_they_are_written(name: str) -> None:
    assert sees_otherwise(decoder(PLAIN[name]).graph) is None


def test_the_smallest_place_is_said() -> None:
    for name, length in (("a window by shifts", 4097), ("a window that starts at 2^17", 131073)):
        graph = decoder("causal = LessOrEqual (j, i)\n" + HOSTILE[name] + "\nseen = And (causal, near)").graph
        why = sees_otherwise(graph)
        assert why is not None and f"from length {length} on query {length - 1} does not see key 0 (a window?)" in why
    why = sees_otherwise(decoder("far = Add (i, one)\nseen = LessOrEqual (j, far)").graph)
    assert why is not None and "from length 2 on query 0 sees key 1" in why


def test_what_is_not_known_is_named() -> None:
    why = sees_otherwise(decoder("f = Cast <to = 1> (back)\ng = Exp (f)\nseen = GreaterOrEqual (g, unit)").graph)
    assert why is not None and "cannot be read: Exp" in why
    why = sees_otherwise(
        decoder(
            "near = Gather (table, m)\nm = Mod (j, size)\nbefore = LessOrEqual (j, i)\nseen = And (before, near)"
        ).graph
    )
    assert why is not None and "the values of table" in why


@pytest.mark.parametrize(
    "last, why",
    [
        ("mask = Where (mask_4, none, hidden)", None),
        ("mask = Where (mask_4, none, soft)", "a bias"),
        ("mask = Where (mask_4, milli, hidden)", "a bias"),
        ("f = Cast <to = 1> (back)\n b = Neg (f)\n mask = Where (mask_4, b, hidden)", "a bias"),
        ("l = Not (mask_4)\n f = Cast <to = 1> (l)\n mask = Mul (f, hidden)", None),
    ],
)
def test_masks_that_are_added(last: str, why: str | None) -> None:
    said = sees_otherwise(decoder("seen = LessOrEqual (j, i)", last).graph)
    assert said is None if why is None else said is not None and why in said


def test_the_size_of_a_window_is_read() -> None:
    bodies = {
        "near = Less (back, size)": 4096,
        "w = Mul (size, two)\n near = Greater (j, e)\n e = Sub (i, w)": 8192,
        "a = Div (back, chunk)\n near = Less (a, chunk)": 4096,
        "a = Div (i, chunk)\n b = Div (j, chunk)\n near = Equal (a, b)": None,
        "near = Less (t, late)": None,
    }
    for body, size in bodies.items():
        model = decoder("causal = LessOrEqual (j, i)\n" + body + "\nseen = And (causal, near)")
        mask = next(node for node in model.graph if node.op_type == "Attention").inputs[3]
        assert mask is not None
        whole, padded = Masks(model.graph, padded=False), Masks(model.graph, padded=True)
        found = whole.reach(mask)
        assert found is not None
        window = padded.hidden_by_window(mask, found)
        assert (found if window is not None else None) == size


def test_a_window_keeps_to_the_padding() -> None:
    body = "causal = LessOrEqual (j, i)\nnear = Less (back, size)\nseen = And (causal, near)"
    for last, known in (("mask = Identity (mask_4)", True), ("mask = And (seen, seen)", False)):
        graph = decoder(body, last).graph
        mask = next(node for node in graph if node.op_type == "Attention").inputs[3]
        assert mask is not None
        assert (Masks(graph, padded=True).hidden_by_window(mask, 4096) is not None) == known


@pytest.mark.parametrize("least, taken", [("1.0", True), ("2.0", False)])
def test_rows_that_see_nothing_are_told_by_their_sums(least: str, taken: bool) -> None:
    """No row is without keys where nothing is padded; the first has one."""
    last = f"""mask = Identity (mask_4)
    ones = Cast <to = 1> (mask_4)
    axis = Constant <value_ints = [-1]> ()
    sum = ReduceSum (ones, axis)
    least = Constant <value_float = {least}> ()
    lonely = Less (sum, least)
    cleared = Where (lonely, q, past)"""
    graph = decoder("seen = LessOrEqual (j, i)", last).graph
    drop_padding(graph)
    assert ("Where" not in [node.op_type for node in graph]) == taken


def test_sums_of_several_masks_are_told_apart() -> None:
    """What is known of a sum holds for its own rows: two of other lengths do not lend each other theirs."""
    last = """mask = Identity (mask_4)
    axis = Constant <value_ints = [-1]> ()
    ones = Cast <to = 1> (mask_4)
    sum = ReduceSum (ones, axis)
    lonely = Less (sum, unit)
    hidden_2 = Not (kept_2)
    numbers = Cast <to = 1> (hidden_2)
    gone = ReduceSum (numbers, axis)
    some = GreaterOrEqual (gone, unit)"""
    graph = decoder("seen = LessOrEqual (j, i)", last).graph
    values = {value.name: value for node in graph for value in node.outputs}
    masks, padded = Masks(graph, padded=False), Masks(graph, padded=True)
    assert masks.constant(values["lonely"]) is False
    assert masks.constant(values["some"]) is None, "nothing is known of a sum but that it is no less than its parts"
    assert padded.constant(values["lonely"]) is None and padded.constant(values["some"]) is None
