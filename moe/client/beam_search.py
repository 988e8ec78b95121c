"""The best live experts of a grid by gating scores. Owns: the search, and what is remembered of prefixes in between.

``GridSearch`` is the search: no I/O, no clock. It says which prefixes it wants to know, is told their successors, and
ends with exactly the best experts. ``PrefixCache`` is the memory, with ``now`` passed in. ``MoEBeamSearcher`` drives
both over the DHT. Must not know: how experts are called.

Shapes: B rows of scores, K experts wanted per row, D grid dimensions, U open prefixes, N experts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from moe.client.background import in_thread
from moe.dht import DHT, Successor, Successors, check_dht, fetch_prefixes, get_dht_time
from moe.errors import CallTimeout, ConfigError, NoExpertsFound
from moe.expert_uid import (
    FLAT_EXPERT,
    PREFIX_PATTERN,
    UID_DELIMITER,
    Coordinate,
    ExpertInfo,
    ExpertPrefix,
    ExpertUID,
    Score,
    is_valid_prefix,
    split_uid,
)

if TYPE_CHECKING:
    from moe.client.expert import RemoteExpert

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 15.0  # for one search
MAX_CACHED_PREFIXES = 2**16
_SCORES_AT_ONCE = 2**22  # bounds memory, not the result

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
_Result = TypeVar("_Result")


class ScoredExpert(NamedTuple):
    """An expert found for a row, and the sum of its coordinates' scores."""

    score: Score
    expert: ExpertInfo


class Branch(NamedTuple):
    """The successors of one prefix, ready to be scored: next coordinates in order, and the expert at each."""

    coordinates: _Ints
    experts: list[ExpertInfo]

    @classmethod
    def of(cls, prefix: ExpertPrefix, successors: Successors, grid_size: Sequence[int]) -> Branch:
        """Those successors that lie in the grid. At the last dimension they are the experts themselves."""
        level = prefix.count(UID_DELIMITER)  # of the dimension that the successors are coordinates of
        if len(grid_size) == 1 and level == 2:  # name.3. leads to the expert name.3
            flat = successors.get(FLAT_EXPERT)
            kept = [FLAT_EXPERT] if flat is not None and flat.expert.uid == prefix.rstrip(UID_DELIMITER) else []
        elif 1 < level <= len(grid_size):
            depth = len(grid_size)  # of the experts of this grid; below the same prefix there can be others
            kept = [
                c
                for c, successor in sorted(successors.items())
                if 0 <= c < grid_size[level - 1] and (level < depth or successor.expert.uid == f"{prefix}{c}")
            ]
        else:
            kept = []
        return cls(np.array(kept, dtype=np.int64), [successors[c].expert for c in kept])


NO_BRANCH = Branch(np.empty(0, dtype=np.int64), [])


