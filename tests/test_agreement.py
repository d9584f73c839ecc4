"""Every statement of docs/agreement.md has its test."""

import make_agreement


def test_every_row_has_its_test():
    assert make_agreement.faults() == []


def test_the_page_is_fresh():
    assert make_agreement.PAGE.read_text(encoding="utf-8") == make_agreement.text(), (
        "run python tests/make_agreement.py"
    )


def test_a_row_without_its_test_is_a_fault(tmp_path, monkeypatch):
    row = '[[row]]\nclaim = "a"\nsource = "b"\nfigure = "c"\ntest = "{}"\n'
    here = "tests/test_agreement.py::test_the_page_is_fresh"
    wrong = [f"{here}er", "tests/nowhere.py::test_it", "tests/test_agreement.py", ""]
    rows = "".join(row.format(test) for test in [here, *wrong])
    (tmp_path / "part.toml").write_text(f'title = "t"\nintro = "i"\n{rows}')
    monkeypatch.setattr(make_agreement, "PARTS", tmp_path)
    assert len(make_agreement.faults()) == len(wrong)
