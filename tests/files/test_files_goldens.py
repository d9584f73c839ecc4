"""Adapters that every version since 0.1 wrote: each loads, bit for bit, and computes what it did.

The folders were written by goldens/native/make.py.
"""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from suite import batch, net, relative

import finespun as fs

GOLDENS = Path(__file__).parent.parent / "goldens" / "native"
# singular vectors of the base are computed anew where it is loaded, by another LAPACK perhaps
TOLERANCES = {"lora_xs": 1e-5}
FOLDERS = sorted(p.parent for p in GOLDENS.glob("*/*/adapter.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name} {f.name}")
def test_adapters_of_every_version_compute_what_it_recorded(folder, tmp_path):
    wanted = load_file(folder.parent / "outputs.safetensors")[folder.name]
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = fs.load(model, folder)
    with torch.no_grad():
        assert relative(model(batch()).cpu(), wanted) < TOLERANCES.get(folder.name, 1e-6)
        assert relative(net()(batch()).cpu(), wanted) > 1e-3
    adapter.save(tmp_path / "again")
    stored, again = (load_file(f / "adapter.safetensors") for f in (folder, tmp_path / "again"))
    assert stored.keys() == again.keys()
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype, name
        assert torch.equal(again[name], tensor), name


def test_every_version_and_every_folder_is_there():
    versions = {f.parent for f in FOLDERS}
    assert {version.name for version in versions} == {"0.1"}
    for version in versions:
        there = {f.name for f in FOLDERS if f.parent == version}
        assert there == load_file(version / "outputs.safetensors").keys()
