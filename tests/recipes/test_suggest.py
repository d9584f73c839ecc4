"""The first recipe for one's own table is guessed well and always lawful."""

import json
from pathlib import Path

import pytest

from finespun.errors import InputError
from finespun.recipes.recipe import Recipe
from finespun.recipes.suggest import suggest_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


def table(folder: Path, header: str, rows: list[str], name: str = "my data.csv") -> Path:
    file = folder / name
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def test_the_example_is_what_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    text = suggest_recipe("examples/support.csv", "minilm-l3")
    assert text == (EXAMPLES / "support.yaml").read_text()
    recipe = Recipe.parse(text)
    assert (recipe.data.text, recipe.data.label) == ("message", "topic")


@pytest.mark.parametrize(
    ("header", "row", "columns", "kind"),
    [
        ("id,review,sentiment", "{i},fine words {i},{c}", ("review", None, "sentiment"), "classes"),
        (
            "premise,hypothesis,label",
            "p{i},h{i},{c}",
            ("premise", "hypothesis", "label"),
            "classes",
        ),
        ("Title,Score", "a longer title {i},{i}.5", ("Title", None, "Score"), "numbers"),
        ("a,b,c", "x{i},a much longer cell {i},{c}", ("b", None, "c"), "classes"),
    ],
)
def test_columns_and_labels_are_guessed(
    tmp_path: Path, header: str, row: str, columns: tuple[str, str | None, str], kind: str
) -> None:
    file = table(tmp_path, header, [row.format(i=i, c="no" if i % 2 else "yes") for i in range(20)])
    data = Recipe.parse(suggest_recipe(file, "minilm-l6")).data
    assert (data.text, data.pair, data.label) == columns
    assert (data.labels, data.file) == (kind, str(file))


def test_odd_names_are_quoted(tmp_path: Path) -> None:
    rows = [f"words {i},{i % 2}" for i in range(12)]
    file = table(tmp_path, "a: text #1,yes", rows)
    data = Recipe.parse(suggest_recipe(file, "minilm-l6")).data
    assert (data.text, data.label) == ("a: text #1", "yes")


def test_long_texts_get_room_and_few_rows_more_epochs(tmp_path: Path) -> None:
    few = table(tmp_path, "text,label", [f"{'word ' * 60}{i},{i % 2}" for i in range(20)])
    many = table(tmp_path, "text,label", [f"w {i},{i % 2}" for i in range(2000)], "many.csv")
    short, long = (Recipe.parse(suggest_recipe(f, "minilm-l6")).training for f in (many, few))
    assert (short.max_length, long.max_length) == (32, 128)
    assert (short.epochs, long.epochs) == (3, 20)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("distilbert", ("q_lin", "v_lin")), ("qwen3", ("q_proj", "v_proj")), ("new", "all-linear")],
)
def test_targets_follow_the_architecture(tmp_path: Path, kind: str, targets: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    recipe = Recipe.parse(suggest_recipe(EXAMPLES / "support.csv", str(tmp_path)))
    assert recipe.targets == targets


def test_tables_without_text_or_label_say_so(tmp_path: Path) -> None:
    numbers = table(tmp_path, "a,b", ["1,2", "3,4"])
    with pytest.raises(InputError, match="no column of text; columns: 'a', 'b'"):
        suggest_recipe(numbers, "minilm-l6")
    unlabelled = table(tmp_path, "text,id", [f"t{i},u{i}" for i in range(9)])
    with pytest.raises(InputError, match="no column looks like a label"):
        suggest_recipe(unlabelled, "minilm-l6")


def test_a_column_with_a_label_word_in_its_name_goes_before_a_half_empty_one(
    tmp_path: Path,
) -> None:
    rows = [f"{i},wie geht es Ihnen {i},{'ab'[i % 2]},{'x' if i % 3 else ''}" for i in range(20)]
    file = table(tmp_path, "№ id,Frage (Text),My Label?,notes", rows)
    assert Recipe.parse(suggest_recipe(file, "minilm-l3")).data.label == "My Label?"
    plain = table(tmp_path, "id,words,kind of,notes", rows, "other.csv")
    assert Recipe.parse(suggest_recipe(plain, "minilm-l3")).data.label == "kind of"


def test_labels_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    file = table(tmp_path, "text,label", [f"row {i},x" for i in range(9)])
    with pytest.raises(InputError, match="all labels in 'label' are the same"):
        suggest_recipe(file, "minilm-l3")
