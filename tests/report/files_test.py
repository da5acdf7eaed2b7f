"""Files are there whole or not at all."""

import pytest

from effjax.report import Column, pareto_plot, save, summarise, whole, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old é")

    def half():
        with whole(path) as temporary:
            temporary.write_text("ne")
            assert path.read_text(encoding="utf-8") == "old é"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert path.read_text(encoding="utf-8") == "old é"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    assert write_text(path, "new") == path
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_figure_that_cannot_be_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    rows = [{"name": "a", "x": 1, "y": 1}]
    columns = [Column("x", "x", best="min"), Column("y", "y", best="max")]
    figure = pareto_plot(summarise(rows, columns), "x", "y")

    def killed(path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", killed)
    with pytest.raises(OSError, match="disk full"):
        save(figure, tmp_path / "plot")
    assert list(tmp_path.iterdir()) == []
