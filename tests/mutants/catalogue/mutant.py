"""A mutant: a line that keeps a promise of the kernel, broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A deliberate bug.

    Attributes:
        promise: what it breaks.
        file: where it is, from the project's folder.
        old: text that is there exactly once.
        new: what stands there instead.
        tests: pytest's names of the tests of which one must fail.
    """

    name: str
    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
