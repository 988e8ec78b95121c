"""What an expert takes and returns. Owns: tensor protos, nested schemas, validation, signatures, concatenate and split.

Pure functions over tensors: no I/O, no clock, no device work beyond ``torch.cat`` and ``split``. Must not know: how calls
travel, which expert is called, or what a batch is scheduled by.

The one rule everything rests on: **the schema alone says what is batched and what is global**. A ``BatchTensorProto`` has
one row per example, a ``TensorProto`` belongs to the whole call. Shapes are never used to guess: the rank of a LoRA
adapter may well equal the batch size.

Legend: B = rows (examples) of one call, ``*`` = further sizes. Ideas: hivemind's ``BatchTensorDescriptor`` (1.1.12) and
tesseract's ``TensorProto``; nested structures flatten as hivemind's ``nested_flatten`` does (dict keys sorted).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias, cast

import optree
import torch

from moe.errors import ProtocolError, SchemaError

DUMMY_BATCH_SIZE = 3  # rows of a dry run, hivemind's constant
MAX_TENSORS = 4096  # in one schema; ours, bounds what a peer's description can make us build
_MAX_PARTS = 4 * MAX_TENSORS  # and containers, in the description of one
MAX_AXES = 64  # of a tensor; numpy's own limit
MAX_DEPTH = 16  # of nesting in a schema; ours, same reason
DIGEST_BYTES = 32  # of a tensor: enough that nobody finds two with the same

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Nested: TypeAlias = Any  # a tensor (or a proto), or a tuple / list / dict of such
Signature: TypeAlias = tuple[Any, ...]


class Compression(IntEnum):
    """Codecs a tensor may travel in; the numbers are hivemind's ``CompressionType``."""

    NONE = 0
    MEANSTD_16BIT = 1
    FLOAT16 = 2
    QUANTILE_8BIT = 3
    UNIFORM_8BIT = 4
    BLOCKWISE_8BIT = 5


