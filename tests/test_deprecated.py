"""Names of 0.1 work for one version, each with a warning that says the new name."""

import warnings
from pathlib import Path

import pytest
from suite import net

import finespun as fs
from finespun import deprecated
from finespun.bench.spec import BenchSpec, Member
from finespun.errors import StateError
from finespun.recipes.recipe import Recipe, Training

SECTIONS = {cls.__name__: cls for cls in (Recipe, Training, BenchSpec, Member)}
PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text(encoding="utf-8")
KEYS = [(s, *pair) for s, names in deprecated.KEYS.items() for pair in names.items()]


@pytest.mark.parametrize(("section", "old", "new"), KEYS)
def test_a_key_is_read_under_its_old_name_with_a_warning(section, old, new):
    fields = SECTIONS[section].model_fields
    assert new in fields
    assert old not in fields
    with pytest.warns(DeprecationWarning, match=f"'{old}' is called '{new}' since 0.2"):
        assert deprecated.rename_keys(section, {old: 1}) == {new: 1}
    assert deprecated.rename_keys(section, {old: 1, new: 2}) == {old: 1, new: 2}


def test_a_recipe_of_0_1_is_that_of_today():
    text = "model: minilm-l3\ndata: {builtin: trec}\n"
    with pytest.warns(DeprecationWarning, match="since 0.2") as told:
        old = Recipe.parse(text + "train: [pooler]\ntraining: {rate: 0.5}\n")
    assert len(told) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert old == Recipe.parse(text + "train_modules: [pooler]\ntraining: {lr: 0.5}\n")
        assert Recipe.parse(old.dump()).dump() == old.dump()


def test_an_old_override_is_read():
    with pytest.warns(DeprecationWarning, match="'rate' is called 'lr'"):
        recipe = Recipe.parse("model: minilm-l3\ndata: {builtin: trec}\n", ["training.rate=0.25"])
    assert recipe.lr == 0.25


def test_old_keywords_of_adapt_are_taken():
    with pytest.warns(DeprecationWarning, match=r"adapt\(train=...\) is called train_modules=..."):
        adapter = fs.adapt(net(), fs.LoRA(rank=2), ["up"], train=["head"])
    assert adapter.attached.trained == ("head",)
    saved = fs.adapt(net(), fs.LoRA(rank=2), ["up"], modules_to_save=["head"])
    assert saved.attached.trained == ("head",)
    with pytest.raises(TypeError, match="train and train_modules; keep train_modules"):
        fs.adapt(net(), fs.LoRA(rank=2), ["up"], train=["head"], train_modules=["head"])


def test_an_adapter_has_no_mode_of_its_own():
    adapter = fs.adapt(net(), fs.LoRA(rank=2), ["up"], ["head"])
    for call in (adapter.train, adapter.eval):
        with pytest.raises(StateError, match=r"make_trainable\(\).*model\.train\(\)"):
            call()
    assert adapter.num_parameters == adapter.num_update_parameters + adapter.num_module_parameters
    assert adapter.num_module_parameters == sum(p.numel() for p in net().head.parameters())


def test_the_page_of_the_migration_names_all_of_them():
    for _, old, new in KEYS:
        assert f"| `{old}` | `{new}` |" in PAGE
    for old in deprecated.RENAMED:
        assert f"fs.{old}" in PAGE or f"finespun.{old}" in PAGE
