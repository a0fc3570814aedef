"""Several folders side by side: where RL is planted to forget less than SFT, and where to forget more."""

import json
from pathlib import Path

import polars as pl
import pytest

from language_tables import CONFIG, make_folder, make_table
from matched_loops import by_seed
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.report import compare_folders
from study_tables import cells, check, plus_minus
from test_report import text_of

FAMILY_OF = {method: family for family, methods in CONFIG["families"].items() for method in methods}


def test_comparison_has_a_panel_per_folder_and_says_where_rl_forgets_less(tmp_path: Path) -> None:
    kept_more = pl.when(pl.col("method").is_in(CONFIG["families"]["RL"])).then(0.2).otherwise(0.0)
    better = make_table(seeds=3).with_columns(prior=pl.col("prior") + kept_more)
    worse = make_table(seeds=3).with_columns(prior=pl.col("prior") - kept_more)
    never = make_table(seeds=3).with_columns(new=pl.col("new") / 2)
    folders = [
        make_folder(tmp_path / name, table, title=name, new_task=name)
        for name, table in (("math", better), ("tools", worse), ("science", never))
    ]
    section, page = compare_folders(folders, tmp_path / "out")
    check(section, "fig2")
    sizes = []
    for table in (better, worse):
        tuned = [row for row in table.to_dicts() if row["method"] in FAMILY_OF]
        rl, sft = (by_seed(tuned, name, 0.9, group=lambda row: FAMILY_OF[row["method"]]) for name in ("RL", "SFT"))
        gaps = [own - other for own, other in zip(rl, sft, strict=True)]
        sizes.append(plus_minus([abs(gap) for gap in gaps]))
    found = cells(section.tables[0])
    assert found["math"] == ["new ≥ 90%", f"+{sizes[0]}", "3", "better"]
    assert found["tools"] == ["new ≥ 90%", f"−{sizes[1]}", "3", "worse"]
    assert found["science"] == ["—", "—", "0", "not comparable"]
    assert section.finding == (
        f"Prior accuracy that RL keeps, against SFT: better: math at new ≥ 90% (+{sizes[0]} points); "
        f"worse: tools at new ≥ 90% (−{sizes[1]} points); not comparable: science."
    )
    assert [panel.title for panel in section.figure.panels] == ["math", "tools", "science"]
    assert [layer.label for layer in section.figure.panels[0].layers] == [
        *("RL", "RL frontier", "SFT", "SFT frontier", "base")
    ]
    frontier = section.figure.panels[0].layers[1]
    among = better.filter(pl.col("method").is_in(CONFIG["families"]["RL"])).to_dicts()
    for new, prior in zip(frontier.x, frontier.y, strict=True):
        assert not any(
            r["new"] >= new and r["prior"] >= prior and (r["new"], r["prior"]) != (new, prior) for r in among
        )
    assert page == tmp_path / "out" / "comparison.html"
    assert text_of(page.read_text()).count(section.finding.replace("<", "&lt;")) == 2  # in the contents and below
    assert (tmp_path / "out" / "figures" / "fig2.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_folder(tmp_path / name, make_table(seeds=2), title=name, new_task=name) for name in ("one", "two")]
    out = tmp_path / "both"
    assert main(["report", *map(str, folders), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(out / "comparison.html")
    assert found["finding"] == compare_folders(folders, out)[0].finding
    assert [table["title"] for table in found["tables"]] == [
        "Prior accuracy kept",
        *(f"{name}: prior accuracy kept, %" for name in ("one", "two")),
    ]
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    assert "two: prior accuracy kept, %" in capsys.readouterr().out
    for options, message in (
        ([str(folders[0]), "--out", str(out)], "--out is for the comparison of several folders"),
        ([*map(str, folders), "--markdown", str(out)], "--markdown is for the report of one folder"),
    ):
        assert main(["report", *options]) == 2
        assert message in capsys.readouterr().err


def test_comparison_needs_two_different_folders_and_seeds(tmp_path: Path) -> None:
    one = make_folder(tmp_path / "one", make_table(seeds=1))
    for folders in ([one], [one, tmp_path / "." / "one"]):
        with pytest.raises(RazorError, match="at least two different output folders"):
            compare_folders(folders, tmp_path)
    with pytest.raises(RazorError, match=r"There is no .*config.json"):
        compare_folders([one, tmp_path / "none"], tmp_path)
    other = make_folder(tmp_path / "other", make_table(seeds=1, methods=["grpo", "simpo"]), labels={})
    section, _ = compare_folders([one, other], tmp_path)
    assert [row[-1] for row in section.tables[0].rows] == ["cannot be told", "not comparable"]
    assert "SFT being none in this sweep" in section.note
