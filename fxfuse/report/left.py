"""Entries for blocks under autocast that could not be looked into although they hold operators that a pattern looks
for."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fxfuse.graph.blocks.inline import Blocks
from fxfuse.graph.blocks.wrapped import flattened
from fxfuse.graph.source import module_path, source_line
from fxfuse.graph.view import op_name
from fxfuse.proof.accepted import break_name
from fxfuse.recognise.catalogue import shipped
from fxfuse.report.model import Entry


def left_alone(blocks: Blocks) -> Iterator[Entry]:
    """An entry for each kind of operator that may stand in a block of autocast whose casts cannot be worked out."""
    signs = {sign: pattern.operator for pattern in shipped() for sign in getattr(pattern, "signs", ())}
    for name, inside, unclear in blocks.left:
        found: dict[str, Node] = {}
        for node in flattened(inside.nodes):
            if (operator := signs.get(op_name(node))) is not None:
                found.setdefault(operator, node)
        device, dtype = inside.mode[:2] if inside.is_autocast else ("", "")
        within = f"torch.autocast({device!r}, {dtype})" if inside.is_autocast else "torch.autocast"
        for operator, node in found.items():
            yield Entry(
                operator,
                "near miss",
                (name,),
                reason=f"it stands in a block of {within}, which casts what {break_name(unclear)} reads in a way that "
                "cannot be asked here: compute it outside of the block, or export the model in that type",
                source=source_line(node),
                module=module_path(node),
                name=f"{operator.lower()}@{break_name(node).partition('@')[2]}",
            )
