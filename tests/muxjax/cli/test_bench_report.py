"""`muxjax bench report` and `muxjax bench picture`."""

from __future__ import annotations

from tests.muxjax.cli.bench_cli import BenchCli


def test_results_are_reported_and_their_trace_is_drawn(run: BenchCli) -> None:
    folder, trace = run.folder / "out", run.folder / "trace.json"
    workload = ["--rate", 40, "--requests", 4]
    run.succeed("bench", "serve", run.fleet, *workload, "-o", folder, "--trace", trace)

    picture = run.folder / "trace.svg"
    run.succeed("bench", "picture", trace, "-o", picture, "--title", "A < B")
    assert picture.read_text().startswith("<svg")
    assert "A &lt; B" in picture.read_text()

    assert "adbs" in run.succeed("bench", "report", folder)
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page  # the page is self-contained
    assert (folder / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_folders_without_results_are_rejected(run: BenchCli) -> None:
    assert "no such folder" in run.fail("bench", "report", run.folder / "no")
    assert "no results" in run.fail("bench", "report", run.folder)


def test_invalid_files_are_rejected(run: BenchCli) -> None:
    broken = run.folder / "broken.json"
    broken.write_text('{"kind": "serve"}')
    assert "not a result" in run.fail("bench", "report", run.folder)
    picture = ["-o", run.folder / "x.svg"]
    assert "not a Chrome trace" in run.fail("bench", "picture", broken, *picture)
    assert "--seconds must be above 0" in run.fail(
        "bench", "picture", broken, *picture, "--seconds", 0
    )