@dataclass(frozen=True, init=False, repr=False)
class TensorProto:
    """A tensor that belongs to the whole call (a LoRA matrix, a prefix, a head mask): it has no batch axis.

    ``TensorProto(64, 8)`` or ``TensorProto((64, 8))``; a size of ``None`` is any length.

    :param sizes: the sizes of the tensor; for the batched kind, those after the batch axis
    :param dtype: torch dtype, float32 unless told
    :param compression: codec on the wire; floating-point tensors only
    :raises SchemaError: if a size, dtype or codec cannot be used
    """

    sizes: tuple[int | None, ...]
    dtype: torch.dtype
    compression: Compression

    batched = False

    def __init__(
        self,
        *sizes: int | Sequence[int | None] | None,
        dtype: torch.dtype | None = None,
        compression: int = Compression.NONE,
    ):
        if len(sizes) == 1 and isinstance(sizes[0], Sequence):
            sizes = tuple(sizes[0])
        dtype = torch.float32 if dtype is None else dtype
        if len(sizes) + self.batched > MAX_AXES:
            raise SchemaError(f"a tensor has at most {MAX_AXES} axes, got {len(sizes) + self.batched}")
        for size in sizes:
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
                raise SchemaError(
                    f"a size of a {type(self).__name__} is an int >= 0 or None (any length), got {size!r}"
                )
        if dtype not in DTYPE_NAMES:
            raise SchemaError(f"dtype {dtype} cannot be sent to experts; use one of {', '.join(DTYPES)}")
        try:
            codec = Compression(compression)
        except ValueError:
            raise SchemaError(
                f"unknown compression {compression!r}; use one of {', '.join(c.name for c in Compression)}"
            ) from None
        if codec and not dtype.is_floating_point:
            raise SchemaError(f"compression {codec.name} is for floating-point tensors, not {dtype}")
        if codec in (Compression.FLOAT16, Compression.MEANSTD_16BIT) and dtype == torch.bfloat16:
            raise SchemaError(f"compression {codec.name} cannot hold bfloat16; use NONE, which sends 2 bytes a value")
        object.__setattr__(self, "sizes", tuple(sizes))
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "compression", codec)

    @property
    def size(self) -> tuple[int | None, ...]:
        """All sizes, with ``None`` for the batch axis of a batched tensor (as in hivemind's descriptors)."""
        return (None, *self.sizes) if self.batched else self.sizes

    shape = size

    @property
    def is_floating_point(self) -> bool:
        """True if the tensor can carry a gradient."""
        return self.dtype.is_floating_point

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return self.dtype.itemsize

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, compression: int = Compression.NONE) -> TensorProto:
        """The proto of tensors like this one; the codec is kept only for floating-point tensors."""
        sizes = tensor.shape[1:] if cls.batched else tensor.shape
        codec = compression if tensor.is_floating_point() else Compression.NONE
        return cls(*sizes, dtype=tensor.dtype, compression=codec)

    def make_zeros(self, *, any_length: int = 1, device: torch.device | str | None = None) -> torch.Tensor:
        """Zeros of this shape, with ``any_length`` in place of ``None``."""
        sizes = [any_length if size is None else size for size in self.sizes]
        return torch.zeros(sizes, dtype=self.dtype, device=device)

    def with_compression(self, compression: int) -> TensorProto:
        """The same proto with another codec; tensors that cannot be compressed keep NONE."""
        codec = compression if self.is_floating_point else Compression.NONE
        return type(self)(*self.sizes, dtype=self.dtype, compression=codec)

    def mismatch(self, shape: Sequence[int], dtype: torch.dtype | str) -> str | None:
        """What is wrong with a tensor of this shape and dtype, or None if it fits. Looks at no data."""
        fits = len(shape) == len(self.sizes) + self.batched
        if fits and (own := tuple(shape[1:] if self.batched else shape)) != self.sizes:
            fits = all(size is None or size == found for size, found in zip(self.sizes, own))
        if fits and (dtype is self.dtype or dtype == DTYPE_NAMES[self.dtype]):
            return None
        name = dtype if isinstance(dtype, str) else DTYPE_NAMES.get(dtype, str(dtype))
        return f"expected {self}, got {_describe(shape, name)}"

    def __repr__(self) -> str:
        names = (["batch"] if self.batched else []) + ["any" if size is None else str(size) for size in self.sizes]
        codec = f", {self.compression.name}" if self.compression else ""
        return f"{DTYPE_NAMES[self.dtype]}({', '.join(names)}{codec})"


