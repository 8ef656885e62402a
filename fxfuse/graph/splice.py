"""Putting a proven replacement into a graph, and taking out what it made superfluous."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from fxfuse.graph.dead_vmap import remove_unread
from fxfuse.graph.emit import KEPT_META
from fxfuse.graph.equal import MERGED
from fxfuse.graph.marks import INSERTED, STANDS_FOR
from fxfuse.graph.region import Region, too_early
from fxfuse.graph.strides import laid_out_as
from fxfuse.graph.undone_layouts import cancel_layouts
from fxfuse.graph.view import ASSERTIONS, fake, is_pure, mutated, op_name, touches
from fxfuse.torch_seams import make_fx, unguarded


class Guarded(Exception):
    """The replacement would specialise a symbolic size."""


def trace(form: Callable[..., Any], inputs: Iterable[Node]) -> Graph:
    """The ATen graph of a replacement on inputs of these nodes' shapes and dtypes, symbols kept.

    Raises:
        Guarded: tracing had to decide something about a symbolic size.
    """
    fakes = [fake(n) for n in inputs]
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    if mode is None:  # tensors within a vmap are wrapped, and have none
        raise Guarded("it is computed within torch.func.vmap, where nothing is replaced")
    env = mode.shape_env
    guards = len(env.guards) if env is not None else 0

    def in_mode(*tensors: torch.Tensor) -> Any:
        with mode:
            return form(*tensors)

    try:
        with torch.no_grad(), unguarded(mode):  # in releases that cannot refuse a guard it shows only afterwards
            module = make_fx(in_mode, pre_dispatch=True, tracing_mode="real")(*(f.detach() for f in fakes))
    except Exception as error:  # a guard comes wrapped in whatever operator asked for the size
        raise Guarded(f"it cannot be traced with symbolic sizes: {str(error).splitlines()[0]}") from error
    if env is not None and len(env.guards) > guards:
        raise Guarded(f"it would specialise the program on {env.guards[guards].expr}")
    return module.graph


class Splicer:
    """Replaces regions of one program's graph; call `finish` once all are in."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph = program.graph
        self.replaced: dict[Node, Node] = {}
        self._dead: list[Node] = []
        self._inserted: list[Node] = []
        self._sizes: dict[str, Node] = {}
        self._order = {n: i for i, n in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            if isinstance(node.meta.get("val"), torch.SymInt):
                self._sizes.setdefault(str(node.meta["val"]), node)

    def replace(self, region: Region, body: Graph) -> Node:
        """Insert `body` (see `trace`) for the region right after its output; returns the node that stands for it."""
        output = region.output
        env: dict[Node, Node] = {}
        sources = iter(region.inputs)
        provenance = {k: output.meta[k] for k in KEPT_META if k in output.meta}
        point = output
        results: list[Node] = []
        body_nodes: set[Node] = set()
        for node in body.nodes:
            if node.op == "placeholder":
                old = next(sources)
                env[node] = self.replaced.get(old, old)
            elif node.op == "output":
                results = [env[n] for n in _several(node.args[0])]
            elif (size := self._known_size(node, output)) is not None:
                env[node] = size
            else:
                with self.graph.inserting_after(point):
                    new = self.graph.node_copy(node, lambda n: env[n])
                new.meta = {**provenance, **{k: v for k, v in node.meta.items() if k in ("val", "tensor_meta")}}
                new.meta[INSERTED] = True
                env[node] = point = new
                self._inserted.append(new)
                body_nodes.add(new)
        if early := too_early(region):
            for node in early:
                point.append(node)
                point = node
            self._order = {n: i for i, n in enumerate(self.graph.nodes)}
        for i, (old, result) in enumerate(zip(region.outputs, results, strict=True)):
            copies = laid_out_as(old, result, region.nodes)
            for copy in copies:
                copy.meta[INSERTED] = True
            self._inserted.extend(copies)
            new = results[i] = copies[-1] if copies else result
            old.replace_all_uses_with(
                new,
                # Nodes of the region go on reading the old one: those that stay in the graph may need it.
                delete_user_cb=lambda user: op_name(user) not in ASSERTIONS and user not in region.nodes,
                propagate_meta=False,
            )
            self._rename_output(old, new)
            self.replaced[old] = new
            if new in body_nodes:
                new.meta[STANDS_FOR] = (new.name, old.meta.get(STANDS_FOR, (old.name, old.name))[1])
        self._dead.extend(region.nodes)
        self._dead.extend(region.others)
        # Nodes that the capture computed for the region and that nothing read (the repeats of `enable_gqa`) go too.
        self._dead.extend(u for n in (*region.sources, *region.nodes) for u in n.users if not u.users)
        self._dead.extend(i for n in region.nodes for i in n.all_input_nodes)
        return results[0]

    def finish(self) -> None:
        """Undo layouts that cancel, share what was inserted twice, and remove what nobody reads any more."""
        cancel_layouts(self._inserted)
        self._share()
        self._remove_dead([*self._dead, *self._inserted])
        remove_unread(self.graph, self._dead)
        self.graph.lint()

    def _known_size(self, node: Node, output: Node) -> Node | None:
        """A node of the graph, before `output`, that holds the same symbolic size."""
        value = node.meta.get("val")
        known = self._sizes.get(str(value)) if isinstance(value, torch.SymInt) else None
        return known if known is not None and self._order[known] < self._order[output] else None

    def _share(self) -> None:
        """One cos slice, one mask for all layers: equal insertions become the first of them.

        Nodes that read a storage that is written to in place are left apart: between two reads it may have changed.
        """
        written = {root for node in self.graph.nodes for root in mutated(node)}
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        first: dict[Any, Node] = {}
        for node in sorted(self._inserted, key=order.__getitem__):
            if not is_pure(node) or touches(node, written):
                continue
            key = (node.target, repr(node.args), repr(node.kwargs))
            original = first.setdefault(key, node)
            if original is not node:
                node.replace_all_uses_with(original, propagate_meta=False)

    def _remove_dead(self, candidates: Iterable[Node]) -> None:
        """Erase those of the candidates, and of what feeds them, that have no users left."""
        pending = list(dict.fromkeys(candidates))
        erased: set[Node] = set()
        while pending:
            node = pending.pop()
            if node in erased or MERGED in node.meta or not (node.op == "get_attr" or is_pure(node)):
                continue
            if any(op_name(u) not in ASSERTIONS for u in node.users):
                continue
            for dead in (*node.users, node):
                inputs = dead.all_input_nodes
                self.graph.erase_node(dead)
                erased.add(dead)
                pending.extend(inputs)

    def _rename_output(self, old: Node, new: Node) -> None:
        """Program outputs are named in the signature: let it name the new node."""
        for spec in self.program.graph_signature.output_specs:
            if getattr(spec.arg, "name", None) == old.name:
                spec.arg.name = new.name


def _several(results: Any) -> list[Node]:
    nodes = list(results) if isinstance(results, (list, tuple)) else [results]
    assert all(isinstance(node, Node) for node in nodes)
    return nodes
