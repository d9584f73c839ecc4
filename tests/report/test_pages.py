"""The published results as pages, in a browser."""

import chromium
import pages
import pytest


@pytest.mark.parametrize("folder", pages.folders(), ids=lambda folder: folder.name)
def test_figures_to_look_for_are_found_in_the_files(folder):
    assert pages.figures(folder)


@pytest.mark.slow
@pytest.mark.skipif(chromium.CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("folder", pages.folders(), ids=lambda folder: folder.name)
def test_a_published_page_opens_without_fault(folder, tmp_path):
    assert pages.faults(folder, tmp_path, None) == []
