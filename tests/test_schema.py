"""Schemas: for any schema, what fits is taken apart and put together again; what does not fit is named."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import optree
import pytest
import torch
from hivemind.utils.tensor_descr import BatchTensorDescriptor, TensorDescriptor
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe.errors import ProtocolError, SchemaError
from moe.schema import (
    DTYPES,
    MAX_TENSORS,
    BatchTensorProto,
    Compression,
    ExpertSchema,
    TensorProto,
    as_proto,
    cast_inputs,
    concatenate,
    count_rows,
    digest,
    gradient_entries,
    select_rows,
    signature,
    split,
    validate,
)

B, G = BatchTensorProto, TensorProto
quick = settings(max_examples=30, deadline=None)

# --- random schemas and calls --------------------------------------------------------------------------------------------

sizes = st.lists(st.none() | st.integers(0, 3), max_size=2)
names = st.sampled_from(["a", "b", "mask", "lora_a", "class_", "Z"])


@st.composite
def protos(draw: Any) -> TensorProto:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    codec = Compression.NONE
    if DTYPES[dtype].is_floating_point and dtype != "bfloat16":
        codec = draw(st.sampled_from([Compression.NONE, Compression.FLOAT16, Compression.UNIFORM_8BIT]))
    kind = draw(st.sampled_from([B, G]))
    proto: TensorProto = kind(*draw(sizes), dtype=DTYPES[dtype], compression=codec)
    return proto


nested = st.recursive(
    protos(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(names, inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def schemas(draw: Any) -> ExpertSchema:
    args = draw(st.lists(nested, max_size=3))
    kwargs = draw(st.dictionaries(names, nested, max_size=4))
    optional = draw(st.lists(st.sampled_from(sorted(kwargs)), unique=True)) if kwargs else []
    try:
        return ExpertSchema(args, kwargs, draw(nested), optional)
    except SchemaError as e:
        assert "at least one tensor" in e.message
        assume(False)
        raise AssertionError from None


@dataclasses.dataclass
class RandomCall:
    """Arguments that fit a schema."""

    schema: ExpertSchema
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    present: tuple[str, ...]
    rows: int


def make_tensor(proto: TensorProto, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    shape = [length if size is None else size for size in proto.sizes]
    values = torch.randint(0, 5, [rows, *shape] if proto.batched else shape, generator=generator)
    return values.to(proto.dtype)


@st.composite
def calls(draw: Any, schema: ExpertSchema | None = None) -> RandomCall:
    schema = schema or draw(schemas())
    rows, length = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    present = tuple(sorted(draw(st.lists(st.sampled_from(schema.optional), unique=True)) if schema.optional else ()))

    def fill(structure: Any) -> Any:
        def fill_one(proto: TensorProto) -> torch.Tensor:
            return make_tensor(proto, rows, length, generator)

        return optree.tree_map(fill_one, structure, is_leaf=lambda leaf: isinstance(leaf, TensorProto))

    chosen = [name for name in schema.kwargs if name in schema.required or name in present]
    kwargs = {name: fill(schema.kwargs[name]) for name in draw(st.permutations(chosen))}
    args = tuple(fill(arg) for arg in schema.args)
    return RandomCall(schema, args, kwargs, present, rows)


def same_structure(one: Any, other: Any) -> bool:
    """Equal containers, and the very same tensors in them."""
    if isinstance(one, torch.Tensor):
        return one is other
    if type(one) is not type(other) or len(one) != len(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_structure(one[key], other[key]) for key in one)
    return all(same_structure(a, b) for a, b in zip(one, other))


# --- properties ----------------------------------------------------------------------------------------------------------


@quick
@given(schemas())
def test_a_schema_survives_the_wire(schema: ExpertSchema) -> None:
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(schema.to_plain()))
    restored = ExpertSchema.from_plain(plain)
    assert restored == schema
    assert repr(restored) == repr(schema)
    assert restored.optional == schema.optional
    assert restored.output_entries == schema.output_entries


@quick
@given(calls())
def test_g8_a_fitting_call_is_flattened_and_put_together_again(call: RandomCall) -> None:
    present, tensors = call.schema.bind(call.args, call.kwargs)
    assert present == call.present
    entries = call.schema.input_entries(present)
    rows = validate(entries, tensors)
    assert rows == (call.rows if any(entry.proto.batched for entry in entries) else 1)
    args, kwargs = call.schema.pack_inputs(tensors, present)
    assert same_structure(args, call.args)
    assert same_structure(kwargs, call.kwargs)


@quick
@given(calls())
def test_paths_lead_to_the_tensors_they_name(call: RandomCall) -> None:
    present, tensors = call.schema.bind(call.args, call.kwargs)
    for entry, tensor in zip(call.schema.input_entries(present), tensors, strict=True):
        assert eval(entry.path, {"args": call.args, "kwargs": call.kwargs}) is tensor


@quick
@given(calls(), st.data())
def test_whatever_is_wrong_with_a_tensor_is_named(call: RandomCall, data: st.DataObject) -> None:
    present, tensors = call.schema.bind(call.args, call.kwargs)
    entries = call.schema.input_entries(present)
    assume(entries)
    index = data.draw(st.integers(0, len(entries) - 1))
    path, proto = entries[index]
    right = tensors[index]
    wrongs: list[torch.Tensor] = [right[None], right.to(torch.int8 if right.dtype != torch.int8 else torch.int16)]
    fixed = [axis for axis, size in enumerate(proto.size) if size is not None]
    if fixed:
        longer = list(right.shape)
        longer[data.draw(st.sampled_from(fixed))] += 1
        wrongs.append(right.new_zeros(longer))
    tensors[index] = data.draw(st.sampled_from(wrongs))
    with pytest.raises(SchemaError) as caught:
        validate(entries, tensors)
    assert caught.value.message.startswith(f"{path}: expected {proto}, got ")


@quick
@given(calls(), st.integers(1, 3))
def test_another_number_of_rows_is_named_with_the_one_expected(call: RandomCall, more: int) -> None:
    present, tensors = call.schema.bind(call.args, call.kwargs)
    entries = call.schema.input_entries(present)
    batched = [i for i, entry in enumerate(entries) if entry.proto.batched]
    assume(len(batched) >= 2)
    last = tensors[batched[-1]]
    tensors[batched[-1]] = last.new_zeros([last.shape[0] + more, *last.shape[1:]])
    with pytest.raises(SchemaError) as caught:
        validate(entries, tensors)
    first, path = entries[batched[0]].path, entries[batched[-1]].path
    assert caught.value.message.startswith(f"{path}: expected {call.rows} rows, as {first} has, got {call.rows + more}")


@quick
@given(calls(), st.data())
def test_a_wrong_number_of_tensors_is_refused(call: RandomCall, data: st.DataObject) -> None:
    present, tensors = call.schema.bind(call.args, call.kwargs)
    entries = call.schema.input_entries(present)
    changed = data.draw(st.sampled_from([tensors[:-1] if tensors else [torch.ones(1)], [*tensors, torch.zeros(1)]]))
    with pytest.raises(SchemaError, match=f"inputs: expected {len(entries)} tensors .*, got {len(changed)}"):
        validate(entries, changed)


@quick
@given(calls(), st.data())
def test_concatenated_calls_are_split_into_what_they_were(call: RandomCall, data: st.DataObject) -> None:
    _, tensors = call.schema.bind(call.args, call.kwargs)
    entries = call.schema.input_entries(call.present)
    row_counts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(0)
    parts = [
        [
            make_tensor(dataclasses_sizes(entry.proto, t), rows, 0, generator) if entry.proto.batched else t
            for entry, t in zip(entries, tensors)
        ]
        for rows in row_counts
    ]
    joined = concatenate(entries, parts)
    for entry, whole, original in zip(entries, joined, tensors):
        if entry.proto.batched:
            assert whole.shape[0] == sum(row_counts)
        else:
            assert whole is original  # passed once, not copied
    for part, restored in zip(parts, split(entries, joined, row_counts), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, restored, strict=True))


def dataclasses_sizes(proto: TensorProto, tensor: torch.Tensor) -> TensorProto:
    """The proto with the lengths that a tensor happens to have."""
    return type(proto)(*tensor.shape[1:], dtype=proto.dtype)


@quick
@given(calls(), st.data())
def test_row_ranges_of_a_call_make_up_the_whole(call: RandomCall, data: st.DataObject) -> None:
    _, tensors = call.schema.bind(call.args, call.kwargs)
    entries = call.schema.input_entries(call.present)
    cut = data.draw(st.integers(0, call.rows))
    parts = [select_rows(entries, tensors, 0, cut), select_rows(entries, tensors, cut, call.rows)]
    for whole, joined in zip(tensors, concatenate(entries, parts)):
        assert torch.equal(whole, joined)


@quick
@given(calls(), st.data())
def test_signatures_tell_apart_what_may_not_be_merged(call: RandomCall, data: st.DataObject) -> None:
    _, tensors = call.schema.bind(call.args, call.kwargs)
    entries = call.schema.input_entries(call.present)
    base = signature("forward", call.present, entries, tensors, (True,))
    more_rows = [
        t.new_zeros([t.shape[0] + 1, *t.shape[1:]]) if e.proto.batched else t for e, t in zip(entries, tensors)
    ]
    assert signature("forward", call.present, entries, more_rows, (True,)) == base
    assert hash(base) is not None
    assert signature("backward", call.present, entries, tensors, (True,)) != base
    assert signature("forward", call.present, entries, tensors, (False,)) != base
    assert signature("forward", (*call.present, "x"), entries, tensors, (True,)) != base
    assert signature("forward", call.present, entries, tensors, (True,), [b"digest"]) != base
    assume(tensors)
    index = data.draw(st.integers(0, len(tensors) - 1))
    longer = [t[..., None] if i == index else t for i, t in enumerate(tensors)]
    assert signature("forward", call.present, entries, longer, (True,)) != base


@settings(max_examples=80, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 5) | st.sampled_from(["float32", "list", "tuple", "dict", ""]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["batched", "sizes", "dtype", "compression", "args", "kwargs"]), inner)
        ),
        max_leaves=8,
    )
)
def test_a_malformed_description_is_a_typed_error(plain: Any) -> None:
    good = ExpertSchema((B(2),), {"x": G(3)}, B()).to_plain()
    for key in (None, *good):
        try:
            ExpertSchema.from_plain(plain if key is None else {**good, key: plain})
        except ProtocolError as e:
            assert "malformed" in e.message


@quick
@given(protos(), st.integers(0, 3), st.integers(0, 3))
def test_protos_fit_the_tensors_they_make_and_are_made_from(proto: TensorProto, rows: int, length: int) -> None:
    zeros = (
        proto.make_zeros(rows, any_length=length)
        if isinstance(proto, BatchTensorProto)
        else proto.make_zeros(any_length=length)
    )
    assert proto.mismatch(zeros.shape, zeros.dtype) is None
    assert not zeros.any()
    exact = type(proto).from_tensor(zeros, proto.compression)
    assert exact.sizes == zeros.shape[int(proto.batched) :]
    assert (exact.dtype, exact.compression) == (proto.dtype, proto.compression)
    assert hash(exact) == hash(type(proto)(exact.sizes, dtype=exact.dtype, compression=exact.compression))


@pytest.mark.parametrize(
    "args", [["dict", 5], ["dict", [1]], ["list", {"a": 1}], ["set", []], [], 5, ["tuple", 5], "ab"]
)
def test_containers_that_are_none_are_a_typed_error(args: Any) -> None:
    good = ExpertSchema((B(2),), {"x": G(3)}, B()).to_plain()
    for plain in ({**good, "args": args}, {**good, "args": ["tuple", [args]]}, {**good, "kwargs": args}):
        with pytest.raises(ProtocolError, match="malformed"):
            ExpertSchema.from_plain(plain)


def test_a_description_of_very_many_parts_is_refused_before_it_is_built() -> None:
    good = ExpertSchema((B(2),), {"x": G(3)}, B()).to_plain()
    many = ["tuple", [["tuple", []]] * 10**6]
    begin = time.monotonic()
    with pytest.raises(ProtocolError, match="16384 tensors and containers"):
        ExpertSchema.from_plain({**good, "args": many})
    assert time.monotonic() - begin < 1.0
    most = ExpertSchema([B(2)] * (MAX_TENSORS - 1), {}, B())
    assert ExpertSchema.from_plain(most.to_plain()) == most


# --- protos ------------------------------------------------------------------------------------------------------------


def test_protos_are_values_and_show_what_they_are() -> None:
    assert B(2, 3) == B((2, 3)) == B([2, 3]) == B(torch.Size([2, 3]))
    assert B(2) != G(2)
    assert len({B(2), B(2), G(2), B(2, dtype=torch.int64)}) == 3
    assert repr(B(None, 64)) == "float32(batch, any, 64)"
    assert repr(B()) == "float32(batch)"
    assert repr(G()) == "float32()"
    assert repr(G(8, dtype=torch.float16, compression=Compression.FLOAT16)) == "float16(8, FLOAT16)"
    assert B(2).size == B(2).shape == (None, 2)
    assert G(2).size == G(2).shape == (2,)
    assert B(dtype=torch.float64).itemsize == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        B(2).dtype = torch.int64  # type: ignore[misc]


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda: B(-1), "int >= 0 or None"),
        (lambda: B(2.0), "int >= 0 or None"),  # type: ignore[arg-type]
        (lambda: B(True), "int >= 0 or None"),
        (lambda: B("ab"), "int >= 0 or None"),  # type: ignore[arg-type]
        (lambda: G(dtype=torch.complex64), "complex64 cannot be sent.*use one of .*float32"),
        (lambda: G(compression=77), "unknown compression 77; use one of NONE"),
        (lambda: G(dtype=torch.int64, compression=Compression.FLOAT16), "FLOAT16 is for floating-point"),
        (lambda: G(dtype=torch.bfloat16, compression=Compression.FLOAT16), "cannot hold bfloat16"),
        (lambda: G(dtype=torch.bfloat16, compression=Compression.MEANSTD_16BIT), "cannot hold bfloat16"),
    ],
)
def test_impossible_protos_are_refused(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        make()


def test_compression_is_kept_only_where_it_can_be() -> None:
    assert B(2).with_compression(Compression.FLOAT16).compression == Compression.FLOAT16
    assert B(2, dtype=torch.int64).with_compression(Compression.FLOAT16).compression == Compression.NONE
    assert B.from_tensor(torch.zeros(2, dtype=torch.bool), Compression.FLOAT16).compression == Compression.NONE
    schema = ExpertSchema(([B(2)],), {"ids": B(dtype=torch.int64)}, (B(2), B(dtype=torch.bool)), optional=["ids"])
    compressed = schema.with_compression(Compression.UNIFORM_8BIT)
    assert compressed.args == ([B(2, compression=Compression.UNIFORM_8BIT)],)
    assert compressed.kwargs == schema.kwargs
    assert compressed.outputs == (B(2, compression=Compression.UNIFORM_8BIT), B(dtype=torch.bool))
    assert compressed.optional == ("ids",)
    assert ExpertSchema((B(),)).with_compression(Compression.NONE).outputs is None


def test_hiveminds_descriptors_are_taken_for_what_they_are() -> None:
    assert as_proto(BatchTensorDescriptor(4, dtype=torch.float16)) == B(4, dtype=torch.float16)
    assert as_proto(TensorDescriptor((4, 2), dtype=torch.int64)) == G(4, 2, dtype=torch.int64)
    assert as_proto(TensorDescriptor((), dtype=torch.int64)) == G(dtype=torch.int64)
    assert ExpertSchema((BatchTensorDescriptor(4),)).args == (B(4),)
    for other in (5, torch.zeros(3), "text", None):
        with pytest.raises(SchemaError, match="TensorProto and BatchTensorProto"):
            as_proto(other)


# --- schemas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda: ExpertSchema(), "at least one tensor. Did you forget args_schema or kwargs_schema"),
        (lambda: ExpertSchema(((), [])), "at least one tensor"),
        (lambda: ExpertSchema((B(), 5)), r"args\[1\]: .*got int"),
        (lambda: ExpertSchema((B(), None)), r"args\[1\]: .*got NoneType"),
        (lambda: ExpertSchema((), {"x": {"y": (B(), "z")}}), r"kwargs\['x'\]\['y'\]\[1\]: .*got str"),
        (lambda: ExpertSchema(({1: B()},)), r"args\[0\]: keys of a nested dict are strings, got 1"),
        (lambda: ExpertSchema((), {"not a name": B()}), "Python identifier"),
        (lambda: ExpertSchema((), {3: B()}), "Python identifier"),  # type: ignore[dict-item]
        (lambda: ExpertSchema((), {"x": B()}, optional="x"), "sequence of names, got the string"),
        (lambda: ExpertSchema((), {"x": B()}, optional=["y"]), r"'y' is not in kwargs_schema, which has \['x'\]"),
        (lambda: ExpertSchema((B(),) * (MAX_TENSORS + 1)), f"at most {MAX_TENSORS}"),
        (lambda: ExpertSchema((functools_nest(20),)), "nested deeper"),
    ],
)
def test_impossible_schemas_are_refused(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        make()


def functools_nest(depth: int) -> Any:
    structure: Any = B()
    for _ in range(depth):
        structure = [structure]
    return structure


EXPERT = ExpertSchema(
    (B(4), [B(), G(2)]),
    {"mask": B(dtype=torch.bool), "lora": {"a": G(4, 2), "b": G(2, 4)}, "bias": G(4)},
    B(4),
    ["lora"],
)
GOOD_ARGS = (torch.zeros(3, 4), [torch.zeros(3), torch.zeros(2)])
GOOD_KWARGS = {"mask": torch.zeros(3).bool(), "bias": torch.zeros(4)}


@pytest.mark.parametrize(
    "args, kwargs, problem",
    [
        (GOOD_ARGS[:1], {}, "args: expected 2 positional arguments .*, got 1"),
        (GOOD_ARGS, {}, r"kwargs: missing \['bias', 'mask'\]; .* required \['bias', 'mask'\], optional \['lora'\]"),
        (GOOD_ARGS, {"mask": 0, "bias": 0, "lorra": 0}, r"kwargs: unknown \['lorra'\]"),
        (GOOD_ARGS, {"bias": 0, "lorra": 0}, r"kwargs: missing \['mask'\] and unknown \['lorra'\]"),
        ((GOOD_ARGS[0], torch.zeros(3)), GOOD_KWARGS, r"args\[1\]: expected \[float32\(batch\), .*got a tensor float32\(3\)"),
        ((GOOD_ARGS[0], [torch.zeros(3)]), GOOD_KWARGS, r"args\[1\]: expected .*got a list of 1"),
        ((GOOD_ARGS[0], tuple(GOOD_ARGS[1])), GOOD_KWARGS, r"args\[1\]: expected .*got a tuple of 2"),
        (GOOD_ARGS, {**GOOD_KWARGS, "lora": {"a": 1}}, r"kwargs\['lora'\]: expected .*got a dict with keys \['a'\]"),
        (GOOD_ARGS, {**GOOD_KWARGS, "lora": None}, r"kwargs\['lora'\]: expected .*got NoneType"),
        (GOOD_ARGS, {**GOOD_KWARGS, "bias": None}, r"kwargs\['bias'\]: expected a tensor float32\(4\), got NoneType"),
        (GOOD_ARGS, {**GOOD_KWARGS, "bias": [1.0]}, r"kwargs\['bias'\]: expected a tensor float32\(4\), got list"),
        (GOOD_ARGS, {**GOOD_KWARGS, "mask": 3}, r"kwargs\['mask'\]: expected a tensor bool\(batch\), got int"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_call_is_said_by_name(args: Any, kwargs: Any, problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        EXPERT.bind(args, kwargs)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_namedtuples_and_other_mappings_are_taken_as_tuples_and_dicts() -> None:
    schema = ExpertSchema(((B(), B()),), {"x": {"a": B(), "b": B()}})
    one, two = torch.zeros(1), torch.ones(1)

    class Frozen(dict):
        pass

    _, tensors = schema.bind((Pair(one, two),), {"x": Frozen(b=two, a=one)})
    assert [t is one for t in tensors] == [True, False, True, False]
    assert ExpertSchema((Pair(B(), G()),)).args == ((B(), G()),)  # type: ignore[arg-type]


def test_what_a_caller_calls_batched_or_global_is_checked() -> None:
    EXPERT.check_declared_kinds({"mask": ...}, {"lora": ..., "bias": ..., "unknown": ...})
    with pytest.raises(
        SchemaError, match=r"kwargs\['lora'\]\['a'\]: given as batched, but the expert's schema says global"
    ):
        EXPERT.check_declared_kinds({"lora": ...}, {})
    with pytest.raises(SchemaError, match=r"kwargs\['mask'\]: given as global, but the expert's schema says batched"):
        EXPERT.check_declared_kinds({}, {"mask": ...})


def test_who_may_share_a_batch() -> None:
    assert EXPERT.mergeable
    assert not ExpertSchema((G(2),), outputs=B(2)).mergeable  # no rows to tell callers apart by
    assert not ExpertSchema((B(2),), outputs=(B(2), G())).mergeable  # an output that belongs to the whole call
    assert not ExpertSchema((), {"x": B()}, B(), optional=["x"]).mergeable


def test_optional_names_must_be_known_and_given_once() -> None:
    for present in (("bias",), ("nonsense",), ("lora", "lora")):
        with pytest.raises(SchemaError):
            EXPERT.input_entries(present)
    assert [entry.path for entry in EXPERT.input_entries(("lora",))] == [
        "args[0]", "args[1][0]", "args[1][1]", "kwargs['bias']", "kwargs['lora']['a']", "kwargs['lora']['b']",
        "kwargs['mask']",
    ]  # fmt: skip


def test_the_memory_for_subsets_of_optional_kwargs_is_bounded() -> None:
    schema = ExpertSchema((B(),), {f"k{i:02d}": B() for i in range(12)}, optional=[f"k{i:02d}" for i in range(12)])
    for number in range(2**12):
        present = tuple(f"k{i:02d}" for i in range(12) if number >> i & 1)
        assert len(schema.input_entries(present)) == 1 + len(present)
    assert len(schema._inputs_cache) <= 1024


def test_outputs_are_flattened_by_their_structure() -> None:
    schema = ExpertSchema((B(),), outputs={"y": B(), "aux": (G(), [B(2)])})
    a, b, c = torch.zeros(3), torch.zeros(()), torch.zeros(3, 2)
    flat = schema.flatten_outputs({"y": a, "aux": (b, [c])})
    assert [t is x for t, x in zip(flat, (b, c, a))] == [True] * 3
    assert same_structure(schema.pack_outputs(flat), {"aux": (b, [c]), "y": a})
    assert [entry.path for entry in schema.output_entries] == [
        "outputs['aux'][0]",
        "outputs['aux'][1][0]",
        "outputs['y']",
    ]
    with pytest.raises(SchemaError, match="outputs: expected .*, the module returned a tensor"):
        schema.flatten_outputs(a)
    assert [entry.path for entry in gradient_entries(schema.output_entries)][0] == "grad_outputs['aux'][0]"


def test_only_floating_point_outputs_take_gradients() -> None:
    schema = ExpertSchema((B(),), outputs=(B(dtype=torch.int64), B(), B(dtype=torch.bool)))
    assert [entry.path for entry in gradient_entries(schema.output_entries)] == ["grad_outputs[1]"]


def test_schemas_are_compared_by_what_they_say() -> None:
    assert ExpertSchema((B(),), {"b": B(), "a": G()}) == ExpertSchema([B()], {"a": G(), "b": B()})
    assert ExpertSchema((B(),)) != ExpertSchema(([B()],))
    assert ExpertSchema((B(),)) != "schema"
    assert repr(EXPERT).startswith("ExpertSchema(args=(float32(batch, 4), [float32(batch), float32(2)])")
    assert "'lora?'" in repr(EXPERT)
    with pytest.raises(TypeError):
        hash(EXPERT)


def test_rows_of_a_call() -> None:
    entries = EXPERT.input_entries(())
    assert count_rows(entries, [(3, 4), (3,), (2,), (4,), (3,)]) == 3
    assert count_rows(entries, []) == 1
    assert count_rows(ExpertSchema((G(7),)).input_entries(()), [(7,)]) == 1
    with pytest.raises(SchemaError, match=r"args\[0\]: expected 5 rows, got 3"):
        validate(entries[:1], [torch.zeros(3, 4)], rows=5)
    assert validate(ExpertSchema((G(7),)).input_entries(()), [torch.zeros(7)], rows=5) == 1


def test_floating_point_inputs_are_cast_and_others_are_not() -> None:
    entries = ExpertSchema((B(), B(dtype=torch.int64), B(dtype=torch.bfloat16))).input_entries(())
    tensors = [torch.zeros(1).double(), torch.zeros(1), torch.zeros(1)]
    assert [t.dtype for t in cast_inputs(entries, tensors)] == [torch.float32, torch.float32, torch.bfloat16]


def test_a_digest_stands_for_dtype_shape_and_content() -> None:
    base = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    assert digest(base) == digest(base.clone())
    assert digest(base.T) == digest(base.T.contiguous()) != digest(base)
    assert digest(base) != digest(base.reshape(4, 3))
    assert digest(base) != digest(base.view(torch.float32))
    assert digest(base) != digest(base + (base == 11))
    assert digest(torch.zeros(0, 3)) != digest(torch.zeros(3, 0))
    assert len({digest(torch.ones((), dtype=dtype)) for dtype in DTYPES.values()}) == len(DTYPES)
    assert digest(torch.zeros(1, requires_grad=True)) == digest(torch.zeros(1))
    assert digest(torch.tensor([True, False])) != digest(torch.tensor([False, True]))
