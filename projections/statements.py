"""Which tables and views a statement in SQL names, found without a parser of SQL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_TOKEN = re.compile(r"""(?:[\w.]|"(?:[^"]|"")*")+|[(),]""")
_NO_TOKENS = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", re.DOTALL)
_STATEMENTS = {"select", "insert", "update", "delete", "merge", "with"}
_BEFORE_A_SOURCE = {"from", "join", "into", "update", "using"}
_SKIPPED = {"only", "lateral"}
_END = {
    "where",
    "group",
    "order",
    "having",
    "set",
    "returning",
    "limit",
    "values",
    "select",
    "union",
    "window",
    "offset",
}


@dataclass(slots=True)
class _Level:
    """What is known of the text between two parentheses."""

    statement: bool = False
    sources: bool = False
    expects: bool = False


@lru_cache(maxsize=4096)
def named_tables(statement: str) -> frozenset[str]:
    """Return the names, in lower case, of the tables and views that a statement in SQL reads or writes."""
    found = set()
    levels = [_Level(statement=True)]
    before = ""
    for part in _TOKEN.findall(_NO_TOKENS.sub(" ", statement)):
        level, word = levels[-1], part.lower()
        if part == "(":
            levels.append(_Level(expects=level.expects and before != "using"))
        elif part == ")":
            if len(levels) > 1:
                levels.pop()
            levels[-1].expects = False
        elif part == ",":
            level.expects = level.sources
        elif word in _BEFORE_A_SOURCE and (level.statement or word == "join") and before != "distinct":
            # extract(day from x) is not a statement
            level.statement = level.sources = level.expects = True
        elif word in _END or word in _STATEMENTS:
            level.statement |= word in _STATEMENTS
            level.sources = level.expects = False
        elif level.expects and word not in _SKIPPED:
            found.add(_plain(word))
            level.sources, level.expects = True, False
        before = word
    return frozenset(found)


def _plain(name: str) -> str:
    parts = [
        part.replace('""', '"') for part in re.findall(r'"((?:[^"]|"")*)"|([^".]+)', name) for part in part if part
    ]
    return ".".join(parts).removeprefix("main.").removeprefix("public.")
