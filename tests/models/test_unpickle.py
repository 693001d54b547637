"""The scan of a pickle before it is read agrees with pickle on what is one, and stops what would do harm."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_retrieval.models.unpickle import MOST_DEPTH, NoPickle, Plain, Restricted, scan
from vlm.data.files import load_plain_pickle

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner)
    | st.tuples(inner) | st.tuples() | st.frozensets(st.integers()) | st.sets(st.text()),
    max_leaves=30,
)  # fmt: skip
DEEP = b"\x80\x02" + b")" + b"\x85" * 300_000


@settings(max_examples=60, deadline=None)
@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL), behind=st.binary(max_size=9))
def test_every_pickle_ends_where_pickle_says(value, protocol, behind):
    content = pickle.dumps(value, protocol)
    assert scan(content + behind) == len(content) and scan(behind + content, len(behind)) == len(
        behind + content
    )
    if protocol < 2:  # bytes are made by a function before protocol 3
        return
    with pytest.raises(NoPickle):
        scan(content[:-1])


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60).map(lambda tail: b"\x80\x04" + tail + b"."))
def test_what_pickle_reads_the_scan_lets_through(content):
    """Of random bytes: an opcode that the scan misunderstood would be seen here."""
    try:
        Plain(io.BytesIO(content), encoding="latin1").load()
    except Exception:
        return
    assert scan(content) <= len(content)


def nested(depth, how):
    value = ()
    for _ in range(depth):
        value = (value,) if how == "one" else (value, 1, 2, 3)
    return pickle.dumps({value: 1}, 2)


@pytest.mark.parametrize("how", ["one", "four"])
def test_tuples_may_be_nested_to_a_bound(how):
    scan(nested(MOST_DEPTH - 1, how))
    with pytest.raises(pickle.UnpicklingError, match=f"nests tuples more than {MOST_DEPTH} deep"):
        scan(nested(MOST_DEPTH, how))


@pytest.mark.parametrize(
    "tail",
    [
        b"}" + DEEP[2:] + b"K\x01s.",  # as a key
        DEEP[2:] + b".",
        b"}" + (b")" + b"\x85" * 20 + b"q\x00" + b"0h\x00") + b"\x85" * 20 + b"K\x01s.",  # through the memo
        b"}" + b")" + b"\x85" * 20 + b"Nb" + b"\x85" * 20 + b"K\x01s.",  # through a BUILD that does nothing
        b"}" + b")" + b"\x85" * 20 + b"(e" + b"\x85" * 20 + b"K\x01s.",  # ... an APPENDS of nothing
        b"}" + b")" + b"\x85" * 20 + b"2\x86" + b"\x85" * 20 + b"K\x01s.",  # ... a DUP
        b"}" + b"(" * 40 + b"t" * 40 + b"K\x01s.",
    ],
)
def test_ways_to_nest(tail):
    with pytest.raises(pickle.UnpicklingError, match="nests tuples"):
        scan(b"\x80\x02" + tail)


def test_tuples_that_repeat_each_other():
    """Thirty levels of pairs of one tuple are sixty objects, but hashing them takes 2**30 steps."""
    value: tuple = ()
    for _ in range(30):
        value = (value, value)
    with pytest.raises(pickle.UnpicklingError, match="in one"):
        scan(pickle.dumps(value, 2))
    scan(pickle.dumps([value[:0]] * 5000 + [tuple(range(5000))], 2))


@pytest.mark.parametrize("content", [b"\x80\x02}r\xff\xff\xff\x7f.", b"}p99999999\n.", b"}p-5\n."])
def test_memo_numbers_that_no_file_needs(content):
    with pytest.raises(pickle.UnpicklingError, match="memo"):
        scan(content)


def test_too_many_opcodes():
    with pytest.raises(pickle.UnpicklingError, match="more than 1,000 opcodes"):
        scan(pickle.dumps(list(range(2000)), 2), most=1000)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"no pickle", b"K", b"0.", b"}s.", b"\x80\x02X\xff\xff\xff\xffa.", b"h\x05."]
)
def test_what_is_no_pickle(content):
    with pytest.raises(NoPickle):
        scan(content)


def test_only_known_classes(tmp_path):
    value = {"a": {1, 2}, "b": frozenset([3])}
    assert Plain(io.BytesIO(pickle.dumps(value, 2))).load() == value
    for wrong in (OrderedDict(a=1), tmp_path, len):
        with pytest.raises(pickle.UnpicklingError, match="it asks for"):
            Plain(io.BytesIO(pickle.dumps(wrong))).load()
    with pytest.raises(pickle.UnpicklingError, match=r"it asks for __builtin__\.set"):
        Restricted(io.BytesIO(pickle.dumps({1}, 2))).load()


def test_the_reader_of_annotations_is_bounded(tmp_path):
    """RefCOCO's file is a pickle."""
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02}" + DEEP[2:] + b"K\x01s.")
    with pytest.raises(ValueError, match="nests tuples more than") as error:
        load_plain_pickle(path)
    assert str(path) in str(error.value)
    path.write_bytes(pickle.dumps([{"split": "val"}], 0))
    assert load_plain_pickle(path) == [{"split": "val"}]
