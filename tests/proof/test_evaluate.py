"""Regions as black boxes: in float64 what they compute, in their own types how they round."""

from __future__ import annotations

import torch

from fxfuse.graph.view import fake
from fxfuse.proof.evaluate import Evaluator, draw, generator
from fxfuse.proof.sizes import Sizes, ranges_of
from tests.proof.regions import evaluate, export

X = torch.randn(3, 4, generator=generator(0))


def test_casts_between_floats_are_no_part_of_what_is_computed() -> None:
    program = export(lambda x: (x.bfloat16() * 3).float(), X)
    assert torch.equal(evaluate(program, X), X.double() * 3)
    assert torch.equal(evaluate(program, X, exact=False), (X.bfloat16() * 3).float())


def test_but_counting_in_half_precision_is() -> None:
    """301 is no number of bfloat16's, in float64 either."""
    program = export(lambda x: torch.arange(300, 304).to(torch.bfloat16) + x, X)
    assert evaluate(program, torch.zeros(3, 4))[0].tolist() == [300.0, 300.0, 302.0, 304.0]


def test_sizes_are_those_of_the_run_and_not_of_the_capture() -> None:
    program = export(lambda x: x.reshape(-1) * x.shape[0], X)
    sizes = Sizes(ranges_of(program))
    length = sizes.shape(program.graph.find_nodes(op="placeholder")[0])[0]
    x = torch.ones(length, 4)
    assert evaluate(program, x).tolist() == [length] * (4 * length)


def test_noise_is_of_the_size_that_was_asked_for() -> None:
    program = export(lambda x: x.exp() + 1, X)
    nodes = list(program.graph.nodes)
    quiet = Evaluator(Sizes(ranges_of(program)))

    def run(evaluator: Evaluator) -> torch.Tensor:
        values = evaluator.run([n for n in nodes if n.op == "call_function"], {nodes[0]: X.double()})
        result: torch.Tensor = values[nodes[-1].args[0][0]]
        return result

    off = (run(quiet.noisy(1e-6, 0)) / run(quiet) - 1).abs()
    assert 0 < float(off.max()) < 3e-6
    assert torch.equal(run(quiet.noisy(1e-6, 1)), run(quiet.noisy(1e-6, 1)))


def test_the_caller_s_random_state_is_not_touched() -> None:
    program = export(lambda x: x * 2, X)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluator = Evaluator(Sizes(ranges_of(program)))
    draw(program.graph.find_nodes(op="placeholder")[0], evaluator, generator(1))
    evaluator.noisy(1e-6, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_whole_numbers_are_drawn_over_their_whole_range() -> None:
    program = export(lambda x: x + 1, torch.zeros(64, 64, dtype=torch.int8))
    node = program.graph.find_nodes(op="placeholder")[0]
    drawn = draw(node, Evaluator(Sizes(ranges_of(program))), generator(0), high=None)
    assert drawn.dtype == fake(node).dtype and int(drawn.min()) < -100 and int(drawn.max()) > 100
    few = draw(node, Evaluator(Sizes(ranges_of(program))), generator(0))
    assert set(few.flatten().tolist()) <= {0, 1, 2, 3}


def test_a_mask_that_is_drawn_leaves_every_row_something() -> None:
    program = export(lambda m: ~m, torch.ones(5, 6, dtype=torch.bool))
    node = program.graph.find_nodes(op="placeholder")[0]
    for seed in range(20):
        drawn = draw(node, Evaluator(Sizes(ranges_of(program))), generator(seed))
        assert bool(drawn.any(-1).all()) and bool((~drawn).any(-1).all())