@dataclass(frozen=True, init=False, repr=False)
class BatchTensorProto(TensorProto):
    """A tensor with one row per example: shape ``(B, *sizes)``.

    ``BatchTensorProto(None, 64)`` is ``(batch, any length, 64)``; ``BatchTensorProto()`` is one scalar per example.
    """

    batched = True

    def make_zeros(
        self, *batch_size: int, any_length: int = 1, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Zeros of shape ``(*batch_size, *sizes)``, with ``any_length`` in place of ``None``."""
        sizes = [any_length if size is None else size for size in self.sizes]
        return torch.zeros([*batch_size, *sizes], dtype=self.dtype, device=device)


class Entry(NamedTuple):
    """One tensor of a flattened schema: how to call it in messages, and what it must look like."""

    path: str
    proto: TensorProto


def as_proto(descriptor: Any) -> TensorProto:
    """Accept our protos and hivemind's descriptors (told apart by their ``None`` batch axis) alike."""
    if isinstance(descriptor, TensorProto):
        return descriptor
    size = getattr(descriptor, "size", None)
    if not isinstance(size, (tuple, list, torch.Size)) or not hasattr(descriptor, "compression"):
        raise SchemaError(f"a schema is built from TensorProto and BatchTensorProto, got {type(descriptor).__name__}")
    options = {"dtype": descriptor.dtype, "compression": int(descriptor.compression)}
    if len(size) > 0 and size[0] is None:
        return BatchTensorProto(*size[1:], **options)
    return TensorProto(*size, **options)


class BoundCall(NamedTuple):
    """A call that fits the schema's structure: which optional kwargs are present, and all tensors in schema order."""

    present: tuple[str, ...]
    tensors: list[torch.Tensor]


class ExpertSchema:
    """The args, kwargs and outputs of one expert.

    :param args: tuple of (nested) protos for positional arguments
    :param kwargs: dict of (nested) protos for keyword arguments
    :param outputs: a proto or a nested structure of them
    :param optional: names of kwargs that a call may leave out; absent ones are not passed to the module at all
    :raises SchemaError: if something is not a proto, nothing is taken, or an optional name is unknown
    """

    def __init__(
        self,
        args: Sequence[Nested] = (),
        kwargs: Mapping[str, Nested] | None = None,
        outputs: Nested = None,
        optional: Sequence[str] = (),
    ):
        if isinstance(optional, str):
            raise SchemaError(f"optional_kwargs is a sequence of names, got the string {optional!r}")
        for name in kwargs or {}:
            if not isinstance(name, str) or not name.isidentifier():
                raise SchemaError(f"a kwarg's name is a Python identifier, got {name!r}")
        self.args: tuple[Nested, ...] = tuple(_map_protos(arg, f"args[{i}]") for i, arg in enumerate(args))
        self.kwargs: dict[str, Nested] = {
            name: _map_protos(value, f"kwargs[{name!r}]") for name, value in sorted((kwargs or {}).items())
        }
        self.outputs: Nested = _map_protos(outputs, "outputs") if outputs is not None else None
        self.optional: tuple[str, ...] = tuple(sorted(set(optional)))
        if not _leaves(self.args) and not _leaves(self.kwargs):
            raise SchemaError("an expert takes at least one tensor. Did you forget args_schema or kwargs_schema?")
        for name in self.optional:
            if name not in self.kwargs:
                raise SchemaError(f"optional kwarg {name!r} is not in kwargs_schema, which has {list(self.kwargs)}")
        if len(_leaves((self.args, self.kwargs, self.outputs))) > MAX_TENSORS:
            raise SchemaError(f"a schema may have at most {MAX_TENSORS} tensors")
        self._inputs_cache: dict[tuple[str, ...], tuple[tuple[Entry, ...], optree.PyTreeSpec]] = {}

    def __repr__(self) -> str:
        marks = {name: f"{name}?" if name in self.optional else name for name in self.kwargs}
        kwargs = {marks[name]: value for name, value in self.kwargs.items()}
        return f"ExpertSchema(args={self.args}, kwargs={kwargs}, outputs={self.outputs})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertSchema) and self.to_plain() == other.to_plain()

    __hash__ = None  # type: ignore[assignment]

    # --- structure ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def required(self) -> tuple[str, ...]:
        """Names of the kwargs every call must give, sorted."""
        return tuple(name for name in self.kwargs if name not in self.optional)

    @functools.cached_property
    def arg_entries(self) -> tuple[Entry, ...]:
        """The positional arguments, flat."""
        return _entries(self.args, "args")

    @functools.cached_property
    def output_entries(self) -> tuple[Entry, ...]:
        """The outputs, flat."""
        return _entries(self.outputs, "outputs") if self.outputs is not None else ()

    @functools.cached_property
    def _output_spec(self) -> optree.PyTreeSpec:
        return _spec(self.outputs)

    @functools.cached_property
    def mergeable(self) -> bool:
        """May tasks of several callers form one batch? Not if an output belongs to the whole call, or nothing has rows."""
        has_rows = any(entry.proto.batched for entry in self.input_entries(()))
        return has_rows and all(entry.proto.batched for entry in self.output_entries)

    def input_entries(self, present: Sequence[str]) -> tuple[Entry, ...]:
        """The inputs of a call with these optional kwargs, flat: args, then kwargs sorted by name.

        :raises SchemaError: if a name is not an optional kwarg of this schema
        """
        return self._inputs(tuple(present))[0]

    def pack_inputs(
        self, tensors: Sequence[torch.Tensor], present: Sequence[str]
    ) -> tuple[tuple[Nested, ...], dict[str, Nested]]:
        """Flat tensors -> (args, kwargs) as the module takes them."""
        return cast("tuple[tuple[Nested, ...], dict[str, Nested]]", self._inputs(tuple(present))[1].unflatten(tensors))

    def pack_outputs(self, tensors: Sequence[Any]) -> Nested:
        """Flat values -> the nested structure of the outputs."""
        return cast(Nested, self._output_spec.unflatten(tensors))

    def flatten_outputs(self, outputs: Nested) -> list[Any]:
        """The module's nested outputs -> flat, in schema order. A single output may be nested otherwise, as in hivemind.

        :raises SchemaError: if the structure differs from the schema's
        """
        if len(self.output_entries) == 1:
            leaves = optree.tree_leaves(_plain_containers(outputs), none_is_leaf=True)
            if len(leaves) == 1:
                return leaves
        return _flatten_up_to(self.outputs, outputs, "outputs", "the module returned")

    def _inputs(self, present: tuple[str, ...]) -> tuple[tuple[Entry, ...], optree.PyTreeSpec]:
        cached = self._inputs_cache.get(present)
        if cached is None:
            unknown = [name for name in present if name not in self.optional]
            if unknown or len(set(present)) != len(present):
                raise SchemaError(f"{unknown or list(present)} are not distinct optional kwargs of {self}")
            kwargs = {name: value for name, value in self.kwargs.items() if name in self.required or name in present}
            entries = _entries(self.args, "args") + _entries(kwargs, "kwargs")
            if len(self._inputs_cache) >= 1024:  # a peer may name any subset: keep the memory bounded
                self._inputs_cache.clear()
            cached = self._inputs_cache[present] = (entries, _spec((self.args, kwargs)))
        return cached

    # --- a caller's arguments ----------------------------------------------------------------------------------

    def bind(self, args: Sequence[Nested], kwargs: Mapping[str, Nested]) -> BoundCall:
        """Match a call's arguments to the schema by position and name, and flatten them. Looks at no shapes.

        :raises SchemaError: wrong number of args, missing or unknown kwargs, another structure, or not a tensor
        """
        if len(args) != len(self.args):
            raise SchemaError(f"args: expected {len(self.args)} positional arguments {self.args}, got {len(args)}")
        present, of_kwargs = self.bind_kwargs(kwargs)
        tensors: list[Any] = []
        for i, (arg, structure) in enumerate(zip(args, self.args)):
            tensors += _flatten_up_to(structure, arg, f"args[{i}]", "got")
        _check_tensors(self.arg_entries, tensors)
        return BoundCall(present, tensors + of_kwargs)

    def bind_kwargs(self, kwargs: Mapping[str, Nested]) -> BoundCall:
        """``bind`` for a call whose args come from elsewhere: only the tensors of its kwargs."""
        unknown = [name for name in kwargs if name not in self.kwargs]
        missing = [name for name in self.required if name not in kwargs]
        if unknown or missing:
            problem = " and ".join(
                ([f"missing {missing}"] if missing else []) + ([f"unknown {unknown}"] if unknown else [])
            )
            optional = f", optional {list(self.optional)}" if self.optional else ""
            raise SchemaError(f"kwargs: {problem}; this expert takes required {list(self.required)}{optional}")
        present = tuple(name for name in self.optional if name in kwargs)
        tensors: list[Any] = []
        for name in self.kwargs:
            if name in kwargs:
                tensors += _flatten_up_to(self.kwargs[name], kwargs[name], f"kwargs[{name!r}]", "got")
        _check_tensors(self.input_entries(present)[len(self.arg_entries) :], tensors)
        return BoundCall(present, tensors)

    def check_declared_kinds(self, batch_kwargs: Mapping[str, Nested], global_kwargs: Mapping[str, Nested]) -> None:
        """Check a caller's explicit ``batch_kwargs=`` / ``global_kwargs=`` against the schema.

        :raises SchemaError: if a kwarg is called batched where the schema says global, or the other way round
        """
        for declared_batched, named in ((True, batch_kwargs), (False, global_kwargs)):
            for name in named:
                for entry in _entries(self.kwargs.get(name, ()), f"kwargs[{name!r}]"):
                    if entry.proto.batched != declared_batched:
                        said, is_ = ("batched", "global") if declared_batched else ("global", "batched")
                        raise SchemaError(
                            f"{entry.path}: given as {said}, but the expert's schema says {is_} ({entry.proto})"
                        )

    # --- for those who do not have global tensors ----------------------------------------------------------------

    def with_compression(self, compression: int) -> ExpertSchema:
        """The same schema with another codec for every tensor that can be compressed."""

        def change(structure: Any) -> Any:
            return optree.tree_map(lambda proto: proto.with_compression(compression), structure, is_leaf=_is_proto)

        outputs = change(self.outputs) if self.outputs is not None else None
        return ExpertSchema(change(self.args), change(self.kwargs), outputs, self.optional)

    # --- description as plain data (for rpc_info, checkpoints) -----------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """Lists, dicts, strings and numbers that ``from_plain`` turns back into this schema."""
        return {
            "args": _to_plain(self.args),
            "kwargs": _to_plain(self.kwargs),
            "outputs": _to_plain(self.outputs) if self.outputs is not None else None,
            "optional": list(self.optional),
        }

    @classmethod
    def from_plain(cls, plain: Any) -> ExpertSchema:
        """Inverse of to_plain, for data that came from a peer.

        :raises ProtocolError: if the data is not a schema
        """
        try:
            room = [_MAX_PARTS]
            args, kwargs = _from_plain(plain["args"], room), _from_plain(plain["kwargs"], room)
            outputs = _from_plain(plain["outputs"], room) if plain["outputs"] is not None else None
            if not isinstance(args, tuple) or not isinstance(kwargs, dict):
                raise ProtocolError("args must be a tuple and kwargs a dict")
            return cls(args, kwargs, outputs, [str(name) for name in plain["optional"]])
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError, ProtocolError) as e:
            raise ProtocolError(f"a peer's description of an expert's schema is malformed: {e!r:.300}") from e


