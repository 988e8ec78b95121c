"""Whether a peer may do what it asks for. Owns: asking the user's ``authorize``, and that nothing but a plain yes is a yes.

Must not know: requests, experts, how a refusal travels.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from moe.errors import ConfigError, Refused

logger = logging.getLogger(__name__)

Authorizer = Callable[..., bool]

_COMPLAIN_EVERY_S = 60.0  # about an authorizer that fails, in the log; ours
_NOTHING_TOLD: Mapping[str, Any] = MappingProxyType({})


class Authorization:
    """Asks ``authorize``, and fails closed: whatever it returns but True, or raises, is a refusal.

    :param authorize: see ConnectionHandler; None: everybody may do everything
    :raises ConfigError: it cannot be called, or is a coroutine function, whose every result looks like a yes
    """

    def __init__(self, authorize: Authorizer | None):
        if authorize is not None and not callable(authorize):
            raise ConfigError(f"authorize: expected a function or None, got {authorize!r}")
        if authorize is not None and _is_async(authorize):
            raise ConfigError("authorize: expected an ordinary function, got a coroutine function: it is not awaited")
        self._authorize = authorize
        self._tell_metadata = authorize is not None and _takes(authorize, 4)
        self._complain_from = -math.inf

    def check(self, peer: str, method: str, uid: str, metadata: Mapping[str, Any] = _NOTHING_TOLD) -> None:
        """Pass, or refuse.

        :raises Refused: this peer may not do this
        """
        if self._authorize is None or self._allows(peer, method, uid, metadata):
            return
        raise Refused(f"this peer is not allowed to call {method}", uid=uid or None)

    def _allows(self, peer: str, method: str, uid: str, metadata: Mapping[str, Any]) -> bool:
        assert self._authorize is not None
        try:
            answer = self._authorize(peer, method, uid, *((dict(metadata),) if self._tell_metadata else ()))
        except BaseException as e:  # not even SystemExit of somebody's code may end the event loop
            self._complain("raised", e)
            return False
        if not isinstance(answer, bool):
            if inspect.iscoroutine(answer):
                answer.close()
            self._complain(f"returned {type(answer).__name__}, neither True nor False", None)
        return answer is True

    def _complain(self, what: str, error: BaseException | None) -> None:
        now = time.monotonic()
        if now >= self._complain_from:
            self._complain_from = now + _COMPLAIN_EVERY_S
            logger.error("authorize %s: the peer was refused (told once a minute)", what, exc_info=error)


def _is_async(function: Any) -> bool:
    """Of a partial, what it calls is looked at; of an object, its ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    return any(
        inspect.iscoroutinefunction(part) or inspect.isasyncgenfunction(part)
        for part in (function, getattr(function, "__call__", None))  # noqa: B004 - of an instance
    )


def _takes(function: Callable[..., object], count: int) -> bool:
    """Can it be called with so many positional arguments? ``authorize`` took three before there was metadata."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError):  # too few of them; or one whose signature cannot be known
        return False
    return True
