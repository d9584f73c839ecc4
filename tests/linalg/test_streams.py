"""Portable streams: published vectors, goldens, independence of chunking, and the laws drawn."""

import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finespun.errors import InputError
from finespun.linalg import streams

GOLDENS = json.loads((Path(__file__).parent.parent / "goldens" / "streams.json").read_text())
KEY = streams.key(0, "encoder.layer.0.query", "test")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_its_published_answers(counter, key, words):
    out = streams.philox([torch.tensor([c]) for c in counter], tuple(key))
    assert " ".join(f"{int(w):08x}" for w in out) == words


def test_words_are_those_of_philox_in_counter_order():
    words = streams.bits(KEY, 12, offset=4 * (2**33 + 5))
    for n in range(3):
        block = 2**33 + 5 + n
        counter = [torch.tensor([c]) for c in (block & 0xFFFFFFFF, block >> 32, 0, 0)]
        expected = torch.cat(streams.philox(counter, KEY))
        assert torch.equal(words[4 * n : 4 * n + 4], expected)


def sample(name, key, offset):
    if name == "bits":
        return streams.bits(key, 6, offset)
    if name == "integers":
        return streams.integers(key, 6, 1000, offset)
    if name == "permutation":
        return streams.permutation(key, 8)
    if name == "choice":
        return streams.choice(key, 100, 6)
    return getattr(streams, name)(key, (2, 3), offset)


@pytest.mark.parametrize("golden", GOLDENS["streams"], ids=lambda g: "-".join(map(str, g["of"])))
def test_values_are_the_ones_of_every_earlier_version(golden):
    key = streams.key(*golden["of"])
    assert list(key) == golden["key"]
    for name, wanted in golden["values"].items():
        assert sample(name, key, golden["offset"]).flatten().tolist() == wanted, name


def test_table_is_the_one_of_every_earlier_version():
    raw = streams.normal_table().numpy().astype("<f4").tobytes()
    assert hashlib.blake2b(raw, digest_size=16).hexdigest() == GOLDENS["normal_table"]


OFFSET_SAMPLERS = {
    "bits": lambda n, offset: streams.bits(KEY, n, offset),
    "integers": lambda n, offset: streams.integers(KEY, n, 1_000_003, offset),
    "uniform": lambda n, offset: streams.uniform(KEY, (n,), offset),
    "normal": lambda n, offset: streams.normal(KEY, (n,), offset),
    "signs": lambda n, offset: streams.signs(KEY, (n,), offset),
}


@pytest.mark.parametrize("name", OFFSET_SAMPLERS)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_values_do_not_depend_on_how_they_are_cut(name, one, two, offset):
    draw = OFFSET_SAMPLERS[name]
    together = draw(one + two, offset)
    assert together.shape == (one + two,)
    assert torch.equal(together, torch.cat([draw(one, offset), draw(two, offset + one)]))


def test_values_do_not_depend_on_the_working_chunk_or_threads(monkeypatch):
    wanted = streams.bits(KEY, 100_000, 3)
    monkeypatch.setattr(streams, "_CHUNK", 7)
    assert torch.equal(streams.bits(KEY, 1000, 3), wanted[:1000])
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(streams.bits(KEY, 100_000, 3), wanted)
    finally:
        torch.set_num_threads(threads)


