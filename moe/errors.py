"""The whole exception tree. Owns: what can go wrong, its wire code, and whether trying again can help.

Must not know: torch, sockets, or who raises what. A retry loop branches on the class (or on ``retryable``); the wire
carries ``code`` and the message, and ``error_from_wire`` turns them back into the same class on the other side.
"""

from __future__ import annotations

from typing import ClassVar

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


class NoExpertsFound(RoutingError, LookupError):
    """No live expert matches what was asked for."""

    code = "no_experts"


class TooFewExperts(RoutingError, TimeoutError):
    """Fewer experts than ``k_min`` answered for some rows. A TimeoutError, as hivemind's users expect."""

    code = "too_few_experts"


class MissingBlocks(RoutingError, LookupError):
    """Some blocks of a sequence have no live server."""

    code = "missing_blocks"


def error_from_wire(code: str, message: str, *, peer: str | None = None, uid: str | None = None) -> MoEError:
    """The error a peer reported, as the class it had over there; unknown codes become RemoteError."""
    return _BY_CODE.get(code, RemoteError)(message, peer=peer, uid=uid)
