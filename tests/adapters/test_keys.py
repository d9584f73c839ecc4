"""The grammar of keys: every key comes back from its spelling, and no other file spells one."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from suite import every, net, stirred

import finespun
from finespun.adapters.keys import Key, by_place, held_by, parsed, spelt
from finespun.contract.roles import name_of, role_of

SOURCE = Path(finespun.__file__).parent
SPELLED = re.compile(r"""["'](delta|bank|trained|buffer)/|["'/](start\.|alive_)""")
GRAMMAR = {"adapters/keys.py", "contract/roles.py"}
# what names the tensors in modules themselves
MODULES = {"contract/delta.py", "contract/groups.py", "contract/calculus.py"}

PLACES = st.from_regex(r"[a-z]{1,5}(\.[a-z0-9]{1,4}){0,3}(:q)?", fullmatch=True)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9]{0,6}", fullmatch=True).filter(
    lambda name: name not in ("gate", "start")
)
KEYS = st.one_of(
    st.builds(Key, st.just("site"), PLACES, NAMES, st.sampled_from(["parameter", "mask", "start"])),
    st.builds(Key, st.just("site"), PLACES, st.just(""), st.just("gate")),
    st.builds(Key, st.just("bank"), st.just(""), NAMES, st.sampled_from(["parameter", "start"])),
    st.builds(
        Key,
        st.just("module"),
        PLACES,
        PLACES.map(lambda p: p.replace(":", ".")),
        st.just("parameter"),
    ),
)


@given(KEYS)
def test_every_key_comes_back_from_its_spelling(key):
    assert Key.parse(str(key)) == key
    assert Key.parse(str(key), [key.place]) == key


@given(st.text(max_size=12))
def test_any_text_is_a_key_that_is_spelt_as_it_was(text):
    assert str(Key.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "owner", "place", "name", "role"),
    [
        ("delta/a.b/A", "site", "a.b", "A", "parameter"),
        ("delta/a/b/A", "site", "a/b", "A", "parameter"),
        ("delta/a/start.A", "site", "a", "A", "start"),
        ("delta/a/start.alive_A", "site", "a", "alive_A", "start"),
        ("delta/a/gate", "site", "a", "", "gate"),
        ("delta/a/alive_A", "site", "a", "A", "mask"),
        ("bank/start.theta", "bank", "", "theta", "start"),
        ("trained/head/gate", "module", "head", "gate", "parameter"),
        ("trained/head/0.alive_x", "module", "head", "0.alive_x", "parameter"),
        ("buffer/norm/running_mean", "module", "norm", "running_mean", "buffer"),
        ("delta//A", "nothing", "", "delta//A", "parameter"),
        ("bank/", "nothing", "", "bank/", "parameter"),
        ("weight", "nothing", "", "weight", "parameter"),
    ],
)
def test_the_spellings_of_files(text, owner, place, name, role):
    assert Key.parse(text) == Key(owner, place, name, role)


def test_names_of_known_modules_may_hold_slashes():
    key = Key.parse("trained/a/b/c/d.weight", ["a", "a/b"])
    assert (key.place, key.name) == ("a/b", "c/d.weight")
    assert str(key) == "trained/a/b/c/d.weight"


def test_what_is_said_in_a_start_is_said_of_the_copy():
    assert Key.parse("delta/a/start.A").within == Key("site", "a", "A")
    assert Key.parse("delta/a/start.alive_A").within == Key("site", "a", "A", "mask")
    assert Key.parse("delta/a/start.gate").within == Key("site", "a", "", "gate")
    assert Key.parse("delta/a/A").within == Key("site", "a", "A")


@every()
def test_every_tensor_of_every_structure_finds_its_module_again(case):
    _, adapter = stirred(case, net(), ("head",))
    live = adapter.attached
    tensors = live.tensors()
    assert parsed(spelt(tensors)).keys() == tensors.keys()
    places = by_place(tensors, "site")
    for name, delta in live.deltas.items():
        assert list(places.get(name, {})) == list(delta.state_dict())
        for leaf in delta.state_dict():
            assert name_of(*role_of(leaf)) == leaf
    assert held_by("module", "head", tensors).keys() == live.copies["head"].state_dict().keys()


def test_no_other_file_spells_a_key():
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for line in path.read_text().splitlines()
        if SPELLED.search(line)
    }
    assert found - MODULES <= GRAMMAR
    assert "adapters/keys.py" in found
