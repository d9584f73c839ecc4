"""Files made to harm: memory, time and code stay out of their reach, and the file is named."""

import json
import os
import pickle
import resource
import time

import pytest
import torch
from fuzz_damage import CANARY, TERA, Canary
from fuzz_formats import write_by_peft, write_native
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from suite import net

import finespun as fs
from finespun import files
from finespun.contract import SiteShape
from finespun.errors import FileError, InputError
from finespun.lifecycle.conversion.facts import spectra
from finespun.lifecycle.stored import StoredWeights
from finespun.recipes.recipe import Recipe
from finespun.storage.memory_limit import bounded
from finespun.storage.patterns import check_pattern
from finespun.storage.safe_io import read_tensors
from finespun.training.inference import read_recipe


def peak() -> int:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def rewrite(path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# --- memory --------------------------------------------------------------------------------------
def test_a_file_that_claims_a_terabyte_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "U8", "shape": [TERA], "data_offsets": [0, TERA]}
    text = json.dumps({"x": entry}).encode()
    for there, told in ((0, "the header promises"), (TERA, "more than this machine's memory")):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + there)
        before = peak()
        with pytest.raises(FileError, match=rf"x.safetensors .*{told}"):
            read_tensors(path)
        assert peak() - before < 16


PLANS = {
    "lora": ("rank", 1 << 36),
    "lsr": ("terms", [1 << 36, 2]),
    "vera": ("rank", 1 << 34),
    "nola": ("rank", 1 << 34),
    "fourierft": ("frequencies", 1 << 40),
    "lokr": ("rank", 1 << 36),
    "tera": ("modes", [1 << 20, 1 << 20]),
}