# --- checks on flat tensors --------------------------------------------------------------------------------------------


def count_rows(entries: Sequence[Entry], shapes: Sequence[Sequence[int]]) -> int:
    """Rows (examples) of a call: the common length of its batched tensors; 1 if it has none.

    :raises SchemaError: if batched tensors disagree, naming both
    """
    first: tuple[Entry, int] | None = None
    for entry, shape in zip(entries, shapes):
        if not entry.proto.batched or len(shape) == 0:
            continue
        if first is None:
            first = (entry, shape[0])
        elif first[1] != shape[0]:
            raise SchemaError(
                f"{entry.path}: expected {first[1]} rows, as {first[0].path} has, got {shape[0]} (shape {tuple(shape)})"
            )
    return first[1] if first is not None else 1


def validate(
    entries: Sequence[Entry], tensors: Sequence[torch.Tensor], *, rows: int | None = None, what: str = "inputs"
) -> int:
    """Check the number, dtype, shape and common row count of flat tensors against a flat schema.

    :param rows: if given, batched tensors must have exactly this many rows
    :returns: rows of the call
    :raises SchemaError: naming the first tensor that does not fit, what was expected and what came
    """
    if len(entries) != len(tensors):
        names = ", ".join(entry.path for entry in entries[:20])
        raise SchemaError(f"{what}: expected {len(entries)} tensors ({names}), got {len(tensors)}")
    first: Entry | None = None  # of the batched ones
    found = 1
    for entry, tensor in zip(entries, tensors):
        shape = tensor.shape
        problem = entry.proto.mismatch(shape, tensor.dtype)
        if problem is not None:
            raise SchemaError(f"{entry.path}: {problem}")
        if entry.proto.batched and shape[0] != found:
            if first is not None:
                count_rows((first, entry), ((found,), shape))
            found = shape[0]
        if entry.proto.batched and first is None:
            first = entry
    if rows is not None and first is not None and found != rows:
        raise SchemaError(f"{first.path}: expected {rows} rows, got {found}")
    return found


