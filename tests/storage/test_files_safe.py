"""Damaged and hostile files are refused, and the error names file and key."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as serialise

from finespun.errors import FileError, InputError
from finespun.storage.safe_io import (
    ITEM_BYTES,
    parse_json,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)


def raw(header, data=b""):
    """The bytes of a safetensors file with this header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty": (b"", "truncated or no safetensors"),
    "half a length": (b"\x01\x00", "truncated or no safetensors"),
    "a length beyond the file": (struct.pack("<Q", 10**18) + b"{}", "truncated"),
    "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94", "truncated"),
    "no JSON": (raw(b"{'a': 1}"), "is not JSON"),
    "a list": (raw(b"[]"), "expected an object"),
    "not text": (raw(b"\xff\xfe"), "is not JSON"),
    "NaN in the header": (raw(b'{"a": NaN}'), "NaN is no JSON number"),
    "the same key twice": (
        raw(b'{"a": {"dtype": "F32", "dtype": "F64"}}'),
        "'dtype' stands there twice",
    ),
    "deep": (raw(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"), "nested more than 64"),
    "very deep": (raw(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "nested more than 64"),
    "a number too large": (raw(b'{"a": 1e999}'), "1e999 is larger than any number there is"),
    "a long number": (raw(b'{"a":' + b"9" * 10**4 + b"}"), "is not JSON"),
    "no dtype": (raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "'a' must have"),
    "an extra field": (raw({"a": {**entry(), "x": 1}}, bytes(8)), "'a' must have exactly"),
    "an unknown dtype": (raw({"a": entry("F31")}, bytes(8)), "'a' has dtype 'F31'; nearest: "),
    "a dtype that is no text": (raw({"a": entry(["F32"])}, bytes(8)), "'a' has dtype"),
    "a negative size": (raw({"a": entry(shape=[-2])}, bytes(8)), "'a': shape and data_offsets"),
    "a true size": (raw({"a": entry(shape=[True, 2])}, bytes(8)), "'a': shape and data_offsets"),
    "a size of 2.0": (raw({"a": entry(shape=[2.0])}, bytes(8)), "'a': shape and data_offsets"),
    "three offsets": (raw({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "3 offsets"),
    "a shape that lies": (raw({"a": entry(shape=[3])}, bytes(8)), "needs 12 bytes"),
    "an immense shape": (raw({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "'a': shape"),
    "offsets the wrong way": (raw({"a": entry(shape=[0], offsets=[8, 0])}, bytes(8)), "'a': shape"),
    "an overlap": (
        raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "'b' overlaps that of 'a'",
    ),
    "a gap": (
        raw({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        "'b' leaves a gap after that of 'a'",
    ),
    "too little data": (raw({"a": entry()}, bytes(7)), "promises 8 bytes of data, 7 are there"),
    "too much data": (raw({"a": entry()}, bytes(9)), "promises 8 bytes of data, 9 are there"),
    "an empty key": (raw({"": entry()}, bytes(8)), "no proper name"),
    "an endless key": (raw({"a" * 2000: entry()}, bytes(8)), "no proper name"),
    "a key with a line break": (raw({"a\nb": entry()}, bytes(8)), "no proper name"),
    "metadata that is no text": (raw({"__metadata__": {"a": 1}}), "__metadata__ must map"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_by_name(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        read_tensors(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = serialise({"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.float16)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    assert len(read_tensors(path).tensors) == 2
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"truncated|not JSON"):
            read_tensors(path)


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_numbers_only(tmp_path_factory, place, value):
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.int32)}
    data = bytearray(serialise(tensors))
    data[place % len(data)] = value
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    path.write_bytes(data)
    try:
        found = read_tensors(path, finite=False)
    except FileError:
        return
    assert sum(t.nbytes for t in found.tensors.values()) == 20 + 24


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
)
def test_numbers_that_are_not_finite_are_refused_and_named(tmp_path, bad, dtype):
    tensors = {"fine": torch.ones(3), "bad": torch.tensor([1.0, bad]).to(dtype)}
    write_tensors(tmp_path / "x", tensors)
    with pytest.raises(FileError, match=r"x: 'bad' holds 1 of 2 values"):
        read_tensors(tmp_path / "x")
    assert torch.equal(read_tensors(tmp_path / "x", finite=False).tensors["fine"], torch.ones(3))


def test_eight_bit_floats_are_looked_at_too(tmp_path):
    values = torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2)
    write_tensors(tmp_path / "x", {"bad": values})
    with pytest.raises(FileError, match="'bad' holds 1 of 2"):
        read_tensors(tmp_path / "x")


def test_every_dtype_that_can_be_written_can_be_read(tmp_path):
    names = {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F16": torch.float16, "BF16": torch.bfloat16,
        "I16": torch.int16, "U16": torch.uint16, "F32": torch.float32, "I32": torch.int32,
        "U32": torch.uint32, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
        "C64": torch.complex64,
    }  # fmt: skip
    assert names.keys() == ITEM_BYTES.keys()
    tensors = {k: torch.tensor([0.0, 1.0, 1.0]).to(d) for k, d in names.items()}
    write_tensors(tmp_path / "x", tensors)
    found = read_tensors(tmp_path / "x").tensors
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8))


def test_shared_and_strided_tensors_are_written_as_seen(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"all": base, "again": base, "row": base[1], "turned": base.T, "some": base[:, ::2]}
    write_tensors(tmp_path / "x", tensors)
    found = read_tensors(tmp_path / "x").tensors
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) for k, v in tensors.items())


def test_reading_leaves_no_tie_to_the_file(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.arange(4.0)})
    found = read_tensors(tmp_path / "x").tensors["a"]
    (tmp_path / "x").write_bytes(b"")
    assert torch.equal(found.mul_(2), 2 * torch.arange(4.0))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
    ],
)
def test_tensors_without_plain_data_are_refused(tmp_path, tensor):
    with pytest.raises(InputError, match=r"'odd' is a .* tensor on"):
        write_tensors(tmp_path / "x", {"odd": tensor})


def test_links_out_of_the_folder_are_refused_and_a_hub_cache_is_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text('{"a": 1}')
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(FileError, match="leads out of its folder"):
        read_json(folder / "config.json")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    (blobs / "0123").write_text('{"a": 2}')
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../blobs/0123")
    assert read_json(folder / "config.json") == {"a": 2}
    (folder / "real.json").write_text('{"a": 3}')
    (folder / "also.json").symlink_to("real.json")
    assert read_json(folder / "also.json") == {"a": 3}


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):
        read_tensors(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="not a regular file"):
        read_json(tmp_path / "folder")


def test_a_missing_file_is_told_with_its_neighbours(tmp_path):
    (tmp_path / "adapter.jsn").write_text("{}")
    with pytest.raises(FileError, match=r"does not exist; nearest: 'adapter.jsn'"):
        read_json(tmp_path / "adapter.json")


def test_json_beyond_its_limit_is_not_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(FileError, match="at most 67,108,864 are read"):
        read_json(tmp_path / "x")


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    PLAIN | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=30)
@given(content=st.dictionaries(st.text(), VALUES))
def test_json_comes_back_as_it_was(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("x") / "x.json"
    write_json(path, content)
    assert read_json(path) == content
    assert list(read_json(path)) == list(content)


def test_short_things_stand_on_one_line(tmp_path):
    write_json(tmp_path / "x", {"list": list(range(99)), "dict": {"a": 1}, "long": ["x" * 99, {}]})
    lines = (tmp_path / "x").read_text().splitlines()
    assert lines[1:3] == [f'  "list": {list(range(99))},', '  "dict": {"a": 1},']
    assert lines[3:] == ['  "long": [', f'    "{"x" * 99}",', "    {}", "  ]", "}"]


def test_numbers_that_json_lacks_are_refused_both_ways(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x", {"a": float("nan")})
    with pytest.raises(FileError, match="Infinity is no JSON number"):
        parse_json(b'{"a": Infinity}', "x")


def test_tensors_may_be_read_by_whom_other_files_may(tmp_path):
    (tmp_path / "other").touch()
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
