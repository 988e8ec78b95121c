"""Showing what strangers wrote. Owns: that a string out of the DHT is seen as it is, and does nothing to a terminal."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


def printable(text: str) -> str:
    """The text with everything that a terminal would not just show (control characters, escape sequences, changes of the
    writing direction) as an escape, such as ``\\x1b``.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class PlainFormatter(logging.Formatter):
    """For logs on a terminal: messages may quote what strangers wrote."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as text."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def cell(text: object) -> Text:
    """For a table of rich: the text itself, whatever markup is in it."""
    from rich.text import Text

    return Text(printable(str(text)))