WAYS = {
    "model": lambda folder: fs.load(net(), folder),
    "files": lambda folder: list(spectra(files.read_adapter(folder))),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("way", WAYS)
def test_a_plan_that_claims_terabytes_builds_nothing(tmp_path, kind, way):
    write_native(tmp_path, kind)
    key, value = PLANS[kind]
    rewrite(tmp_path / "adapter.json", lambda c: change(c["plan"]["choices"], key, value))
    before = peak()
    with pytest.raises((FileError, InputError), match=r"'first'|'blocks.\d\.") as caught:
        WAYS[way](tmp_path)
    assert peak() - before < 64
    assert "allocate" not in str(caught.value)


def change(choices, key, value) -> None:
    for choice in choices.values():
        assert key in choice
        choice[key] = value


def test_sites_that_claim_terabytes_build_nothing_without_a_model(tmp_path):
    write_native(tmp_path, "lora")
    rewrite(tmp_path / "adapter.json", lambda c: c["plan"]["sites"][0].__setitem__(1, 2**31 - 1))
    before = peak()
    with pytest.raises(FileError, match=r"blocks.0.*(bytes would be made|size mismatch)"):
        fs.convert(tmp_path, tmp_path / "b", "lora")
    assert peak() - before < 64


def test_the_bound_speaks_before_memory_is_taken():
    small = torch.ones(1 << 14)
    makers = (
        lambda: torch.zeros(1 << 20, 1 << 20),
        lambda: torch.arange(1 << 40),
        lambda: torch.randn(1 << 30, generator=torch.Generator()),
        lambda: torch.outer(small, small),
        lambda: torch.kron(small, small),
        lambda: small.repeat(1 << 20),
        lambda: small[:, None] * small,
        lambda: small.new_zeros(1 << 40),
        lambda: torch.einsum("a,b->ab", small, small),
    )
    for make in makers:
        before = peak()
        with (
            pytest.raises(FileError, match=r"^here: a tensor of [\d,]+ bytes"),
            bounded("here", 1 << 24),
        ):
            make()
        assert peak() - before < 32
    with bounded("here", 1 << 24):
        assert torch.outer(small[:1000], small[:1000]).sum() == 10**6


# --- time ----------------------------------------------------------------------------------------
ENDLESS = ["(a+)+$", "((a|b)*)*c", "(a|a)*b", "(.*a){25}", "(?:a{1,99}){1,99}b", ".*.*.*.*.*.*x"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_never_end_are_refused(tmp_path, pattern):
    write_by_peft(tmp_path)
    name = "base_model.model." + "a" * 60 + ".lora_{}.weight"
    held = load_file(tmp_path / "adapter_model.safetensors")
    held |= {name.format("A"): torch.ones(3, 4), name.format("B"): torch.ones(4, 3)}
    save_file(held, tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path / "adapter_config.json", lambda c: c.update(rank_pattern={pattern: 3}))
    began = time.process_time()
    with pytest.raises(FileError, match=r"pattern .* could take without end"):
        files.read_adapter(tmp_path)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "pattern",
    [r"layer\.\d+.*value", "(a|b).a", r"^model\.layers\.(1|2)\d?\.", "[(+*]{2}x", r"\(a+\)+"],
)
def test_usual_patterns_are_lawful(pattern):
    check_pattern(pattern, "model.layers.11.self_attn.q_proj")


@given(st.text(alphabet="ab.()[]*+?{}|\\1,^$", max_size=12))
def test_any_text_is_lawful_or_refused_at_once(pattern):
    import re

    try:
        check_pattern(pattern, "a" * 40)
    except FileError:
        return
    began = time.process_time()
    re.match(rf"(.*\.)?({pattern})$", "a" * 40)
    assert time.process_time() - began < 5


# --- places --------------------------------------------------------------------------------------
def test_links_in_a_circle_are_told(tmp_path):
    write_native(tmp_path / "a", "lora")
    for name in ("adapter.safetensors", "adapter.json"):
        (tmp_path / "a" / name).unlink()
        (tmp_path / "a" / name).symlink_to(name)
        with pytest.raises(FileError, match=r"adapter.safetensors cannot|holds n"):
            files.read_adapter(tmp_path / "a")


def test_a_base_is_read_from_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"model.safetensors is not a regular file"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file({"x.weight": torch.ones(())}, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"'x.weight' is \(\)"):
        StoredWeights(tmp_path).read(SiteShape("x", 2, 2))


# --- code ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json", "adapter.bin", "x.pt"])
def test_no_pickle_is_opened(tmp_path, name):
    write_native(tmp_path, "lora")
    (tmp_path / name).write_bytes(pickle.dumps(Canary(tmp_path)))
    if name.startswith("adapter.") and name != "adapter.bin":
        with pytest.raises(FileError, match=name):
            fs.load(net(), tmp_path)
    else:
        fs.load(net(), tmp_path)
    assert not (tmp_path / CANARY).exists()


def test_recipes_are_text_of_a_bounded_size(tmp_path):
    bomb = "a: &a [x]\n" + "".join(
        f"{c}: &{c} [{f'*{p}, ' * 9}]\n" for p, c in zip("abcdefgh", "bcdefghi")
    )
    for text, told in (
        (bomb, "aliases that stand for more than 100,000 values"),
        ("a: &a [*a]", "nested too deeply, or within itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ):
        with pytest.raises(InputError, match=told):
            Recipe.parse(text)
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(FileError, match=r"recipe.yaml is not a regular file"):
        read_recipe(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    (tmp_path / "recipe.yaml").write_bytes(b"model: x\n" * (1 << 18))
    with pytest.raises(FileError, match=r"recipe.yaml has 2,359,296 bytes"):
        read_recipe(tmp_path)
    with pytest.raises(FileError, match="at most 1,048,576 are read"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_numbers_beyond_floats_are_refused_by_key(tmp_path):
    write_native(tmp_path, "lora")
    text = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(
        text.replace('"strength": 1.0', f'"strength": {10**400}')
    )
    with pytest.raises(FileError, match=r"adapter.json: strength must be a finite number"):
        files.read_adapter(tmp_path)
