"""Walking through a page as a reader does: writing its files, typing its commands, comparing what is printed."""

from __future__ import annotations

import ast
import asyncio
import io
import re
import shlex
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

from tests.commands import Command, Commands
from tests.docs.pages import Block, files_before, read_blocks, write_block

WAIT_S = 60.0
_ERROR = re.compile(r"#\s*error: (.*)$")
_READING = ("query", "show", "trace", "status", "backlog", "jobs", "dead-letters list", "dead-letters show")


class Walk:
    """One page in a folder of its own.

    Args:
        environment: of its commands; a command may have further variables.
        places: what stands in the page for something that is another one here, such as a server's address.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        commands: Commands,
        environment: Mapping[str, str],
        places: Mapping[str, str],
    ) -> None:
        self.path, self.folder, self._places = path, folder, places
        self._commands, self._environment = commands, environment
        self._files = files_before(path)
        for name in self._files:
            self._write(name)
        self._module = types.ModuleType(f"page_{path.stem.replace('-', '_')}")
        sys.modules[self._module.__name__] = self._module
        self._runner = asyncio.Runner()
        self._service: Command | None = None
        self._services = 0

    def go(self) -> None:
        """Take every block in order."""
        blocks = [block for block in read_blocks(self.path) if block.argument("skip") is None]
        for block, following in zip(blocks, [*blocks[1:], None][: len(blocks)], strict=True):
            if block.language == "text":
                continue
            expected = following if following is not None and following.language == "text" else None
            self._take(block, expected)

    def close(self) -> None:
        """Stop what the page started."""
        self._stop_service()
        self._runner.close()
        del sys.modules[self._module.__name__]
        self._forget_modules()

    def _take(self, block: Block, expected: Block | None) -> None:
        if block.language == "json":
            return  # an answer shown for reading; `text` is compared
        if write_block(block, self._files):
            self._write(block.argument("file") or block.argument("add to") or "")
            return
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                printed = self._execute(block)
                assert expected is None or matches(expected.text, printed), (
                    f"{block.place}: the page shows\n{expected.text}\nand this was printed\n{printed}"
                )
                return
            except AssertionError:
                # a projection is a moment behind its commands, and health behind what it speaks of
                if not self._only_reads(block) or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _execute(self, block: Block) -> str:
        if block.language == "python":
            return self._run_python(block)
        if block.language == "sql":
            return self._type(block, f"eskernel query {shlex.quote(block.text)}")
        assert block.language == "sh", f"{block.place}: what is a block of {block.language!r}?"
        lines = block.text.replace("\\\n", "").splitlines()
        return "".join(self._type(block, line) for line in lines if line.strip() and not line.startswith("#"))

    def _only_reads(self, block: Block) -> bool:
        reading = tuple(f"eskernel {command}" for command in _READING)
        return block.language == "sql" or all(line.startswith(reading) for line in block.text.splitlines())

    def _write(self, name: str) -> None:
        self._forget_modules()
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._here(self._files[name]))

    def _here(self, text: str) -> str:
        for shown, real in self._places.items():
            text = text.replace(shown, real)
        return text

    # python

    def _run_python(self, block: Block) -> str:
        padding = "\n" * block.line  # so that a traceback names the page's line
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(padding + self._here(block.text), block.place.rpartition(":")[0], "exec", flags=flags)
        printed = io.StringIO()

        async def run() -> None:
            awaited = eval(code, vars(self._module))
            if awaited is not None:
                await awaited

        with redirect_stdout(printed):
            if "asyncio.run(" in block.text:
                eval(code, vars(self._module))
            else:
                self._runner.run(run())
        return printed.getvalue()

    def _forget_modules(self) -> None:
        """Let the next import read the page's files again."""
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{self.folder}/"):
                del sys.modules[name]

    # shell

    def _type(self, block: Block, line: str) -> str:
        fails = _ERROR.search(line)
        words = shlex.split(self._here(line), comments=True)
        environment = {**self._environment, "COLUMNS": "160" if words[0] == "eskernel" else "80"}
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, environment[name] = words.pop(0).partition("=")
        if words[0] == "curl":
            return _get(words[-1])
        if (words[:2] == ["eskernel", "run"] or words[-1] == "&") and not fails:
            return self._start_service(block, [word for word in words if word != "&"], environment)
        done = self._commands.run(words, self.folder, environment)
        code, printed, errors = done.returncode, done.stdout, done.stderr
        if fails:
            said = " ".join((printed + errors).split())
            assert code != 0 and fails[1].strip() in said, f"{block.place}: {line}\nexit code {code}\n{printed}{errors}"
        else:
            assert code == 0, f"{block.place}: {line}\nexit code {code}\n{printed}{errors}"
        return printed

    def _start_service(self, block: Block, words: list[str], environment: dict[str, str]) -> str:
        self._stop_service()
        self._services += 1
        printed, errors = (self.folder / f".service-{self._services}.{kind}" for kind in ("out", "err"))
        with printed.open("w") as out, errors.open("w") as err:
            self._service = self._commands.start(words, self.folder, environment, out.fileno(), err.fileno())
        deadline = time.monotonic() + WAIT_S
        while "stop it with" not in (text := printed.read_text()):
            assert time.monotonic() < deadline, f"{block.place}\n{errors.read_text()}"
            time.sleep(0.02)
        return text

    def _stop_service(self) -> None:
        if self._service is not None:
            service, self._service = self._service, None
            code = service.stop()
            assert code == 0, f"{self.path}: the service ended with {code}"


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
    except urllib.error.HTTPError as error:
        text = error.read().decode()
    return text


def matches(shown: str, printed: str) -> bool:
    """Say whether a page shows what was printed: `...` stands for any text, alone on a line for any lines."""
    pattern = ""
    for line in shown.rstrip("\n").split("\n"):
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += r"[^\n]*?".join(map(re.escape, line.rstrip().split("..."))) + r"[ ]*\n"
    return re.fullmatch(pattern, printed.rstrip("\n") + "\n") is not None