class GridSearch:
    """Finds the K live experts with the highest scores for each of B rows. Exact, if fed all prefixes it wants.

    An expert's score is the sum of its coordinates' scores, so no expert below a prefix scores more than the prefix
    plus the best score of each remaining dimension. A prefix is wanted while that bound reaches the K-th best expert
    found; after a look at the most promising prefixes few are. Of equal scores the lower coordinates win. A coordinate
    scored -inf is never chosen.

    64 rows, K 4, all prefixes fed from memory, one core of a busy 2-core machine: 2.6 ms for a full grid of (4, 256),
    2.7 ms for (256,), 9 ms for (256, 256), 16 ms for (32, 32, 32).

    :param uid_prefix: common prefix of all uids, with its dot
    :param grid_scores: for each dimension, scores of shape (B, size of the dimension)
    :param beam_size: K

    >>> search = GridSearch("ffn.", scores, beam_size=4)
    >>> while wanted := search.wanted():
    ...     search.feed({prefix: look_up(prefix) for prefix in wanted})
    >>> best = search.best()
    """

    def __init__(self, uid_prefix: ExpertPrefix, grid_scores: Sequence[_Floats], beam_size: int):
        self.scores, self.beam_size = list(grid_scores), beam_size
        rows, dims = len(self.scores[0]), len(self.scores)
        self._maxima = [scores.max(axis=1) for scores in self.scores]

        # open prefixes, in order of their coordinates; those of fewer dimensions are padded with -1
        size = self.scores[0].shape[1]
        self._prefixes = [f"{uid_prefix}{i}{UID_DELIMITER}" for i in range(size)]
        self._coordinates = np.full((size, dims), -1, dtype=np.int64)  # (U, D)
        self._coordinates[:, 0] = np.arange(size)
        self._partial = self.scores[0]  # (B, U): sum over the coordinates a prefix has
        self._bound = self._bounds(self._partial, 1)  # (B, U)

        # the best so far; -1: none
        self._best_score = np.full((rows, beam_size), -np.inf)  # (B, K)
        self._best_id = np.full((rows, beam_size), -1, dtype=np.int64)  # (B, K)
        self._experts: list[ExpertInfo] = []
        self._expert_coordinates: _Ints = np.empty((0, dims), dtype=np.int64)  # (N, D)

    def wanted(self, width: int | None = None) -> list[ExpertPrefix]:
        """The prefixes to feed next: for each row the most promising ``width`` (default: K) of those it still needs.
        Most promising first; empty: the search is over.
        """
        needed = self._needed(self._bound, self._coordinates)
        columns = np.flatnonzero(needed.any(axis=0))
        if not columns.size:
            return []
        chosen = _most_promising(needed[:, columns], self._bound[:, columns], width or self.beam_size)
        bound = np.where(chosen, self._bound[:, columns], -np.inf).max(axis=0)
        order = np.argsort(-bound, kind="stable")
        return [self._prefixes[columns[i]] for i in order if bound[i] > -np.inf]

    def feed(self, branches: Mapping[ExpertPrefix, Branch]) -> None:
        """Tell the successors of prefixes that were wanted."""
        fed = [column for column, prefix in enumerate(self._prefixes) if prefix in branches]
        dims = len(self.scores)
        levels = (self._coordinates[fed] >= 0).sum(axis=1)
        found = [branches[self._prefixes[column]] for column in fed]
        self._feed_experts(*_split(fed, found, levels >= dims - 1))
        self._feed_prefixes(fed, *_split(fed, found, levels < dims - 1))

    def best(self) -> list[list[ScoredExpert]]:
        """For each row up to K experts, best first."""
        return [
            [ScoredExpert(score, self._experts[i]) for score, i in zip(scores, ids) if i >= 0]
            for scores, ids in zip(self._best_score.tolist(), self._best_id.tolist())
        ]

    def _bounds(self, partial: _Floats, dim: int) -> _Floats:
        """The most that experts below can score. Summed in the order of their scores, so that it also bounds them as
        rounded."""
        for maximum in self._maxima[dim:]:
            partial = partial + maximum[:, None]
        return partial

    def _needed(self, bound: _Floats, coordinates: _Ints) -> _Bools:
        """Which rows could find a better expert below which prefix, given the bounds and coordinates of prefixes."""
        worst = self._best_score[:, -1:]  # (B, 1); -inf as long as there are fewer than K
        needed = bound > worst
        if self._experts:
            # an equal score wins by lower coordinates; comparing the first one is enough to rule most prefixes out
            first = np.where(self._best_id[:, -1] >= 0, self._expert_coordinates[self._best_id[:, -1], 0], -1)
            needed |= (bound == worst) & (coordinates[:, 0] <= first[:, None]) & (worst > -np.inf)
        return needed

    def _feed_experts(self, columns: list[int], branches: list[Branch]) -> None:
        """Score the experts below prefixes: for each row those below its most promising ones, then what it still needs."""
        lengths = np.array([len(branch.experts) for branch in branches], dtype=np.int64)  # (L,)
        if not lengths.any():
            return
        starts = len(self._experts) + np.cumsum(lengths) - lengths  # the experts of one branch are neighbours
        coordinates = cast("npt.NDArray[np.int64]", np.repeat(self._coordinates[columns], lengths, axis=0))
        if coordinates.shape[1] > 1:
            coordinates[:, -1] = np.concatenate([branch.coordinates for branch in branches])
        self._experts += [expert for branch in branches for expert in branch.experts]
        self._expert_coordinates = np.concatenate([self._expert_coordinates, coordinates])

        partial, bound, prefixes = self._partial[:, columns], self._bound[:, columns], self._coordinates[columns]
        rows, width = len(bound), self.beam_size
        unseen = np.broadcast_to(lengths > 0, bound.shape).copy()  # (B, L)
        while (needed := unseen & self._needed(bound, prefixes)).any():
            width = min(width, max(1, _SCORES_AT_ONCE // (rows * int(lengths.max()))))
            chosen = _most_promising(needed, bound, width)
            unseen &= ~chosen
            table, ids = self._score(chosen, partial, starts, branches)
            self._keep_best(table, ids)
            width *= 2

    def _score(self, chosen: _Bools, partial: _Floats, starts: _Ints, branches: list[Branch]) -> tuple[_Floats, _Ints]:
        """Scores and ids of each row's experts in the branches chosen for it, packed to the left; -inf: none."""
        if len(self.scores) == 1:  # at most one expert in a branch, and its score is that of the prefix
            return np.where(chosen, partial, -np.inf), np.broadcast_to(starts, chosen.shape)
        lengths = np.array([len(branch.experts) for branch in branches], dtype=np.int64)
        table = np.full((len(chosen), int((chosen @ lengths).max())), -np.inf)
        ids = np.empty(table.shape, dtype=np.int64)
        filled = np.zeros(len(chosen), dtype=np.int64)
        for i in np.flatnonzero(chosen.any(axis=0)):
            row = np.flatnonzero(chosen[:, i])[:, None]
            place = filled[row] + np.arange(lengths[i])
            table[row, place] = partial[row, i] + self.scores[-1][row, branches[i].coordinates]
            ids[row, place] = np.arange(starts[i], starts[i] + lengths[i])
            filled[row] += lengths[i]
        return table, ids

    def _keep_best(self, score: _Floats, ids: _Ints) -> None:
        """Merge scored experts, some for each row, into the best ones."""
        score = np.concatenate([self._best_score, score], axis=1)
        ids = np.concatenate([self._best_id, ids], axis=1)
        kth = score.shape[1] - self.beam_size
        worst = np.partition(score, kth, axis=1)[:, [kth]]  # (B, 1): the K-th best; more than K may reach it
        row, column = np.nonzero((score >= worst) & (score > -np.inf))
        score, ids = score[row, column], ids[row, column]
        order = np.lexsort((*self._expert_coordinates[ids].T[::-1], -score, row))
        row, score, ids = row[order], score[order], ids[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < self.beam_size
        self._best_score[row[kept], rank[kept]] = score[kept]
        self._best_id[row[kept], rank[kept]] = ids[kept]

    def _feed_prefixes(self, fed: list[int], inner: list[int], branches: list[Branch]) -> None:
        """Put the prefixes below the inner ones of the fed ones in the place of these."""
        kept = np.delete(np.arange(len(self._prefixes)), fed)
        prefixes = [self._prefixes[column] for column in kept]
        coordinates, partial, bound = self._coordinates[kept], self._partial[:, kept], self._bound[:, kept]
        for column, branch in zip(inner, branches):
            dim = int((self._coordinates[column] >= 0).sum())
            below = np.repeat(self._coordinates[[column]], len(branch.coordinates), axis=0)
            below[:, dim] = branch.coordinates
            scores = self._partial[:, [column]] + self.scores[dim][:, branch.coordinates]
            prefixes += [f"{self._prefixes[column]}{c}{UID_DELIMITER}" for c in branch.coordinates]
            coordinates = np.concatenate([coordinates, below])
            partial = np.concatenate([partial, scores], axis=1)
            bound = np.concatenate([bound, self._bounds(scores, dim + 1)], axis=1)
        order = np.lexsort(coordinates.T[::-1]) if inner else np.arange(len(prefixes))
        self._prefixes = [prefixes[i] for i in order]
        self._coordinates, self._partial, self._bound = coordinates[order], partial[:, order], bound[:, order]


def _most_promising(needed: _Bools, bound: _Floats, width: int) -> _Bools:
    """For each row up to ``width`` of the needed columns, those with the highest bounds; of equal ones the first."""
    if width >= needed.shape[1]:
        return needed
    order = np.argsort(np.where(needed, -bound, np.inf), axis=1, kind="stable")[:, :width]
    chosen = np.zeros_like(needed)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & needed


def _split(columns: list[int], branches: list[Branch], mask: _Bools) -> tuple[list[int], list[Branch]]:
    return [c for c, kept in zip(columns, mask) if kept], [b for b, kept in zip(branches, mask) if kept]


class Known(NamedTuple):
    """What is known of a prefix, since when, and until when to believe it."""

    successors: Successors
    branch: Branch
    since: float
    until: float


class PrefixCache:
    """What is known of prefixes, for a while. Times are DHT times.

    :param grid_size: of the grid to search
    :param max_age_s: how long to believe that a prefix has the successors it had, at most until one of them expires
    :param absent_age_s: how long to believe that it has none
    """

    def __init__(self, grid_size: Sequence[int], max_age_s: float, absent_age_s: float):
        self.grid_size, self.max_age_s, self.absent_age_s = tuple(grid_size), max_age_s, absent_age_s
        self._known: dict[ExpertPrefix, Known] = {}
        self._failed: dict[ExpertUID, Successor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def put(self, prefix: ExpertPrefix, successors: Successors, now: float) -> Known:
        """Remember the successors of a prefix, except experts that failed and have not been announced since."""
        with self._lock:
            if self._failed:
                successors = {c: s for c, s in successors.items() if not self._has_failed(prefix, c, s)}
            branch = Branch.of(prefix, successors, self.grid_size)
            if successors:
                until = min(now + self.max_age_s, *(successor.expiration_time for successor in successors.values()))
            else:
                until = now + self.absent_age_s
            if len(self._known) >= MAX_CACHED_PREFIXES:
                self._known = {p: known for p, known in self._known.items() if known.until > now}
                if len(self._known) >= MAX_CACHED_PREFIXES:
                    self._known.clear()
            self._known[prefix] = known = Known(successors, branch, now, until)
            return known

    def get(self, prefix: ExpertPrefix, now: float, *, believe_absent: bool = True) -> Known | None:
        """What is known of a prefix, or None: ask the DHT.

        :param believe_absent: False: do not believe for longer than ``max_age_s`` that a prefix has no successors
        """
        known = self._known.get(prefix)
        if known is None or not known.since <= now < known.until:
            return None
        if not known.successors and not believe_absent and now >= known.since + self.max_age_s:
            return None
        return known

    def forget(self, uid: ExpertUID) -> None:
        """Drop what led to an expert, and hide the expert until its server announces it again (or another one does)."""
        with self._lock:
            prefix, coordinate = uid + UID_DELIMITER, FLAT_EXPERT
            while prefix.count(UID_DELIMITER) > 1:
                known = self._known.pop(prefix, None)
                if known is not None and coordinate in known.successors:
                    successor = known.successors[coordinate]
                    if successor.expert.uid == uid:
                        self._failed[uid] = successor
                prefix, coordinate = split_uid(prefix)

    def _has_failed(self, prefix: ExpertPrefix, coordinate: Coordinate, successor: Successor) -> bool:
        uid = successor.expert.uid
        if coordinate != FLAT_EXPERT and uid != f"{prefix}{coordinate}":
            return False  # one example of many below this prefix
        failed = self._failed.get(uid)
        if failed is None:
            return False
        if failed.expert.peer_id == successor.expert.peer_id and failed.expiration_time >= successor.expiration_time:
            return True
        del self._failed[uid]
        return False

    def counts(self) -> tuple[int, int, set[str]]:
        """How many prefixes were looked up, how many of them had successors, and at which peers these are."""
        known = list(self._known.values())
        peers = {s.expert.peer_id.to_base58() for entry in known for s in entry.successors.values()}
        return len(known), sum(bool(entry.successors) for entry in known), peers


class MoEBeamSearcher:
    """Finds the most suitable live experts of a grid in the DHT.

    Each expert has a uid such as ``ffn.98.76``: a prefix and its position in the grid. The DHT has, for every prefix
    (``ffn.98.``), the next coordinates that lead to live experts. The search needs the prefixes of promising
    coordinates only, asks for those of all rows of a batch at once, and remembers them for a few seconds in this
    process. Unlike hivemind's, it finds exactly the best live experts (see GridSearch), unless that takes more than
    ``max_lookups`` prefixes: then it finds the best below these.

    :param dht: a running DHT
    :param uid_prefix: search for experts whose uids start with this; a missing dot at its end is added
    :param grid_size: number of coordinates in each dimension
    :param num_workers: concurrent workers of one look-up in the DHT; default: the DHT's own
    :param negative_caching: remember also which prefixes have no live experts. hivemind writes that into the DHT,
        where it hides new experts from everybody; here it stays in this object, and is not believed where it would
        leave a row without any expert
    :param cache_expiration: for how many seconds
    :param max_age_s: for how many seconds to remember a prefix's live experts; at most until one of them expires
    :param max_lookups: prefixes one search may ask the DHT for
    :param timeout_s: for one search, unless the call says otherwise
    :raises ConfigError: what is given as a DHT is none, a prefix or a grid that cannot be
    """

    def __init__(
        self,
        dht: DHT,
        uid_prefix: ExpertPrefix,
        grid_size: Sequence[int],
        num_workers: int | None = None,
        negative_caching: bool = True,
        cache_expiration: float = 30.0,
        *,
        max_age_s: float = 3.0,
        max_lookups: int = 1024,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ):
        check_dht(dht)
        if not uid_prefix.endswith(UID_DELIMITER):
            uid_prefix += UID_DELIMITER
        if not is_valid_prefix(uid_prefix) or uid_prefix.count(UID_DELIMITER) > 1:
            raise ConfigError(f"Prefix {uid_prefix!r} is invalid: expected a name without dots and one dot")
        if not grid_size or not all(isinstance(size, (int, np.integer)) and size > 0 for size in grid_size):
            raise ConfigError(f"grid_size is a list of positive numbers, got {grid_size!r}")
        self.dht, self.uid_prefix, self.grid_size = dht, uid_prefix, tuple(map(int, grid_size))
        self.total_grid_size = sum(self.grid_size)
        self.num_workers, self.negative_caching, self.cache_expiration = num_workers, negative_caching, cache_expiration
        self.max_lookups, self.timeout_s = max_lookups, timeout_s
        self.cache = PrefixCache(self.grid_size, max_age_s, cache_expiration if negative_caching else 0.0)

    def __repr__(self) -> str:
        return f"MoEBeamSearcher({self.uid_prefix!r}, {self.grid_size}, {len(self.cache)} prefixes known)"

    # --- hivemind's methods -------------------------------------------------------------------------------------------

    def find_best_experts(self, grid_scores: Sequence[Any], beam_size: int, return_future: bool = False) -> Any:
        """The live experts with the highest scores.

        :param grid_scores: for each dimension, the scores of its coordinates
        :param beam_size: return up to this many
        :param return_future: search in the background and return a ``concurrent.futures.Future``
        :returns: a list of RemoteExpert, best first
        :raises ConfigError: if the scores do not fit the grid
        :raises CallTimeout: if the DHT takes too long
        :raises LifecycleError: if the DHT is not running
        """
        rows = [_to_array(scores)[None] for scores in grid_scores]
        return _later_if(return_future, lambda: self._find(rows, beam_size)[0])

    def batch_find_best_experts(
        self, batch_grid_scores: Sequence[Any], beam_size: int, return_future: bool = False
    ) -> Any:
        """The same for each row of a batch, with one look-up in the DHT for all of them.

        :param batch_grid_scores: for each dimension, scores of shape (batch size, size of the dimension)
        """
        return _later_if(return_future, lambda: self._find(batch_grid_scores, beam_size))

    def get_initial_beam(self, scores: Sequence[float], beam_size: int, return_future: bool = False) -> Any:
        """The best first coordinates that lead to live experts.

        :param scores: of the coordinates of the first dimension
        :returns: up to beam_size tuples (score, prefix, {next coordinate: an expert}), best first
        """
        row = _to_array(scores)
        return _later_if(return_future, lambda: self._initial_beam(row, beam_size))

    def get_active_successors(
        self, prefixes: Sequence[ExpertPrefix], grid_size: int | None = None, return_future: bool = False
    ) -> Any:
        """The next coordinates that lead to live experts.

        :param grid_size: leave out coordinates from here on
        :returns: for each prefix {next coordinate: an expert}; empty if there are none
        :raises ConfigError: for a string instead of a list, or an invalid prefix
        """
        if isinstance(prefixes, str):
            raise ConfigError("Please send a list / tuple of expert prefixes.")
        for prefix in prefixes:
            if not is_valid_prefix(prefix):
                raise ConfigError(f"prefix {prefix!r} is invalid, it must follow {PREFIX_PATTERN.pattern}")

        def look_up() -> dict[ExpertPrefix, dict[Coordinate, ExpertInfo]]:
            known = self._look_up(prefixes, time.monotonic() + self.timeout_s)
            end = grid_size or np.inf
            return {p: {c: s.expert for c, s in known[p].successors.items() if 0 <= c < end} for p in prefixes}

        return _later_if(return_future, look_up)

    # --- ours ---------------------------------------------------------------------------------------------------------

    def search(
        self, batch_grid_scores: Sequence[Any], beam_size: int, *, timeout_s: float | None = None
    ) -> list[list[ExpertInfo]]:
        """For each row of a batch, up to ``beam_size`` live experts with the highest scores, best first.

        :param batch_grid_scores: for each dimension, scores of shape (batch size, size of the dimension)
        :param timeout_s: default: the searcher's
        :raises ConfigError: if the scores do not fit the grid
        :raises CallTimeout: if the DHT takes too long
        :raises LifecycleError: if the DHT is not running
        """
        scores = self._check_scores(batch_grid_scores, beam_size)
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        best, doubtful = self._search(scores, beam_size, deadline, believe_absent=True)
        if doubtful and not all(best):
            best, _ = self._search(scores, beam_size, deadline, believe_absent=False)
        return [[found.expert for found in row] for row in best]

    def forget(self, uid: ExpertUID) -> None:
        """This expert has failed: ask the DHT again, and leave it out until its server or another one announces it."""
        self.cache.forget(uid)

    def no_experts_found(self) -> NoExpertsFound:
        """The error for callers that cannot do without experts: says what was looked for and what was seen."""
        looked_up, alive, peers = self.cache.counts()
        pattern = self.uid_prefix + UID_DELIMITER.join(f"[0:{size}]" for size in self.grid_size)
        return NoExpertsFound(
            f"no live experts {pattern} in the DHT: looked up {looked_up} prefixes, {alive} of which have live "
            f"successors, at {len(peers)} peers"
        )

    def _find(self, batch_grid_scores: Sequence[Any], beam_size: int) -> list[list[RemoteExpert]]:
        from moe.client.expert import create_remote_experts

        return [create_remote_experts(row, self.dht) for row in self.search(batch_grid_scores, beam_size)]

    def _search(
        self, scores: list[_Floats], beam_size: int, deadline: float, *, believe_absent: bool
    ) -> tuple[list[list[ScoredExpert]], bool]:
        """The best experts, and whether that rests on an old memory of prefixes that had none."""
        search = GridSearch(self.uid_prefix, scores, beam_size)
        room, width, doubtful = self.max_lookups, beam_size, False
        while wanted := search.wanted(width):
            now = get_dht_time()
            memory = ((prefix, self.cache.get(prefix, now, believe_absent=believe_absent)) for prefix in wanted)
            known = {prefix: entry for prefix, entry in memory if entry is not None}
            if known:  # they may rule out what else was wanted
                doubtful |= any(not k.successors and now >= k.since + self.cache.max_age_s for k in known.values())
                search.feed({prefix: entry.branch for prefix, entry in known.items()})
                width *= 2 if len(known) == len(wanted) else 1
                continue
            asked, skipped = wanted[:room], wanted[room:]
            if skipped and room:
                logger.warning("looked up %d prefixes of %r, will not look further", self.max_lookups, self)
            room -= len(asked)
            found = {prefix: entry.branch for prefix, entry in self._fetch(asked, deadline).items()}
            search.feed({**found, **dict.fromkeys(skipped, NO_BRANCH)})
            width *= 2
        return search.best(), doubtful

    def _initial_beam(
        self, scores: _Floats, beam_size: int
    ) -> list[tuple[Score, ExpertPrefix, dict[Coordinate, ExpertInfo]]]:
        deadline = time.monotonic() + self.timeout_s
        beam: list[tuple[Score, ExpertPrefix, dict[Coordinate, ExpertInfo]]] = []
        untried, width = np.argsort(-scores, kind="stable"), beam_size
        while untried.size and len(beam) < beam_size:
            wave = {int(i): f"{self.uid_prefix}{i}{UID_DELIMITER}" for i in untried[:width]}
            untried, width = untried[width:], width * 2
            known = self._look_up(list(wave.values()), deadline)
            for i, prefix in wave.items():
                if known[prefix].successors:
                    experts = {c: successor.expert for c, successor in known[prefix].successors.items()}
                    beam.append((float(scores[i]), prefix, experts))
        return beam[:beam_size]

    def _look_up(self, prefixes: Iterable[ExpertPrefix], deadline: float) -> dict[ExpertPrefix, Known]:
        now = get_dht_time()
        memory = {prefix: self.cache.get(prefix, now) for prefix in prefixes}
        known = {prefix: entry for prefix, entry in memory.items() if entry is not None}
        return {**known, **self._fetch([prefix for prefix in memory if prefix not in known], deadline)}

    def _fetch(self, prefixes: list[ExpertPrefix], deadline: float) -> dict[ExpertPrefix, Known]:
        if not prefixes:
            return {}
        left = deadline - time.monotonic()
        if left <= 0:
            raise CallTimeout(f"the search for experts {self.uid_prefix}* in the DHT took too long")
        found = fetch_prefixes(self.dht, prefixes, timeout_s=left, num_workers=self.num_workers)
        now = get_dht_time()
        return {prefix: self.cache.put(prefix, found[prefix], now) for prefix in prefixes}

    def _check_scores(self, batch_grid_scores: Sequence[Any], beam_size: int) -> list[_Floats]:
        scores = [_to_array(dimension) for dimension in batch_grid_scores]
        shapes = [dimension.shape for dimension in scores]
        rows = shapes[0][0] if shapes and shapes[0] else 0
        if shapes != [(rows, size) for size in self.grid_size]:
            expected = ", ".join(f"(rows, {size})" for size in self.grid_size)
            raise ConfigError(f"scores for the grid {self.grid_size}: expected shapes {expected}, got {shapes}")
        if beam_size <= 0:
            raise ConfigError(f"beam_size is a positive number, got {beam_size}")
        if any(np.isnan(dimension).any() or np.isposinf(dimension).any() for dimension in scores):
            raise ConfigError("scores are nan or infinite")
        return scores


def _to_array(scores: Any) -> _Floats:
    """Numbers, an array or a tensor, on any device and of any dtype, as float64."""
    if hasattr(scores, "detach"):
        scores = scores.detach().double().cpu()
    return np.asarray(scores, dtype=np.float64)


def _later_if(return_future: bool, function: Callable[[], _Result]) -> Any:
    """The result, or a future of it."""
    return in_thread(function) if return_future else function()