def cast_inputs(entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Floating-point tensors to their schema's dtype (a client may compute in another one); all others untouched."""
    return [
        tensor.to(entry.proto.dtype) if tensor.is_floating_point() and entry.proto.is_floating_point else tensor
        for entry, tensor in zip(entries, tensors)
    ]


def gradient_entries(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The outputs that take a gradient (floating point), renamed for messages: ``grad_outputs[0]``."""
    return tuple(Entry(f"grad_{entry.path}", entry.proto) for entry in entries if entry.proto.is_floating_point)


# --- signatures --------------------------------------------------------------------------------------------------------


def digest(tensor: torch.Tensor) -> bytes:
    """DIGEST_BYTES that identify a tensor's dtype, shape and exact contents (BLAKE2b). CPU tensors only."""
    raw = tensor.detach().contiguous().reshape(-1)
    state = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=DIGEST_BYTES)
    if raw.numel():
        state.update(raw.view(torch.uint8).numpy().data)
    return state.digest()


def signature(
    operation: str,
    present: Sequence[str],
    entries: Sequence[Entry],
    tensors: Sequence[torch.Tensor],
    wants_grad: Sequence[bool] = (),
    digests: Sequence[bytes] = (),
) -> Signature:
    """What two tasks must have in common to be run as one batch.

    Operation, structure, dtype and non-batch shape of batched tensors, dtype, shape and content digest of global ones,
    and which inputs want gradients.

    :param digests: of the global tensors, in order; leave out to compare globals by shape only (for stacked execution)
    """
    shapes = tuple(
        (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape[1:] if entry.proto.batched else tensor.shape))
        for entry, tensor in zip(entries, tensors)
    )
    return (operation, tuple(present), shapes, tuple(wants_grad), tuple(digests))


