"""The whole exception tree. Owns: what can go wrong, its wire code, and whether trying again can help.

Must not know: torch, sockets, or who raises what. A retry loop branches on the class (or on ``retryable``); the wire
carries ``code`` and the message, and ``error_from_wire`` turns them into what a server can say: never into a mistake of the
caller's own, whatever the server claims.
"""

from __future__ import annotations

from typing import ClassVar

MAX_MESSAGE_CHARS = 2000  # of what a peer says; more is cut off

_BY_CODE: dict[str, type[MoEError]] = {}


class MoEError(Exception):
    """Base of every error this package raises on purpose.

    :ivar code: short stable name of the error on the wire
    :ivar retryable: True if the same call may succeed on another try or with another peer
    :ivar peer: base58 id of the peer that answered, if the error came from one
    :ivar uid: uid of the expert concerned, if any
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, peer: str | None = None, uid: str | None = None):
        super().__init__(message)
        self.message, self.peer, self.uid = message, peer, uid

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" in cls.__dict__:
            assert cls.code not in _BY_CODE, f"two error classes share the wire code {cls.code!r}"
            _BY_CODE[cls.code] = cls

    def __str__(self) -> str:
        origin = [f"expert {self.uid}"] if self.uid else []
        origin += [f"peer ...{self.peer[-8:]}"] if self.peer else []
        return f"{self.message} [{', '.join(origin)}]" if origin else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.message, self.peer, self.uid)


def _restore(cls: type[MoEError], message: str, peer: str | None, uid: str | None) -> MoEError:
    return cls(message, peer=peer, uid=uid)


# --- our own mistakes: never retried, never held against a peer ---------------------------------------------------


class SchemaError(MoEError, ValueError):
    """An input, output or gradient does not fit the expert's schema. Says which tensor, what was expected, what came."""

    code = "schema"


class LifecycleError(MoEError, RuntimeError):
    """Something was used before it started, after it stopped, or could not start or stop in time."""

    code = "lifecycle"


class ConfigError(MoEError, ValueError):
    """A setting is wrong or contradicts another one."""

    code = "config"


class Unsupported(MoEError, NotImplementedError):
    """Something that local modules can do and remote ones cannot: forward-mode differentiation, pickling."""

    code = "unsupported"


# --- the conversation went wrong ------------------------------------------------------------------------------------


class ProtocolError(MoEError):
    """A peer sent bytes that are not a valid message of a protocol version we speak."""

    code = "protocol"


class ReplyTooLarge(ProtocolError):
    """The reply does not fit into a unary message. The call has been done; ask again, as a stream, for its answer."""

    code = "reply_too_large"


class TransportError(MoEError):
    """The bytes did not get through."""

    code = "transport"
    retryable = True


class ConnectError(TransportError):
    """The peer could not be reached at all; it has not seen the request."""

    code = "connect"


class CallTimeout(TransportError, TimeoutError):
    """No answer within the caller's time budget. The peer may or may not have done the work."""

    code = "timeout"


class PeerGone(TransportError):
    """The connection broke after the request was (at least partly) sent."""

    code = "peer_gone"


# --- the peer answered, with an error -------------------------------------------------------------------------------


class RemoteError(MoEError):
    """A server answered a call with an error. ``peer`` and ``uid`` tell whose."""

    code = "remote"


class RemoteSchemaError(RemoteError):
    """A server says that a request does not fit its expert's schema, although it fits what the client was told of it."""


class ExpertNotFound(RemoteError, LookupError):
    """The server does not host an expert with this uid."""

    code = "not_found"


class ExpertFailed(RemoteError):
    """The expert's own code raised, or returned something that does not fit its schema."""

    code = "expert_failed"


class NonFiniteError(RemoteError, ArithmeticError):
    """Anomaly detection found nan or inf; nothing was trained."""

    code = "non_finite"


class Refused(RemoteError):
    """The server understood the request and will not do it (not allowed, unsupported version or feature)."""

    code = "refused"


class Overloaded(RemoteError):
    """The server's bounded queue is full."""

    code = "overloaded"
    retryable = True


class DeadlineExceeded(RemoteError, TimeoutError):
    """The caller's time was over before the server got to the request; it was not computed."""

    code = "deadline"
    retryable = True


class Unavailable(RemoteError):
    """The server is stopping or its Runtime has died."""

    code = "unavailable"
    retryable = True


class TensorNotHeld(RemoteError):
    """The request refers to a tensor that the server does not hold (any more). Send it."""

    code = "not_held"
    retryable = True


# --- nobody to ask --------------------------------------------------------------------------------------------------


class RoutingError(MoEError):
    """No server could be chosen."""

    code = "routing"


class NoExpertsFound(RoutingError, LookupError, RuntimeError):
    """No live expert matches what was asked for. Also a RuntimeError, as in hivemind."""

    code = "no_experts"


class TooFewExperts(RoutingError, TimeoutError):
    """Fewer experts than ``k_min`` answered for some rows. A TimeoutError, as hivemind's users expect."""

    code = "too_few_experts"


class MissingBlocks(RoutingError, LookupError):
    """Some blocks of a sequence have no live server."""

    code = "missing_blocks"


# --- from the wire ----------------------------------------------------------------------------------------------------

_OF_SERVERS: dict[str, type[MoEError]] = {
    **{cls.code: cls for cls in (RemoteError, ExpertNotFound, ExpertFailed, NonFiniteError, Refused, Overloaded)},
    **{cls.code: cls for cls in (DeadlineExceeded, Unavailable, TensorNotHeld, ProtocolError, ReplyTooLarge)},
    SchemaError.code: RemoteSchemaError,
    CallTimeout.code: DeadlineExceeded,
    **{cls.code: Unavailable for cls in (LifecycleError, TransportError, ConnectError, PeerGone)},
}
"""What the codes of errors mean that a server answers with. What went wrong between it and others is its own affair."""


def error_from_wire(code: str, message: str, *, peer: str | None = None, uid: str | None = None) -> MoEError:
    """The error that a server answered with; codes that are unknown, or not for a server to say, become RemoteError."""
    cls, message = _OF_SERVERS.get(code), printable(message)
    if cls is None:
        cls, message = RemoteError, f"{printable(code, 100)}: {message}"
    return cls(message, peer=peer, uid=uid)


def error_named(name: str, message: str, *, peer: str | None = None, uid: str | None = None) -> MoEError | None:
    """``error_from_wire`` for the name of one of our classes; None: it is none of these."""
    code = next((code for code, cls in _BY_CODE.items() if cls.__name__ == name), None)
    return None if code is None else error_from_wire(code, message, peer=peer, uid=uid)


def printable(text: str, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    """What a peer says, on one line, of bounded length, without anything that a terminal would act upon."""
    if len(text) > max_chars:
        text = text[: max_chars - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
