"""hivemind's exceptions as further bases of ours. Owns: which of ours stand for which of hivemind's.

Programs written for hivemind catch ``P2PHandlerError`` (a server answered with an error) and ``P2PDaemonError`` (nobody
answered). ``except`` asks for real base classes, and ``moe.errors`` must not import hivemind, so they are added here, when the
transports are loaded: before there is anybody who could make a call. Why so: docs/decisions/0021-hiveminds-exceptions.md.
"""

from __future__ import annotations

from hivemind.p2p import P2PDaemonError, P2PHandlerError

from moe.errors import MoEError, RemoteError, SchemaError, TransportError, Unavailable

STANDS_FOR: dict[type[MoEError], type[Exception]] = {
    RemoteError: P2PHandlerError,
    SchemaError: P2PHandlerError,  # hivemind sends what does not fit, and the server answers with an error
    TransportError: P2PDaemonError,
    Unavailable: P2PDaemonError,  # as a RemoteError also P2PHandlerError: it depends on how far a server has stopped
}


def _add_bases() -> None:
    for ours, stock in STANDS_FOR.items():
        if not issubclass(ours, stock):
            ours.__bases__ = (*ours.__bases__, stock)


_add_bases()
