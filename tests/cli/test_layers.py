"""`ib-explain layers`: what is printed and what is written."""

from __future__ import annotations

import csv

from ib_explain.cli import main


def test_layers_prints_and_writes_the_sites(host, tmp_path, capsys, fails):
    file = tmp_path / "sites.csv"
    assert main(["layers", *host, "--out", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "layout", "grid", "channels", "depth", "leak", "effect"]
    default = [line.split()[0] for line in lines if line.endswith("default")]
    assert len(default) == 1
    with file.open() as stream:
        rows = {row["layer"]: row for row in csv.DictReader(stream)}
    assert rows[default[0]]["note"] == "default"
    assert (rows["layer3"]["height"], rows["layer3"]["channels"], rows["layer3"]["layout"]) == ("4", "192", "NCHW")
    assert "exists" in fails("layers", *host, "--out", file)
    assert "is a folder; --out names the CSV file" in fails("layers", *host, "--out", file.parent, "--overwrite")
