"""Names of experts: the grammar is hivemind's, character by character."""

from __future__ import annotations

import random

import hivemind.moe.expert_uid as stock
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import expert_uid as ours
from moe.errors import ConfigError
from moe.expert_uid import MAX_UID_LENGTH, UidPattern, coordinates, is_valid_prefix, is_valid_uid, split_uid

# the tables of hivemind's test_uid_patterns
VALID_UIDS = [
    "expert.1",
    "expert.0",
    "expert.0.0.1",
    "expert.1.0.1",
    "expert.10.0",
    "ffn.1.2.3",
    "some-name!.0",
    "ëxpert.7",
]
INVALID_UIDS = [
    "e xpert.1.",
    "expert",
    "expert.",
    "expert.01",
    "expert.-1",
    "expert.1.a",
    "expert.1..2",
    "expert.1.02",
    "expert.00",
    ".1.2",
    "1",
    "",
    "expert.1\n",
    "expert.1.2\n",
    "expert.1 ",
    "expert.²",
    "my expert.1",
    " expert.1",
    "expert .1",
    "ex\tpert.1",
    "ex\npert.1",
    "ex\rpert.1",
    "ex\0pert.1",
    "ex\x1b[31mpert.1",
    "ex\x7fpert.1",
    "ex\u00a0pert.1",
    "ex\u200bpert.1",
    "ex\u2028pert.1",
    "ex\ud800pert.1",
]
VALID_PREFIXES = ["expert.", "e.1.", "e.2.", "e.1.2.3.", "ëxpert.0.10."]
INVALID_PREFIXES = [
    "expert",
    "expert.1",
    "e.1",
    "e..",
    "e.01.",
    "e.1.2.3",
    ".",
    "",
    ".1.",
    "expert.-1.",
    "expert.\n",
    "my expert.",
    " .",
    "\t.1.",
]


@pytest.mark.parametrize("uid", VALID_UIDS)
def test_valid_uids(uid):
    assert is_valid_uid(uid)
    assert not is_valid_prefix(uid)
    assert is_valid_prefix(uid + ".")


@pytest.mark.parametrize("uid", INVALID_UIDS)
def test_invalid_uids(uid):
    assert not is_valid_uid(uid)


@pytest.mark.parametrize("prefix", VALID_PREFIXES)
def test_valid_prefixes(prefix):
    assert is_valid_prefix(prefix)
    assert not is_valid_uid(prefix)


@pytest.mark.parametrize("prefix", INVALID_PREFIXES)
def test_invalid_prefixes(prefix):
    assert not is_valid_prefix(prefix)


@given(st.text("ab.0123 -\n\t", max_size=12))
def test_the_grammar_is_that_of_hivemind_without_spaces(text):
    seen = not any(c.isspace() for c in text)
    assert is_valid_uid(text) == (stock.is_valid_uid(text) and seen)
    assert is_valid_prefix(text) == (stock.is_valid_prefix(text) and seen)


@given(st.text(max_size=20))
def test_what_is_valid_here_is_valid_for_hivemind_and_in_a_chain(text):
    for uid in (text, f"{text}.0"):
        if is_valid_uid(uid):
            assert stock.is_valid_uid(uid)
            assert ours.split_chain(ours.join_chain([uid, uid])) == (uid, uid)
            assert uid.encode()


def test_the_constants_are_those_of_hivemind():
    for name in ("UID_DELIMITER", "FLAT_EXPERT"):
        assert getattr(ours, name) == getattr(stock, name)


def test_uids_have_a_bounded_length():
    assert is_valid_uid("x" * (MAX_UID_LENGTH - 2) + ".1")
    assert not is_valid_uid("x" * (MAX_UID_LENGTH - 1) + ".1")
    assert not is_valid_prefix("x" * MAX_UID_LENGTH + ".")


@pytest.mark.parametrize("uid", [*VALID_UIDS[:6], *VALID_PREFIXES[1:]])
def test_split_uid_as_hivemind_does(uid):
    assert split_uid(uid) == stock.split_uid(uid)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=5))
def test_splitting_undoes_joining(path):
    uid = ".".join(["ffn", *map(str, path)])
    assert is_valid_uid(uid)
    assert coordinates(uid) == tuple(path)
    prefix, last = split_uid(uid)
    assert last == path[-1]
    assert f"{prefix}{last}" == uid


def test_chains():
    assert ours.split_chain("a.0 a.1 a.2") == ("a.0", "a.1", "a.2")
    assert ours.split_chain("a.0") == ("a.0",)
    assert ours.split_chain("") == ()
    assert ours.split_chain(ours.join_chain(["a.0", "a.1"])) == ("a.0", "a.1")


def test_patterns_enumerate_and_sample():
    pattern = UidPattern("ffn.[1:3].[0:2]")
    assert len(pattern) == 4
    assert list(pattern) == ["ffn.1.0", "ffn.1.1", "ffn.2.0", "ffn.2.1"]
    assert {pattern.sample(random.Random(seed)) for seed in range(100)} == set(pattern)
    assert list(UidPattern("ffn.7")) == ["ffn.7"]
    assert all(uid in pattern for uid in pattern)
    others = ["ffn.0.0", "ffn.3.0", "ffn.1", "ffn.1.0.0", "other.1.0", "ffn.01.0", "ffn.1.", "ffn", "", 7]
    assert [uid for uid in others if uid in pattern] == []


@pytest.mark.parametrize(
    "pattern", ["ffn.[3:1]", "ffn.[1:1]", "ffn.[a:3]", "ffn.[0:3", "ffn.0:3]", "ffn.[0:3].x", "ffn", "", "a..1", "a b"]
)
def test_bad_patterns_are_named(pattern):
    with pytest.raises(ConfigError, match="Expert pattern"):
        UidPattern(pattern)
