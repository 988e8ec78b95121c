"""Reading the documentation: code blocks, tables that the code has to agree with, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"", "python", "sh", "ini", "yaml"}  # without one: pictures and output


def name_of(document: Path) -> str:
    """How tests call a document."""
    return document.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    :ivar line: number of its first line of code, from 1
    """

    language: str
    line: int
    code: str


def blocks_of(document: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found: list[Block] = []
    fence, start, lines = None, 0, document.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if fence is None and line.startswith("```"):
            fence, start = line.removeprefix("```"), number + 1
        elif fence is not None and line == "```":
            found.append(Block(fence, start, "\n".join(lines[start - 1 : number - 1])))
            fence = None
    assert fence is None, f"{name_of(document)}:{start}: a block without an end"
    return [block for block in found if language in (None, block.language)]


def program_of(document: Path) -> str:
    """All Python blocks as one program, every line where it is in the document."""
    lines: list[str] = []
    for block in blocks_of(document, "python"):
        lines += [""] * (block.line - 1 - len(lines))
        lines += block.code.splitlines()
    return "\n".join(lines) + "\n"


def commands_of(document: Path) -> list[str]:
    """The commands in a document's shell blocks, without comments."""
    lines = [line for block in blocks_of(document, "sh") for line in block.code.splitlines()]
    return [command for line in lines if (command := line.partition("#")[0].strip())]


def table_of(document: Path, name: str) -> list[list[str]]:
    """The rows of the table below the mark ``<!-- table: name -->``, without its head and rows that are headings."""
    lines = document.read_text(encoding="utf-8").splitlines()
    start = lines.index(f"<!-- table: {name} -->") + 3
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not cells[0].startswith("**"):
            rows.append(cells)
    return rows


def code(cell: str) -> str:
    """The first piece of code in a cell."""
    found = re.search(r"`([^`]*)`", cell)
    assert found is not None, f"no code in {cell!r}"
    return found[1]


def anchors_of(document: Path) -> set[str]:
    """What links can point to within a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