# --- concatenate and split ---------------------------------------------------------------------------------------------


def concatenate(entries: Sequence[Entry], calls: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """One flat call out of several of equal signature: batched tensors joined along rows, global ones taken once."""
    if len(calls) == 1:
        return list(calls[0])
    return [
        torch.cat([call[i] for call in calls]) if entry.proto.batched else calls[0][i]
        for i, entry in enumerate(entries)
    ]


def split(
    entries: Sequence[Entry], tensors: Sequence[torch.Tensor], row_counts: Sequence[int]
) -> list[list[torch.Tensor]]:
    """Inverse of concatenate: each call's own rows; global tensors go to every call whole."""
    if len(row_counts) == 1:
        return [list(tensors)]
    parts = [
        torch.split(tensor, list(row_counts)) if entry.proto.batched else (tensor,) * len(row_counts)
        for entry, tensor in zip(entries, tensors)
    ]
    return [list(call) for call in zip(*parts)] if parts else [[] for _ in row_counts]


def select_rows(entries: Sequence[Entry], tensors: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Rows ``start:stop`` of a flat call; global tensors whole."""
    return [tensor[start:stop] if entry.proto.batched else tensor for entry, tensor in zip(entries, tensors)]


# --- helpers -------------------------------------------------------------------------------------------------------------


def _describe(shape: Sequence[int], dtype: str) -> str:
    return f"{dtype}({', '.join(map(str, shape))})"


def _is_proto(value: Any) -> bool:
    return isinstance(value, TensorProto)


def _spec(structure: Nested) -> optree.PyTreeSpec:
    return optree.tree_structure(structure, is_leaf=_is_proto, none_is_leaf=True)


def _leaves(structure: Nested) -> list[Any]:
    return optree.tree_leaves(structure, is_leaf=_is_proto)


def _entries(structure: Nested, root: str) -> tuple[Entry, ...]:
    accessors = optree.tree_accessors(structure, is_leaf=_is_proto, none_is_leaf=True)
    return tuple(
        Entry(accessor.codify(root), proto) for accessor, proto in zip(accessors, _leaves(structure), strict=True)
    )


def _map_protos(structure: Nested, path: str, depth: int = 0) -> Nested:
    """Check a user's nested schema and turn foreign descriptors into protos."""
    if depth > MAX_DEPTH:
        raise SchemaError(f"{path}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(structure, dict):
        bad = [key for key in structure if not isinstance(key, str)]
        if bad:
            raise SchemaError(f"{path}: keys of a nested dict are strings, got {bad[0]!r}")
        return {key: _map_protos(value, f"{path}[{key!r}]", depth + 1) for key, value in sorted(structure.items())}
    if isinstance(structure, (tuple, list)):
        parts = [_map_protos(value, f"{path}[{i}]", depth + 1) for i, value in enumerate(structure)]
        return parts if isinstance(structure, list) else tuple(parts)
    try:
        return as_proto(structure)
    except SchemaError as e:
        raise SchemaError(f"{path}: {e.message}") from None


def _check_tensors(entries: Sequence[Entry], values: Sequence[Any]) -> None:
    for value, entry in zip(values, entries):
        if not isinstance(value, torch.Tensor):
            raise SchemaError(f"{entry.path}: expected a tensor {entry.proto}, got {type(value).__name__}")


def _flatten_up_to(structure: Nested, value: Nested, path: str, verb: str) -> list[Any]:
    if isinstance(structure, TensorProto):
        return [value]
    try:
        return cast("list[Any]", _spec(structure).flatten_up_to(_plain_containers(value)))
    except (ValueError, TypeError):
        raise SchemaError(f"{path}: expected {structure}, {verb} {_outline(value)}") from None


def _plain_containers(value: Nested, depth: int = 0) -> Nested:
    """namedtuples and other mappings or sequences as plain tuples and dicts: a schema only knows those."""
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, Mapping):
        return {key: _plain_containers(item, depth + 1) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain_containers(item, depth + 1) for item in value)
    if isinstance(value, list):
        return [_plain_containers(item, depth + 1) for item in value]
    return value


def _outline(value: Nested) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {_describe(value.shape, DTYPE_NAMES.get(value.dtype, str(value.dtype)))}"
    if isinstance(value, Mapping):
        return f"a dict with keys {list(value)[:20]}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _to_plain(structure: Nested) -> Any:
    if isinstance(structure, TensorProto):
        return {
            "batched": structure.batched,
            "sizes": list(structure.sizes),
            "dtype": DTYPE_NAMES[structure.dtype],
            "compression": int(structure.compression),
        }
    if isinstance(structure, dict):
        return ["dict", {key: _to_plain(value) for key, value in structure.items()}]
    return ["list" if isinstance(structure, list) else "tuple", [_to_plain(value) for value in structure]]


def _from_plain(plain: Any, room: list[int], depth: int = 0) -> Nested:
    """Protos out of plain data.

    :param room: how many of them and of containers there may still be, in its only item
    """
    room[0] -= 1
    if depth > MAX_DEPTH:
        raise ProtocolError("nested too deep")
    if room[0] < 0:
        raise ProtocolError(f"more than {_MAX_PARTS} tensors and containers")
    if isinstance(plain, dict):
        kind = BatchTensorProto if plain["batched"] else TensorProto
        return kind(*plain["sizes"], dtype=DTYPES[plain["dtype"]], compression=plain["compression"])
    kind_name, children = plain
    if kind_name == "dict":
        return {str(key): _from_plain(value, room, depth + 1) for key, value in children.items()}
    if kind_name not in ("list", "tuple"):
        raise ProtocolError(f"unknown container {kind_name!r}")
    parts = [_from_plain(value, room, depth + 1) for value in children]
    return parts if kind_name == "list" else tuple(parts)
