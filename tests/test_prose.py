"""Errors, help, docstrings and documentation use the words of the glossary."""

import pytest

from tests import prose

SAMPLES = {
    "told": "the file told nothing",
    "hears": "a tracker hears it",
    "foretells": "it foretells memory",
    "stays so": "it is frozen and stays so",
    "is said": "an error is said",
    "said": "what was once\nsaid",
    "mended": "a mended file",
    "speaks of": "it speaks of layers",
    "a embedding": "this is a embedding",
    "trained numbers": "very few trained numbers",
    "numbers a term": "96 numbers a term",
    "rate": "at a rate of 0.1",
}
FINE = [
    "learning rate",
    "learning\nrate",
    "dropout rate",
    "random numbers",
    "`told` is code",
    "an update",
]


def test_no_word_of_the_list_is_used():
    found = [
        f"{one.place}: {one.word!r} in '{one.text}'; write: {one.instead}"
        for path in prose.files()
        for one in prose.found(path, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("word", SAMPLES)
@pytest.mark.parametrize("page", ["finespun/adapter.py", "docs/index.md"])
def test_a_word_of_the_list_is_found(word, page):
    text = SAMPLES[word]
    source = f'"""{text}"""\n' if page.endswith(".py") else text
    assert [one.word for one in prose.found(prose.ROOT / page, source)] == [word]


@pytest.mark.parametrize("text", FINE)
def test_other_words_are_fine(text):
    assert not list(prose.found(prose.ROOT / "docs/index.md", text))


def test_every_exception_is_needed():
    for where, pattern in prose.ALLOWED:
        path = prose.ROOT / where
        allowed = dict(prose.ALLOWED)
        reason = prose.ALLOWED.pop((where, pattern))
        try:
            assert list(prose.found(path, path.read_text(encoding="utf-8"))), (where, reason)
        finally:
            prose.ALLOWED.clear()
            prose.ALLOWED.update(allowed)
    assert all((prose.ROOT / name).exists() for name in prose.EXEMPT)
