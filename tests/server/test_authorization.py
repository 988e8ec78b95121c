"""Authorization: only True is a yes, whatever else a user's function returns or raises."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest

from moe.errors import ConfigError, ExpertNotFound, MoEError, Refused
from moe.server.authorization import Authorization
from moe.server.connection_handler import ConnectionHandler
from moe.transport.base import BACKWARD, FORWARD, INFO, TICKET
from moe.wire.messages import RequestHeader
from tests.experts import LoraExpert, lora_backend, seeded


async def nobody(peer: str, method: str, uid: str) -> bool:
    return False


async def some_of_many(peer: str, method: str, uid: str) -> Any:
    yield True


class AsyncCall:
    async def __call__(self, peer: str, method: str, uid: str) -> bool:
        return False

    async def method(self, peer: str, method: str, uid: str) -> bool:
        return False


@pytest.mark.parametrize(
    "authorize",
    [
        nobody,
        some_of_many,
        functools.partial(nobody, "peer"),
        functools.partial(functools.partial(nobody, "peer"), "forward"),
        AsyncCall(),
        functools.partial(AsyncCall(), "peer"),
        AsyncCall().method,
        "alice",
    ],
)
def test_what_can_never_answer_is_refused_when_it_is_given(authorize: Any) -> None:
    with pytest.raises(ConfigError, match="authorize: expected"):
        ConnectionHandler({}, authorize=authorize)


def raising(error: BaseException) -> Any:
    def authorize(peer: str, method: str, uid: str) -> bool:
        raise error

    return authorize


@pytest.mark.parametrize(
    "authorize",
    [
        lambda *asked: nobody("", "", ""),  # looks like no coroutine function, and returns a coroutine
        lambda *asked: 1,
        lambda *asked: "yes",
        lambda *asked: None,
        lambda *asked: [True],
        raising(KeyError("token")),
        raising(SystemExit(1)),
        lambda only_one: True,
    ],
)
def test_anything_but_true_is_no(authorize: Any, caplog: pytest.LogCaptureFixture) -> None:
    asking = Authorization(authorize)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            with pytest.raises(Refused, match="not allowed to call forward"):
                asking.check("alice", FORWARD, "e.0")
    assert len(caplog.records) == 1  # in a minute


def test_yes_and_no_are_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    Authorization(lambda *asked: True).check("alice", FORWARD, "e.0")
    Authorization(None).check("alice", FORWARD, "e.0")
    with pytest.raises(Refused):
        Authorization(lambda *asked: False).check("alice", FORWARD, "e.0")
    assert not caplog.records


def test_descriptions_and_direct_links_are_asked_for_too() -> None:
    asked: list[tuple[Any, ...]] = []

    def authorize(peer: str, method: str, uid: str, metadata: dict[str, Any]) -> bool:
        asked.append((method, uid, metadata))
        return peer == "alice"

    handler = ConnectionHandler({"lora.0": lora_backend(seeded(LoraExpert))}, authorize=authorize)
    handler.describe("alice", "lora.0")
    handler.allow_ticket("alice")
    with pytest.raises(Refused, match="not allowed to call info"):
        handler.describe("mallory", "lora.0")
    with pytest.raises(Refused, match="not allowed to call ticket"):
        handler.allow_ticket("mallory")
    assert asked == [(INFO, "lora.0", {}), (TICKET, "", {})] * 2


def test_who_may_not_call_does_not_learn_which_experts_there_are() -> None:
    handler = ConnectionHandler(
        {"lora.0": lora_backend(seeded(LoraExpert))}, authorize=lambda peer, method, uid: peer == "alice"
    )

    def told(peer: str, uid: str) -> list[str]:
        errors: list[str] = []
        for ask in (
            lambda: handler.open(peer, FORWARD, uid, RequestHeader()),
            lambda: handler.open(peer, BACKWARD, uid, None),
            lambda: handler.describe(peer, uid),
        ):
            try:
                ask()
            except MoEError as e:
                errors.append(f"{type(e).__name__}: {e.message}")
        return errors

    assert told("mallory", "lora.0") == told("mallory", "lora.1")
    assert len(told("mallory", "lora.0")) == 3
    with pytest.raises(ExpertNotFound):
        handler.describe("alice", "lora.1")
