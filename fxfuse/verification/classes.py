"""Which values are equal: terms, and what equal arguments imply of them (congruence closure).

A term is an operator with its literal arguments (its head) and the terms that it reads. Two terms of one head whose
children are equal are equal; more equalities are given by `union`. See Downey, Sethi and Tarjan,
https://doi.org/10.1145/322217.322228.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

Head = Hashable


class Classes:
    """Terms by number, and which of them are equal."""

    def __init__(self) -> None:
        self._terms: list[tuple[Head, tuple[int, ...]]] = []
        self._parent: list[int] = []
        self._table: dict[tuple[Head, tuple[int, ...]], int] = {}

    def term(self, head: Head, children: Sequence[int] = ()) -> int:
        """The term of this head and these children; the one that is there already, if one is."""
        key = self._key(head, children)
        known = self._table.get(key)
        if known is None:
            known = len(self._terms)
            self._terms.append((head, tuple(children)))
            self._parent.append(known)
            self._table[key] = known
        return known

    def known(self, head: Head, children: Sequence[int]) -> int | None:
        """The term, if it is there."""
        return self._table.get(self._key(head, children))

    def first(self, term: int) -> int:
        """The first term that is spelled as this one: of one head, with equal children."""
        return self._table[self._key(*self._terms[term])]

    def find(self, term: int) -> int:
        """The representative of all terms that are equal to this one."""
        while self._parent[term] != term:
            self._parent[term] = self._parent[self._parent[term]]
            term = self._parent[term]
        return term

    def union(self, one: int, two: int) -> None:
        """The two are equal; `close` follows what that implies."""
        a, b = self.find(one), self.find(two)
        self._parent[max(a, b)] = min(a, b)

    def close(self) -> None:
        """Make equal whatever has equal children by now."""
        changed = True
        while changed:
            changed = False
            self._table = {}
            for number, (head, children) in enumerate(self._terms):
                first = self._table.setdefault(self._key(head, children), number)
                if self.find(first) != self.find(number):
                    self.union(first, number)
                    changed = True

    def _key(self, head: Head, children: Sequence[int]) -> tuple[Head, tuple[int, ...]]:
        return head, tuple(map(self.find, children))
