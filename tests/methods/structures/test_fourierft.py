"""FourierFT against its definition, PEFT, and its places."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import adapted, built, fingerprint, moved, outputs_agree, peft, rank, site, update

from finespun.contract import SiteShape
from finespun.errors import InputError, PlanError
from finespun.linalg import streams
from finespun.methods.structures import FourierFT


@given(st.sampled_from([7, 8, 12]), st.sampled_from([5, 6, 8]), st.integers(1, 35))
@settings(max_examples=30, deadline=None)
def test_the_update_is_the_real_part_of_the_inverse_transform(out, inner, n):
    (delta,) = moved(FourierFT(frequencies=n, scaling=3.0), site(out, inner))
    places = torch.randperm(out * inner)[:n]
    delta.train_at(places)
    F = torch.zeros(out * inner, dtype=torch.complex128)
    F[places] = delta.c.detach().to(F.dtype)
    wanted = 3.0 * torch.fft.ifft2(F.view(out, inner)).real
    torch.testing.assert_close(update(delta), wanted, rtol=1e-10, atol=1e-12)


def test_all_of_the_spectrum_is_all_that_is_even():
    """Real spectra reach matrices with W[i, j] = W[−i, −j] only."""
    (delta,) = moved(FourierFT(frequencies=48), site(8, 6))
    W = update(delta)
    torch.testing.assert_close(W, W.flip(0, 1).roll((1, 1), (0, 1)))


def test_each_frequency_adds_rank_two():
    (delta,) = moved(FourierFT(frequencies=6), site(96, 96))
    delta.train_at(torch.arange(1, 7) * 97)
    assert rank(delta) == 12
    (delta,) = moved(FourierFT(frequencies=600), site(96, 96))
    assert rank(delta) > 90


def test_outputs_are_pefts():
    from peft import FourierFTConfig

    config = FourierFTConfig(n_frequency=40, scaling=20.0)
    layer = peft(config, (24, 17), bias=True).fc0
    form = FourierFT(frequencies=40, scaling=20.0)
    ours, delta = adapted(form, layer)
    rows, columns = layer.indices["default"]
    delta.train_at(rows * 17 + columns)
    delta.c.data.copy_(layer.fourierft_spectrum["default"])
    assert outputs_agree(ours, layer) <= 1e-5


def test_places_belong_to_the_shape_and_the_seed():
    form = FourierFT(frequencies=40)
    one, same, other = (
        built(form, s)[0][0] for s in (site(24, 16), site(24, 16, "b"), site(16, 24))
    )
    assert torch.equal(*(d.held("place", d.c) for d in (one, same)))
    assert not torch.equal(*(d.held("place", d.c) for d in (one, other)))
    assert set(one.state_dict()) == {"c"}
    places = streams.choice(streams.key(777, "24x16", "frequencies"), 24 * 16, 40)
    assert len(set(places.tolist())) == 40
    assert fingerprint(places) == "abcdf797ea648cef"


def test_counts():
    for size, row in ((768, 1_179_648), (4096, 33_554_432)):
        shape = SiteShape("s", size, size)
        assert FourierFT().num_parameters(shape) == 1000
        assert FourierFT().flops(shape, 1) - FourierFT().flops(shape, 0) == row


def test_what_cannot_be_is_named():
    with pytest.raises(PlanError, match=r"frequencies=1000.*'site' \(12x10\).*at most 120"):
        FourierFT().plan([site(12, 10)])
    with pytest.raises(InputError, match="frequencies=0"):
        FourierFT(frequencies=0)
    with pytest.raises(InputError, match="scaling"):
        FourierFT(scaling=float("inf"))
    assert FourierFT.from_options(n_frequency=5, random_loc_seed=3) == FourierFT(
        frequencies=5, seed=3
    )
