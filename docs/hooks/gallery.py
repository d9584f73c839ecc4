"""MkDocs hook: the report of every folder in docs/results, written while the site is built."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from finespun.report.bench import bench_page
from finespun.report.run import run_page
from finespun.training.output import LOG, Result

RESULTS = Path(__file__).parent.parent / "results"
MARK = "<!-- gallery -->"


def folders() -> list[Path]:
    """The folders of runs and benches."""
    return sorted(path for path in RESULTS.iterdir() if path.is_dir())


def page(folder: Path) -> str:
    """The report that `finespun report` would write into the folder."""
    return run_page(folder) if (folder / LOG).is_file() else bench_page(folder)


def on_files(files: Files, *, config: MkDocsConfig, **_: Any) -> Files:
    """Add a page for every folder."""
    for folder in folders():
        name = f"gallery/{folder.name}.html"
        files.append(File.generated(config, name, content=page(folder)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by links to the pages."""
    lines = [
        f"- [{folder.name}](gallery/{folder.name}.html): {about(folder)}" for folder in folders()
    ]
    return markdown.replace(MARK, "\n".join(lines))


def about(folder: Path) -> str:
    """What one folder is, in one line."""
    if not (folder / LOG).is_file():
        return "a bench, with intervals and the learning rates that were tried."
    result = Result.read(folder)
    metric, after = next(iter(result.after.items()))
    before = result.before[metric]
    return f"a run, held-out {metric} {before:.3f} → {after:.3f} on {result.test_rows:,} rows."
