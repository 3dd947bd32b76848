"""README's performance section is what the report makes of the committed results."""

from __future__ import annotations

import dataclasses

import pytest

from bench import plots, report
from bench.results import DIRECTORY, Row, Run

RUN = Run(
    machine={
        "device": "a processor",
        "kind": "cpu",
        "cores": 2,
        "threads": 2,
        "instruction_set": "avx2",
        "versions": {"torch": "2.11.0"},
        "commit": "abc",
        "date": "2026-01-01",
    },
    settings={"memory_limit": 8.0},
    peaks={"fma": 4e11, "copy": 2e10},
    rows=[
        Row("fnac_loss", "published", "float32", "eager", p50=80.0, ratio=1.0, peak_bytes=147_000_000),
        Row("fnac_loss", "published", "float32", "cpu", p50=40.0, ratio=2.0, fraction=0.22, peak_bytes=34_000_000),
        Row("fnac_loss", "published", "float32", "cuda", "not run", "runs on cuda"),
        Row("fnac_loss", "b4096-7x7", "float32", "eager", "out of memory", "needs more"),
        Row("fnac_loss", "b4096-7x7", "float32", "cpu", p50=4000.0, peak_bytes=600_000_000),
        Row("fnac_loss", "published, memory kept", "float32", "eager", p50=60.0, ratio=1.0),
        Row("fnac_loss", "published, memory kept", "float32", "cpu", p50=20.0, ratio=3.0, fraction=0.5),
    ],
)


def test_readme_is_what_the_report_makes():
    text = report.README.read_text()
    assert report.with_section(text, report.section(report.read(DIRECTORY))) == text


def test_every_picture_in_the_readme_is_committed():
    for machine, runs in report.read(DIRECTORY).items():
        for name in plots.names([row for run in runs for row in run.rows]):
            for theme in plots.THEMES:
                assert (DIRECTORY / machine / f"{name}-{theme}.png").stat().st_size > 10_000


def test_committed_results_name_each_figure_once_and_a_folder_is_one_machine():
    for runs in report.read(DIRECTORY).values():
        keys = [(row.op, row.case, row.dtype, row.contender) for run in runs for row in run.rows]
        assert len(keys) == len(set(keys))
        assert len({run.machine["device"] for run in runs}) == 1


def test_the_section_shows_ours_against_the_baseline_and_who_ran_out_of_memory():
    made = report.section({"desk": [RUN]})
    assert "| B=256, 7x7 (published) | 80.0 (1.00x) | **40.0 (2.00x)** | 22% | 147 | 34.0 |" in made
    assert "| B=4096, 7x7 | out of memory | **4,000** |" in made
    assert "| B=256, 7x7 (published, memory kept) | 60.0 (1.00x) | **20.0 (3.00x)** | 50% |  |  |" in made
    assert "Not run: cuda (runs on cuda)." in made
    assert "in GFLOP/s: float32 multiply-adds 400" in made


def test_the_machine_measured_last_comes_first_and_the_others_are_folded():
    older = dataclasses.replace(RUN, machine={**RUN.machine, "device": "an older one", "date": "2025-01-01"})
    made = report.section({"a": [older], "b": [RUN]})
    assert made.index("### a processor") < made.index("<details>") < made.index("### an older one")
    assert "Measured before: an older one (2 threads, avx2)" in made


def test_all_dates_and_commits_of_a_machine_are_told():
    later = dataclasses.replace(RUN, machine={**RUN.machine, "commit": "def", "date": "2026-02-01"}, rows=[])
    assert "torch 2.11.0, 2026-01-01, 2026-02-01, commit abc, def." in report.section({"desk": [RUN, later]})


def test_results_without_limits_say_nothing_of_them():
    """Those of ``bench.distributed`` alone, say."""
    row = Row("distributed_fnac_loss", "published, 2 processes", "float32", "eager", p50=80.0, ratio=1.0)
    made = report.section({"desk": [dataclasses.replace(RUN, settings={"rounds": 9}, peaks={}, rows=[row])]})
    assert "| B=256, 7x7 (published, 2 processes) | 80.0 (1.00x) |" in made
    assert "Measured limits" not in made
    assert "out of memory" not in made


@pytest.mark.parametrize(
    "text",
    [
        '{"machine": {}, "rows',
        '{"machine": {}}',
        "[]",
        '{"rows": [{"op": "fnac_loss"}]}',
        '{"machine": {"kind": "cpu"}, "settings": {}, "peaks": {}, "rows": []}',
    ],
)
def test_a_file_that_holds_no_results_is_named(text, tmp_path):
    (tmp_path / "desk").mkdir()
    path = tmp_path / "desk" / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"desk/broken\.json does not hold results"):
        report.read(tmp_path)


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no results"):
        report.read(tmp_path)


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the markers"):
        report.with_section("# nothing here", "made")


def test_the_plots_are_drawn_for_both_themes(tmp_path):
    plots.draw([RUN], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["growth-dark.png", "growth-light.png"]


def _loss(contender, *cases, **fields):
    return [Row("fnac_loss", case, "float32", contender, **fields) for case in cases]


def test_who_runs_out_of_memory_in_every_case_has_no_curve(tmp_path):
    rows = _loss("eager", "published", "b1024-7x7", status="out of memory")
    rows += _loss("cpu", "published", "b1024-7x7", p50=40.0, peak_bytes=34_000_000)
    plots.draw([dataclasses.replace(RUN, rows=rows)], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_contender_has_one_colour_in_all_panels_and_a_line_in_the_legend(tmp_path, monkeypatch):
    """Here one was measured over the cells alone."""
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **_: drawn.append(path.touch() or figure)
    )
    cells = ("b128-4x4", "b128-14x14")
    rows = _loss("checkpointed", "published", "b1024-7x7", *cells, p50=40.0) + _loss("eager", *cells, p50=40.0)
    plots.draw([dataclasses.replace(RUN, rows=rows)], tmp_path)
    batch, over_cells = drawn[0].axes
    colours = {line.get_label(): line.get_color() for line in over_cells.lines}
    assert colours.keys() == {"eager", "checkpointed"}
    assert [line.get_color() for line in batch.lines] == [colours["checkpointed"]]
    assert {text.get_text() for text in drawn[0].legends[0].get_texts()} == set(colours)
