"""Reading a page: its fenced blocks, and the comment before a block that says what to do with it.

    <!-- file: bank.py -->        the block is the file bank.py
    <!-- add to: bank.py -->      the block goes to the end of that file
    <!-- goes on from: a.md -->   anywhere in a page: it begins with the files that a.md leaves behind
    <!-- skip: why -->            the block is not executed; the test counts them

Without a comment a block is executed: `python` in the page's namespace, `sh` line by line (`# error: text` behind a
command means that it fails and says so), `sql` as a query. A `text` block is what the block before it prints; `...`
stands for any text, and alone on a line for any lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- ([^>]*?) -->\n\Z")
_GOES_ON = re.compile(r"<!-- goes on from: (\S+) -->")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        line: where its fence is.
        comment: what the HTML comment right before it says, or nothing.
    """

    path: Path
    line: int
    language: str
    text: str
    comment: str

    @property
    def place(self) -> str:
        """Where to look when it fails."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    def argument(self, directive: str) -> str | None:
        """Return what stands behind a directive in the comment, or None."""
        name, colon, value = self.comment.partition(": ")
        return value if colon and name == directive else None


def read_blocks(path: Path) -> list[Block]:
    """Return the blocks of a page in order."""
    text = path.read_text()
    blocks = []
    for fence in _FENCE.finditer(text):
        comment = _COMMENT.search(text, 0, fence.start())
        line = text.count("\n", 0, fence.start()) + 1
        blocks.append(Block(path, line, fence[1], fence[2], comment[1] if comment else ""))
    return blocks


def files_left_behind(path: Path) -> dict[str, str]:
    """Return the files, by name, that a reader has who followed a page and those it goes on from."""
    files = files_before(path)
    for block in read_blocks(path):
        write_block(block, files)
    return files


def files_before(path: Path) -> dict[str, str]:
    """Return the files that a page begins with."""
    goes_on = _GOES_ON.search(path.read_text())
    return files_left_behind(path.parent / goes_on[1]) if goes_on else {}


def write_block(block: Block, files: dict[str, str]) -> bool:
    """Put a block into the files if it is one; return whether it was."""
    if (name := block.argument("file")) is not None:
        files[name] = block.text
    elif (name := block.argument("add to")) is not None:
        files[name] += "\n\n" + block.text
    else:
        return False
    return True
