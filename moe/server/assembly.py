"""How settings become a server's parts. Owns: the parameters of ``Server.create``, their checks, and choosing uids.

Everything is checked before the first process starts; what fails later stops what was started. Must not know: how parts run.
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moe.config import HandlerConfig, PoolConfig, ServerConfig, note_unused, replace_known
from moe.dht import DHT, ServerInfo, ServerState, declare_experts, find_experts, get_dht_time, start_dht, stop_dht
from moe.errors import ConfigError, MoEError
from moe.expert_uid import UID_DELIMITER, UID_PATTERN, UidPattern, block_range, is_valid_uid
from moe.schema import Compression
from moe.server.blocks import BlockSource, seed_of, seeded
from moe.server.checkpoints import find_checkpointed_uids, load_experts
from moe.server.expert_backend import ExpertBackend
from moe.server.layers import (
    add_custom_models_from_file,
    build_expert,
    expert_schema,
    schedule_name_to_scheduler,
)
from moe.server.optim import ClippingWrapper
from moe.server.pretrained import PretrainedModel
from moe.server.rebalancing import choose_blocks, look_at
from moe.server.throughput import Throughput, remembered_or_measured
from moe.version import __version__
from moe.wire.tensors import check_codec_available

logger = logging.getLogger(__name__)

DEFAULT_OPTIMIZER = partial(torch.optim.Adam)  # unlike Adam itself: nobody asked for it
ATTEMPTS_PER_EXPERT = 10  # hivemind's: uids sampled per uid wanted, before giving up
MAX_TOLD = 8  # uids in a message
_ENUMERATE_UP_TO = 4096  # patterns with fewer uids are searched completely instead of sampled


class ServerParts(NamedTuple):
    """What ``Server`` is made of."""

    dht: DHT
    backends: dict[str, ExpertBackend]
    server_options: dict[str, Any]


def assemble(
    num_experts: int | None = None,
    expert_uids: Sequence[str] | None = None,
    expert_pattern: str | None = None,
    expert_cls: str = "ffn",
    hidden_dim: int = 1024,
    optim_cls: Callable[..., Any] | None = DEFAULT_OPTIMIZER,
    scheduler: str = "none",
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    clip_grad_norm: float | None = None,
    num_handlers: int | None = None,
    min_batch_size: int = 1,
    max_batch_size: int = 4096,
    device: torch.device | str | None = None,
    initial_peers: Sequence[Any] = (),
    checkpoint_dir: str | Path | None = None,
    compression: int = Compression.NONE,
    stats_report_interval: float | None = None,
    custom_module_path: str | Path | None = None,
    update_period: float | None = None,
    expiration: float | None = None,
    *,
    model_path: str | Path | None = None,
    block_indices: str | None = None,
    block_prefix: str = "block.",
    total_blocks: int | None = None,
    blocks: BlockSource | None = None,
    num_blocks: int | None = None,
    balance_quality: float | None = None,
    balance_period_s: float | None = None,
    throughput: float | str | None = "auto",
    accumulate_steps: int = 1,
    checkpoint_period_s: float | None = None,
    keep_checkpoints: int | None = None,
    stop_timeout_s: float | None = None,
    detect_anomalies: bool = False,
    train_on_non_finite: bool = False,
    request_timeout_s: float | None = None,
    held_max_bytes: int | None = None,
    direct: bool | None = None,
    direct_port: int | None = None,
    direct_hosts: Sequence[str] | None = None,
    handler_config: HandlerConfig | None = None,
    config: ServerConfig | None = None,
    authorize: Callable[[str, str, str], bool] | None = None,
    **dht_options: Any,
) -> ServerParts:
    """Experts of one class, a DHT node, and the options of the Server that hosts them.

    :param num_experts: host this many experts, with uids from the checkpoint directory, then from ``expert_pattern``
    :param expert_uids: host experts with exactly these uids; give either this or ``num_experts``
    :param expert_pattern: such as ``ffn.[0:32].[0:256]``: uids are sampled from it, avoiding those in use
    :param expert_cls: registered name, such as "ffn"
    :param hidden_dim: main dimension of the experts
    :param optim_cls: called with the parameters of each expert; None: experts never change. Default: Adam; with
        ``model_path`` None
    :param scheduler: name of a learning-rate schedule
    :param num_warmup_steps: of the schedule
    :param num_training_steps: of the schedule
    :param clip_grad_norm: clip gradients to this global norm before each step
    :param num_handlers: hivemind's; has no effect: one network thread serves all requests
    :param min_batch_size: rows a batch waits for, briefly
    :param max_batch_size: rows in one batch
    :param device: default: cuda if there is one, else cpu
    :param initial_peers: multiaddrs of peers of the swarm to join; none: a new swarm
    :param checkpoint_dir: save and load experts there
    :param compression: codec of all floating-point inputs, outputs and gradients
    :param stats_report_interval: seconds between reports of served rows
    :param custom_module_path: a file that registers expert classes
    :param update_period: seconds between announcements; default: that of ``config``, 30
    :param expiration: seconds an announcement lives
    :param model_path: folder with a pretrained Hugging Face model whose blocks are hosted, instead of ``expert_cls``
    :param block_indices: ``"FIRST:END"``: host these blocks of a model; instead of ``num_experts`` and ``expert_uids``.
        Default with ``model_path``: all
    :param block_prefix: blocks are experts of ``expert_cls`` with uids ``{block_prefix}{index}``; they begin with the same
        random weights on every server, unless ``checkpoint_dir`` has others
    :param total_blocks: blocks of the model; default: those up to the end of ``block_indices``
    :param blocks: a model that is made in another way, instead of ``expert_cls``, ``block_prefix`` and ``total_blocks``
    :param num_blocks: host this many consecutive blocks, where the swarm needs them most, and move when that changes; instead
        of ``block_indices``. Such blocks are not trained: others host them, too
    :param balance_quality: when to move; with ``balance_period_s``, see ServerConfig
    :param throughput: rows per second the server says it can serve; "auto": measured once for each kind of expert on this
        machine; "eval": measured now; None: it does not say
    :param detect_anomalies: see ExpertBackend; so for ``train_on_non_finite``
    :param stop_timeout_s: see ServerConfig, as for the other settings of these names
    :param held_max_bytes: see HandlerConfig; of one peer a fourth, unless ``handler_config`` says otherwise
    :param handler_config: what is accepted from the network; single settings above win over it
    :param config: periods and timeouts; likewise
    :param direct: offer direct links next to libp2p; with ``direct_port`` and ``direct_hosts``, see ServerConfig
    :param dht_options: forwarded to hivemind's DHT and P2P
    :raises ConfigError: wrong or contradicting settings; nothing was started
    :raises LifecycleError: the DHT node could not start
    """
    note_unused("Server.create", num_handlers=num_handlers is not None)
    if isinstance(expert_uids, str):
        raise ConfigError(f"expert_uids is a list of uids, got the string {expert_uids!r}")
    exact = expert_pattern is None and num_experts is None and expert_uids is not None
    generated = num_experts is not None and expert_uids is None
    of_model = block_indices is not None or model_path is not None or num_blocks is not None
    if num_blocks is not None and (block_indices is not None or num_blocks < 1):
        raise ConfigError("num_blocks: expected at least 1, and no block_indices")
    if isinstance(throughput, str) and throughput not in ("auto", "eval"):
        raise ConfigError(f"throughput: expected 'auto', 'eval', rows per second or None, got {throughput!r}")
    if of_model and (num_experts, expert_uids, expert_pattern) != (None, None, None):
        raise ConfigError(
            "block_indices says which experts to host; leave out num_experts, expert_uids and expert_pattern"
        )
    if model_path is not None and (blocks, total_blocks) != (None, None):
        raise ConfigError("model_path is a model with all its blocks; leave out blocks and total_blocks")
    if blocks is not None and block_indices is None and num_blocks is None:
        raise ConfigError("blocks: say which ones to host with block_indices, or how many with num_blocks")
    if not exact and not generated and not of_model:
        raise ConfigError(
            "Please provide either expert_uids *or* num_experts (possibly with expert_pattern), but not both"
        )
    for uid in expert_uids or ():
        if not is_valid_uid(uid):
            raise ConfigError(f"{uid!r} is not a valid expert uid; uids follow {UID_PATTERN.pattern}")
    pattern = UidPattern(expert_pattern) if expert_pattern is not None else None
    PoolConfig(min_batch_size=min_batch_size, max_batch_size=max_batch_size)
    handler_config = replace_known(
        handler_config or HandlerConfig(),
        request_timeout_s=request_timeout_s,
        held_max_bytes=held_max_bytes,
        held_max_bytes_per_peer=(
            None if held_max_bytes is None or handler_config is not None else max(1, held_max_bytes // 4)
        ),
    )
    server_config = replace_known(
        config or ServerConfig(),
        update_period_s=update_period,
        expiration_s=expiration,
        stats_report_interval_s=stats_report_interval,
        checkpoint_period_s=checkpoint_period_s,
        keep_checkpoints=keep_checkpoints,
        stop_timeout_s=stop_timeout_s,
        direct=direct,
        direct_port=direct_port,
        direct_hosts=None if direct_hosts is None else tuple(direct_hosts),
        balance_quality=0.0 if num_blocks is None else balance_quality,
        balance_period_s=balance_period_s,
    )
    check_codec_available(compression)
    if custom_module_path is not None:
        add_custom_models_from_file(custom_module_path)
    pretrained = PretrainedModel(model_path) if model_path is not None else None
    if (pretrained is not None or num_blocks is not None) and optim_cls is DEFAULT_OPTIMIZER:
        optim_cls = None
    if num_blocks is not None and server_config.balance_quality > 0 and optim_cls is not None:
        raise ConfigError(
            "blocks that are trained cannot move: where they go to, others host other copies. Leave out the optimizer, or "
            "set balance_quality to 0"
        )
    registered = blocks is None and pretrained is None
    schema = expert_schema(expert_cls, hidden_dim, compression) if registered else {}
    if optim_cls is None and (scheduler != "none" or clip_grad_norm is not None):
        raise ConfigError("scheduler and clip_grad_norm need an optimizer")
    if scheduler not in schedule_name_to_scheduler:
        raise ConfigError(f"unknown scheduler {scheduler!r}; known: {', '.join(sorted(schedule_name_to_scheduler))}")
    checkpoint_path = None
    uids = list(expert_uids or ())
    if checkpoint_dir is not None:
        checkpoint_path = Path(checkpoint_dir)
        checkpoint_path.mkdir(parents=True, exist_ok=True)
        if generated:
            uids = _saved_uids(checkpoint_path, num_experts or 0)
            if pattern is not None:
                others = [uid for uid in uids if uid not in pattern]
                _warn_of_others(
                    checkpoint_path, others, f"expert_pattern is {pattern.pattern}; they are hosted all the same"
                )
        elif uids:
            others = [uid for uid in find_checkpointed_uids(checkpoint_path) if uid not in uids]
            _warn_of_others(
                checkpoint_path, others, f"the experts asked for are {_some(uids)}; the former are not loaded"
            )
    make = partial(
        _make_backend,
        expert_cls=expert_cls,
        hidden_dim=hidden_dim,
        schema=schema,
        optim_cls=optim_cls,
        scheduler=scheduler,
        schedule=dict(num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps),
        clip_grad_norm=clip_grad_norm,
        options=dict(
            min_batch_size=min_batch_size,
            max_batch_size=max_batch_size,
            accumulate_steps=accumulate_steps,
            detect_anomalies=detect_anomalies,
            train_on_non_finite=train_on_non_finite,
        ),
    )
    if registered:
        make("check.0")  # everything that can be wrong with the module, optimizer and schedule shows here
    own_blocks = range(0)
    if of_model:
        total = total_blocks if pretrained is None else pretrained.num_blocks
        own_blocks = range(total or 0) if block_indices is None else block_range(block_indices)
        if (blocks, total, block_indices) == (None, None, None):
            raise ConfigError("num_blocks: give total_blocks, too; without it, nobody knows where the model ends")
        blocks = blocks or BlockSource(
            prefix=block_prefix,
            total=own_blocks.stop if total is None else total,
            make=partial(
                _make_block,
                prefix=block_prefix,
                make=make,
                checkpoint_path=checkpoint_path,
                pretrained=pretrained,
                compression=compression,
            ),
        )
        blocks.check(own_blocks)
        if num_blocks is not None:
            blocks.check([num_blocks - 1])

    # The DHT's process shares our memory until one of both writes to it, which a garbage collection does, to every object:
    # 64 experts took 349 MB instead of 192. So what is there now is left out of collections until the server stops.
    gc.collect()
    gc.freeze()
    dht = start_dht(initial_peers, start_timeout_s=server_config.start_timeout_s, **dht_options)
    try:
        if generated and len(uids) < (num_experts or 0):
            uids += generate_uids((num_experts or 0) - len(uids), pattern, dht, taken=set(uids))
        if blocks is not None:
            if num_blocks is not None:
                own_blocks = _join(dht, blocks, num_blocks, server_config.announce_expiration_s)
            backends = blocks.make_all(own_blocks)
        else:
            backends = {uid: make(uid) for uid in uids}
            if checkpoint_path is not None:
                load_experts(backends, checkpoint_path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        served: Throughput | float | None
        if isinstance(throughput, str):
            served = _measured(next(iter(backends.values()), None), device, anew=throughput == "eval")
        else:
            served = throughput
    except BaseException:
        stop_dht(dht)
        gc.unfreeze()
        raise
    options = dict(
        device=device,
        throughput=served,
        blocks=blocks,
        checkpoint_dir=checkpoint_path,
        handler_config=handler_config,
        config=server_config,
        authorize=authorize,
    )
    return ServerParts(dht, backends, options)


def _join(dht: DHT, source: BlockSource, num_blocks: int, expiration_s: float) -> range:
    """Choose blocks, and say so before they are loaded, so that servers that join meanwhile choose others."""
    place = choose_blocks(look_at(dht, source), source.total, num_blocks)
    logger.info("hosting blocks %d:%d of %d", place.start, place.stop, source.total)
    info = ServerInfo(state=ServerState.JOINING, version=__version__)
    try:
        declare_experts(dht, [source.uid(index) for index in place], get_dht_time() + expiration_s, info=info)
    except MoEError as e:
        logger.warning("could not announce which blocks this server is about to host: %s", e)
    return place


def _measured(backend: ExpertBackend | None, device: torch.device | str, *, anew: bool) -> Throughput | None:
    if backend is None:
        return None
    backend.to(device)
    try:
        return remembered_or_measured(backend, anew=anew)
    except Exception as e:  # an expert may do what it likes with zeros; it is hosted all the same
        logger.warning("could not measure how fast %s is: %s: %s", backend.name, type(e).__name__, e)
        return None


def _make_backend(
    uid: str,
    module: nn.Module | None = None,
    *,
    expert_cls: str,
    hidden_dim: int,
    schema: dict[str, Any],
    optim_cls: Callable[..., Any] | None,
    scheduler: str,
    schedule: dict[str, Any],
    clip_grad_norm: float | None,
    options: dict[str, Any],
) -> ExpertBackend:
    module = build_expert(expert_cls, hidden_dim) if module is None else module
    optimizer = optim_cls(module.parameters()) if optim_cls is not None else None
    make_scheduler = schedule_name_to_scheduler[scheduler]
    lr_scheduler = None if make_scheduler is None else make_scheduler(optimizer, **schedule)
    if clip_grad_norm is not None and optimizer is not None:
        optimizer = ClippingWrapper(optimizer, clip_grad_norm)
    return ExpertBackend(uid, module, optimizer, scheduler=lr_scheduler, **schema, **options)


def _make_block(
    index: int,
    *,
    prefix: str,
    make: partial[ExpertBackend],
    checkpoint_path: Path | None,
    pretrained: PretrainedModel | None,
    compression: int,
) -> ExpertBackend:
    """A block of a model: from its checkpoint, else as it is on other servers: a pretrained one, or one of a registered class
    with the same random weights."""
    uid = f"{prefix}{index}"
    if pretrained is not None:
        block = pretrained.load_block(index)
        backend = make(uid, block, schema=block.backend_options(compression))
    else:
        seed = seed_of(make.keywords["expert_cls"], make.keywords["hidden_dim"], uid)
        backend = seeded(seed, partial(make, uid))
    if checkpoint_path is not None and uid in find_checkpointed_uids(checkpoint_path):
        load_experts({uid: backend}, checkpoint_path)
    return backend


def _saved_uids(checkpoint_dir: Path, num_experts: int) -> list[str]:
    uids = find_checkpointed_uids(checkpoint_dir)
    if uids:
        logger.info("found checkpoints of %d experts: %s", len(uids), ", ".join(uids))
    if len(uids) > num_experts:
        raise ConfigError(
            f"Found {len(uids)} checkpoints, but num_experts is set to {num_experts}, which is smaller. Either increase "
            f"num_experts or remove unneeded checkpoints."
        )
    return uids


def _warn_of_others(checkpoint_dir: Path, others: Sequence[str], asked: str) -> None:
    """If a directory has checkpoints of other experts than those asked for, it may be the wrong one."""
    if others:
        logger.warning("%s has checkpoints of %s, but %s", checkpoint_dir, _some(others), asked)


def _some(uids: Sequence[str]) -> str:
    more = f" and {len(uids) - MAX_TOLD} more" if len(uids) > MAX_TOLD else ""
    return ", ".join(uids[:MAX_TOLD]) + more


def generate_uids(
    num_experts: int, pattern: UidPattern | None, dht: DHT, taken: set[str], rng: random.Random | None = None
) -> list[str]:
    """Uids that no live server hosts: ``expert.0``, ``expert.1``, ... or drawn at random from a pattern.

    Two servers that do this at the very same moment may draw the same uid. Fewer than asked for is only warned about.
    """
    rng = rng or random.Random()
    found: list[str] = []
    tried = set(taken)
    left = ATTEMPTS_PER_EXPERT * num_experts
    candidates = _candidates(pattern, rng, num_experts)
    while len(found) < num_experts and left > 0:
        batch: list[str] = []
        for uid in candidates:
            left -= 1
            if uid not in tried:
                tried.add(uid)
                batch.append(uid)
            if len(batch) >= num_experts - len(found) or left <= 0:
                break
        if not batch:
            break
        used = {expert.uid for expert in find_experts(dht, batch) if expert is not None}
        found += [uid for uid in batch if uid not in used]
    if len(found) < num_experts:
        logger.warning("found only %d free expert uids of the %d asked for", len(found), num_experts)
    return found


def _candidates(pattern: UidPattern | None, rng: random.Random, num_experts: int) -> Any:
    if pattern is None:
        return iter(f"expert{UID_DELIMITER}{i}" for i in range(ATTEMPTS_PER_EXPERT * num_experts))
    if len(pattern) <= max(_ENUMERATE_UP_TO, num_experts):
        uids = list(pattern)
        rng.shuffle(uids)
        return iter(uids)
    return (pattern.sample(rng) for _ in range(ATTEMPTS_PER_EXPERT * num_experts))
