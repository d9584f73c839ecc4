"""Adapters by "owner/name": fetched from a stand-in of the Hub on the loopback."""

import pytest
import torch
from hub_stand_in import TOKEN, commit, serving
from suite import draw, net

import finespun as fs
from finespun.errors import FileError, InputError
from finespun.files.hub import is_repository

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> (the files of an adapter, what the adapted model answers)."""
    found = {}
    for name, seed in (("main", 1), ("second", 2)):
        model, folder = net(), tmp_path_factory.mktemp(name)
        adapter = fs.adapt(model, "lora", ["up"], (), rank=2)
        for parameter in adapter.parameters():
            parameter.data.add_(0.1 * draw(*parameter.shape, seed=seed))
        adapter.save(folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        found[name] = files, model(draw(2, 4, 24, seed=9))
    return found


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """The stand-in is where the Hub is looked for; the cache is empty."""
    first, second = made["main"][0], made["second"][0]
    below = {f"deep/er/{name}": data for name, data in second.items()}
    pickled = {"adapter_model.bin": b"never read", "train.pt": b"never read"}
    repositories = {
        "owner/name": {"main": first | below | pickled, "v2": second},
        "private/name": {"main": first},
        "owner/pickled": {"main": pickled},
        "owner/half": {"main": {"adapter.json": first["adapter.json"]}},
    }
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serving(repositories) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield asked


def loads(made, which, *args, **options):
    model = net()
    fs.load(model, *args, **options)
    assert torch.equal(model(draw(2, 4, 24, seed=9)), made[which][1])


@pytest.mark.parametrize(
    ("options", "which"),
    [
        ({}, "main"),
        ({"revision": "v2"}, "second"),
        ({"revision": commit("owner/name", "v2")}, "second"),
        ({"subfolder": "deep/er"}, "second"),
    ],
    ids=str,
)
def test_a_repository_is_loaded_and_no_pickle_fetched(hub, made, options, which):
    loads(made, which, "owner/name", **options)
    assert hub
    assert not [path for path in hub if path.endswith((".bin", ".pt"))]


def test_a_private_one_needs_its_token(hub, made):
    for wrong in ("hf_wrong", None):
        with pytest.raises(FileError, match="private one needs token="):
            fs.load(net(), "private/name", token=wrong)
    loads(made, "main", "private/name", token=TOKEN)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("owner/name", {"revision": "v3"}, "'owner/name' has no revision 'v3'"),
        ("owner/none", {}, "'owner/none' is no folder here and no public repository"),
        ("owner/pickled", {}, r"no JSON and no safetensors.*pickled files .* are not read"),
        ("owner/name", {"subfolder": "shallow"}, "no safetensors in 'shallow'"),
        ("owner/half", {}, r"adapter\.safetensors"),
    ],
    ids=str,
)
def test_what_is_not_there_is_named_and_the_model_untouched(hub, name, options, told):
    model = net()
    with pytest.raises(FileError, match=told):
        fs.load(model, name, **options)
    assert fs.list_adapters(model) == []


@pytest.mark.parametrize("way", ["offline", "unreachable"])
def test_without_a_network_the_cache_answers(hub, made, monkeypatch, way):
    loads(made, "main", "owner/name")
    asked = len(hub)
    if way == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    loads(made, "main", "owner/name")
    assert len(hub) == asked
    with pytest.raises(FileError, match="not in the cache, and the Hub cannot be reached"):
        fs.load(net(), "owner/name", revision="v2")


@pytest.mark.parametrize("folder", ["../out", "/etc", "deep/../../x"])
def test_a_subfolder_lies_inside(hub, folder):
    with pytest.raises(InputError, match="must lie inside"):
        fs.load(net(), "owner/name", subfolder=folder)


def test_a_path_that_is_there_comes_first(hub, made, tmp_path):
    for name in ("owner", "owner/name"):
        (tmp_path / name).mkdir()
        assert not is_repository("owner/name")
    for file, data in made["second"][0].items():
        (tmp_path / "owner/name" / file).write_bytes(data)
    loads(made, "second", "owner/name")
    loads(made, "second", "owner", subfolder="name")
    assert not hub
    with pytest.raises(InputError, match="are for 'owner/name' on the Hub"):
        fs.load(net(), "owner/name", revision="main")
    for path in ("./owner/x", "a/b/c", "name", "/a/b", "a/"):
        assert not is_repository(path)
