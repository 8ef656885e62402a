"""Reads writes in place to intermediate tensors as the values that they compute, for as long as regions are matched.

    w[..., -n:] += m      is read as      w = slice_scatter(w, slice(w, -1, -n) + m, -1, -n)

The training IR keeps writes as the model has them, and a pattern that follows values would not see them. Where nothing
outside of the graph can see a write, `functionalise` turns it into a value; what no fused region took in, `restore`
writes back as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch.fx import Graph, Node

from fxfuse.graph.marks import FUNCTIONAL
from fxfuse.graph.view import ASSERTIONS, is_size, op_name, tensor
from fxfuse.state.families import functional_of, private_families
from fxfuse.state.scatter import scattered
from fxfuse.torch_seams import OpOverload


@dataclass
class Family:
    """One tensor, its views and the writes to them, and all that `restore` needs to undo what was done to them."""

    root: Node
    source: dict[Node, Node]
    """By view, what it is a view of. A write counts as a view too, for it gives the tensor that it wrote to."""
    copies: set[Node]
    """What may be a view of the tensor, or a copy."""
    writers: list[Node]
    was: dict[Node, OpOverload] = field(default_factory=dict)
    """By write that was turned into a value so far, its operator before."""
    out: dict[Node, Node] = field(default_factory=dict)
    """By write that has an argument `out`, what that was."""
    now: dict[Node, tuple[int, Node]] = field(default_factory=dict)
    """By view, how many writes there had been when its value was last asked for, and the node that was its value."""
    pointed: list[tuple[Node, Node, Node]] = field(default_factory=list)
    """Readers that were pointed elsewhere: the reader, what it read before, and what it reads now."""
    inserted: dict[Node, tuple[Any, Node]] = field(default_factory=dict)
    """By node that was inserted, the arguments that it was given, and the view whose value it is."""
    known: set[Node] = field(default_factory=set)
    """All nodes of the graph when every write had been turned into a value: a later one is of a fused region."""

    def value(self, view: Node, reader: Node) -> Node:
        """The node that is the value of a view after the writes so far; if it has to be computed anew, that is inserted
        before the reader."""
        seen, value = self.now[view]
        if seen == len(self.was):
            return value
        value = self.value(self.source[view], reader)
        if view not in self.was:
            before = view.args[0]
            with view.graph.inserting_before(reader):
                copied = view.graph.node_copy(view, lambda n: value if n is before else n)
            value = self._insert(copied, view, view.meta)
        self.now[view] = len(self.was), value
        return value

    def write(self, writer: Node) -> None:
        """Turns a write into the value that it writes, and inserts what the tensor behind it, and each view on the way
        to it, becomes by that."""
        chain = [self.source[writer]]
        while chain[-1] is not self.root:
            view = self.source[chain[-1]]
            chain.append(view if tensor(view) is not None else self.source[view])  # a list of pieces is none
        before = {view: self.value(view, writer) for view in chain}
        functional = functional_of(writer)
        assert functional is not None and isinstance(writer.target, OpOverload)
        self.was[writer] = writer.target
        writer.target = functional
        if "out" in writer.kwargs:
            self.out[writer] = self.source[writer]
            writer.kwargs = {k: v for k, v in writer.kwargs.items() if k != "out"}
        value, following, count = writer, writer.next, len(self.was)
        self.now[writer] = self.now[chain[0]] = count, writer
        for view, whole in pairwise(chain):
            if view not in self.was:
                with writer.graph.inserting_before(following):
                    made = scattered(writer.graph, view, before[whole], value)
                if made is not value:
                    value = self._insert(made, whole, {**writer.meta, "val": whole.meta["val"]})
            self.now[whole] = count, value

    def _insert(self, node: Node, view: Node, meta: dict[str, Any]) -> Node:
        node.meta = {**{k: v for k, v in meta.items() if k != "tensor_meta"}, FUNCTIONAL: True}
        self.inserted[node] = node.args, view
        return node


def functionalise(graph: Graph) -> list[Family]:
    """Turns writes in place into values where nothing outside can tell the difference; returns what `restore` needs."""
    families = [Family(*found) for found in private_families(graph)]
    of = {view: family for family in families for view in (family.root, *family.source)}
    for node in list(graph.nodes) if families else ():
        if op_name(node) in ASSERTIONS or is_size(node):
            continue
        for source in dict.fromkeys(node.all_input_nodes):
            family = of.get(source)
            if family is not None and (value := family.value(source, node)) is not source:
                node.replace_input_with(source, value)
                family.pointed.append((node, source, value))
        family = of.get(node)
        if family is not None and node in family.writers:
            family.write(node)
        elif family is not None:
            family.now[node] = len(family.was), node
    inserted = {node: family for family in families for node in family.inserted}
    for node in reversed(list(graph.nodes)):
        if node in inserted and not node.users:  # a whole of which only the part that was written is read
            del inserted[node].inserted[node]
            graph.erase_node(node)
    known = set(graph.nodes)
    for family in families:
        family.known = known
    return families


def restore(graph: Graph, families: list[Family]) -> None:
    """Writes back, as they were, the families that no fused region took anything of."""
    for family in reversed(families):
        if not _is_intact(family, set(graph.nodes)):
            continue
        for node, (_, view) in family.inserted.items():
            for user in [u for u in node.users if u not in family.known]:
                user.replace_input_with(node, view)
        for reader, source, value in reversed(family.pointed):
            reader.replace_input_with(value, source)
        for writer, operator in family.was.items():
            writer.target = operator
            if writer in family.out:
                writer.kwargs = {**writer.kwargs, "out": family.out[writer]}
        for node in reversed(list(graph.nodes)):
            if node in family.inserted:
                graph.erase_node(node)


def _is_intact(family: Family, alive: set[Node]) -> bool:
    """Is all that `functionalise` made still there and unchanged, and does no new node read a value that a write would
    have changed by then?"""
    if not alive.issuperset((*family.inserted, *family.writers, family.root)):
        return False
    if any(node.args != args for node, (args, _) in family.inserted.items()):
        return False
    for reader, source, value in family.pointed:
        given = family.out.get(reader) is not source
        if reader not in alive or (given and value not in reader.all_input_nodes):
            return False
    latest = {value for count, value in family.now.values() if count == len(family.was)}
    readable = {family.root, *family.source, *family.copies, *family.inserted} & alive
    return all(user in family.known for node in readable - latest for user in node.users)