def test_values_do_not_depend_on_surroundings():
    wanted = {name: draw(50, 1) for name, draw in OFFSET_SAMPLERS.items()}
    torch.set_default_dtype(torch.float64)
    streams._table.cache_clear()
    try:
        with torch.device("meta"):
            got = {name: draw(50, 1) for name, draw in OFFSET_SAMPLERS.items()}
            ordered = streams.permutation(KEY, 50), streams.choice(KEY, 500, 50)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, values in wanted.items():
        assert torch.equal(got[name], values)
        assert got[name].dtype == values.dtype
    assert torch.equal(ordered[0], streams.permutation(KEY, 50))
    assert torch.equal(ordered[1], streams.choice(KEY, 500, 50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_the_rounded_float32_values(dtype):
    for sampler in (streams.uniform, streams.normal, streams.signs):
        values = sampler(KEY, (3, 5), 2, dtype=dtype)
        assert values.dtype == dtype
        assert torch.equal(values, sampler(KEY, (3, 5), 2).to(dtype))


def test_shapes_are_filled_row_by_row():
    for sampler in (streams.uniform, streams.normal, streams.signs):
        assert torch.equal(sampler(KEY, (4, 6)).flatten(), sampler(KEY, (24,)))
        assert sampler(KEY, ()).shape == ()
        assert sampler(KEY, (0, 3)).shape == (0, 3)


@pytest.mark.slow
def test_keys_differ_in_every_part_and_agree_across_processes():
    parts = [
        (0, "a", "b"),
        (1, "a", "b"),
        (-1, "a", "b"),
        (0, "ab", ""),
        (0, "", "ab"),
        (0, "é", "b"),
    ]
    keys = {streams.key(*p) for p in parts}
    assert len(keys) == len(parts)
    assert all(0 <= word < 2**32 for key in keys for word in key)
    code = "from finespun.linalg.streams import key; print(key(0, 'é', 'b'))"
    root = Path(__file__).parent.parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert out.stdout.decode().strip() == str(streams.key(0, "é", "b"))


def test_uniform_stays_on_its_grid_and_is_uniform():
    u = streams.uniform(KEY, (1_000_000,))
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert u.min() >= 0
    assert u.max() < 1
    cells = torch.histc(u, bins=100, min=0, max=1)
    chi2 = ((cells - 10_000).square() / 10_000).sum().item()
    assert 50 < chi2 < 160  # 99 degrees of freedom, ±4 sigma
    lag = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(lag) < 4e-3


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 1_999_999_973, 2**31])
def test_integers_cover_their_range_evenly(high):
    values = streams.integers(KEY, 200_000, high)
    assert values.dtype == torch.int64
    assert values.min() >= 0
    assert values.max() < high
    exact = [
        (hi << 32 | lo) * high >> 64 for hi, lo in streams.bits(KEY, 2_000).view(-1, 2).tolist()
    ]
    assert values[:1000].tolist() == exact
    cells = torch.bincount(values * min(high, 10) // high, minlength=min(high, 10)).double()
    edges = [-(-c * high // min(high, 10)) for c in range(min(high, 10) + 1)]
    expected = torch.tensor(edges, dtype=torch.float64).diff() / high * 200_000
    assert ((cells - expected).square() / expected).sum() < 40


def test_normal_table_has_the_moments_that_are_documented():
    table = streams.normal_table().double()
    assert len(table) == 65_536
    assert torch.equal(table, -table.flip(0))
    assert (table.diff() > 0).all()
    assert table.square().mean().item() == pytest.approx(1, abs=1e-9)
    assert table.pow(4).mean().item() == pytest.approx(2.9992, abs=1e-4)
    assert table.pow(6).mean().item() == pytest.approx(14.97, abs=5e-3)
    assert table.max().item() == pytest.approx(4.325, abs=1e-3)
    law = statistics.NormalDist()
    for cell in range(0, 65_536, 251):
        exact = law.inv_cdf((cell + 0.5) / 65_536)
        assert table[cell].item() == pytest.approx(exact, rel=2e-5)


def test_normal_draws_follow_the_law():
    x = streams.normal(KEY, (2_000_000,)).double()
    assert abs(x.mean()) < 4 / 2e6**0.5
    assert x.square().mean().item() == pytest.approx(1, abs=4 * (2 / 2e6) ** 0.5)
    assert x.pow(4).mean().item() == pytest.approx(3, abs=4 * (96 / 2e6) ** 0.5)
    assert abs((x[:-1] * x[1:]).mean()) < 4 / 2e6**0.5
    other = streams.normal(streams.key(1, "encoder.layer.0.query", "test"), (2_000_000,)).double()
    assert abs((x * other).mean()) < 4 / 2e6**0.5


def test_signs_are_fair_bits_of_the_words():
    s = streams.signs(KEY, (1_000_000,))
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(s.mean()) < 4e-3
    words = streams.bits(KEY, 2).tolist()
    expected = [-1.0 if word >> b & 1 else 1.0 for word in words for b in range(32)]
    assert s[:64].tolist() == expected


@given(st.integers(0, 400), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_permutations_and_choices_are_without_replacement(n, seed):
    key = streams.key(seed, "layer", "order")
    assert sorted(streams.permutation(key, n).tolist()) == list(range(n))
    for k in {0, n // 3, n // 2, n - n // 4, n}:
        chosen = streams.choice(key, n, k).tolist()
        assert len(chosen) == len(set(chosen)) == k
        assert all(0 <= c < n for c in chosen)


def test_a_smaller_choice_starts_a_larger_one_and_follows_the_integers():
    large = streams.choice(KEY, 1000, 500).tolist()
    for k in (1, 7, 100, 499):
        assert streams.choice(KEY, 1000, k).tolist() == large[:k]
    seen = dict.fromkeys(streams.integers(KEY, 2000, 1000).tolist())
    assert list(seen)[:500] == large


@pytest.mark.slow
def test_orders_are_even():
    places, members = torch.zeros(6, 6), torch.zeros(8)
    for seed in range(3000):
        order = streams.permutation(streams.key(seed, "x", "order"), 6)
        places[order, torch.arange(6)] += 1
        members[streams.choice(streams.key(seed, "x", "pick"), 8, 3)] += 1
    assert ((places - 500).square() / 500).sum() < 25 + 5 * 50**0.5
    assert (members / 3000 - 3 / 8).abs().max() < 4 * (3 / 8 * 5 / 8 / 3000) ** 0.5


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match=r"1\.\.2\*\*31"):
        streams.integers(KEY, 3, 2**31 + 1)
    with pytest.raises(InputError, match=r"1\.\.2\*\*31"):
        streams.integers(KEY, 3, 0)
    with pytest.raises(InputError, match="must not be negative"):
        streams.bits(KEY, 3, -1)
    with pytest.raises(InputError, match="must not be negative"):
        streams.normal(KEY, (3,), -2)
    with pytest.raises(InputError, match="cannot choose 6 different ones of 5; nearest: 5"):
        streams.choice(KEY, 5, 6)
