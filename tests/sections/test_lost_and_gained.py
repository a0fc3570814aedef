"""The section of items, on runs whose outcomes are made up: numbers by loops, what is missing, texts, and the page."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import matched_loops
from language_tables import LABELS, make_folder, make_table
from rlrazor.analysis.lost import WITHIN_LUCK, transitions
from rlrazor.cli import main
from rlrazor.experiments.language.evaluate import DRIFT
from rlrazor.guard.lost_items import HEADERS, shown_changes
from rlrazor.report import load, prose, write_markdown, write_report
from rlrazor.report.drawing import Points
from rlrazor.report.prose import read_prose
from rlrazor.report.sections import KINDS, items
from rlrazor.report.sections.items import applies, section
from rlrazor.report.study import Study
from rlrazor.report.sweep import read_sweep
from rlrazor.runs import floor
from rlrazor.runs import items as items_file
from study_tables import cells, check

METHODS = ("sft-one", "grpo", "reinforce")
SIZES = {"copy": 50, "sort": 30}  # items of each prior task; `sort` has four answers to choose among
KEPT = Path(__file__).parents[2] / "docs" / "language" / "smollm2" / "run"


def outcomes(run_id: str, step: int) -> pl.DataFrame:
    """Of a checkpoint: later ones have lost more, and GRPO's less."""
    rng = np.random.default_rng([*run_id.encode(), step])
    seed, rate = int(run_id.split()[-1]), (0.02 if run_id.startswith("grpo") else 0.08) * step
    rows = []
    for prior, size in SIZES.items():
        untuned = np.random.default_rng([seed, size]).random(size) < 0.8
        tuned = np.where(untuned, rng.random(size) >= rate, rng.random(size) < 0.02)
        for at, (before, after) in enumerate(zip(untuned, tuned, strict=True)):
            likely = {}
            if prior == "sort":
                likely = {"choices": 4, "right": [at % 4]}
                for whose, right in (("base", before), ("tuned", after)):
                    most = at % 4 if right else (at + 1) % 4
                    likely[f"{whose}_logprobs"] = [-1.0 if place == most else -3.0 for place in range(4)]
            named = {"step": step, "prior": prior, "task": prior, "item": f"{at}-{prior}"}
            rows.append({**named, "base": float(before), "tuned": float(after), **likely})
    return pl.DataFrame(rows, schema=items_file.SCHEMA, orient="row")


def write(folder: Path, run_id: str, table: pl.DataFrame, name: str = items_file.NAME) -> None:
    (folder / "runs" / run_id).mkdir(parents=True, exist_ok=True)
    (folder / "runs" / run_id / name).write_bytes(items_file.to_bytes(table))


def folder_of(folder: Path, seeds: int = 2, **config: Any) -> Path:
    table = make_table(methods=METHODS, seeds=seeds)
    make_folder(folder, table, **config)
    for (run_id,), rows in table.group_by("run_id", maintain_order=True):
        write(folder, str(run_id), pl.concat([outcomes(str(run_id), step) for step in rows["step"]]))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("items") / "whole")


def study_in(folder: Path) -> Study:
    return replace(read_sweep(folder), name="items")


def reported(folder: Path, method: str, at: float) -> list[pl.DataFrame]:
    """The outcomes at the checkpoints that a loop finds, one of each seed."""
    rows = [row for row in pl.read_parquet(folder / "records.parquet").to_dicts() if row["method"] == method]
    found = matched_loops.reported(rows, at)
    return [outcomes(row["run_id"], row["step"]) for _, row in sorted(found.items())]


def test_what_is_shown_is_counted_at_the_matched_checkpoints_of_all_seeds(whole: Path) -> None:
    shown = section(study_in(whole))
    check(shown, "items")
    tables = {table.title: cells(table) for table in shown.tables}
    assert "at new ≥ 90%" in shown.finding
    for method in METHODS:
        runs, label = reported(whole, method, 0.9), LABELS[method]
        drops = []
        for prior in SIZES:
            base, tuned = ([one.filter(prior=prior)[of].to_list() for one in runs] for of in ("base", "tuned"))
            choices = [4] * SIZES[prior] if prior == "sort" else None
            seen = transitions(base, tuned, 0.95, choices_N=choices)
            assert seen is not None
            lost = sum(b > t for bs, ts in zip(base, tuned, strict=True) for b, t in zip(bs, ts, strict=True))
            row = tables[f"{prior}, item by item"][label]
            assert row[:2] == [str(SIZES[prior]), f"{lost / 2:.1f}" if lost % 2 else str(lost // 2)]
            low, high = seen.lost.interval
            assert row[3] == f"{100 * lost / 2 / SIZES[prior]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            assert len(row) == (8 if prior == "sort" else 6)  # without answers to choose among there is no luck
            drops.append(np.mean(base) - np.mean(tuned))
        row = tables["All prior tasks, item by item"][label]
        assert row[0] == "new ≥ 90%"
        assert row[2:4] == ["2", "80"]
        assert row[-1].startswith(f"{100 * np.mean(drops):+.1f} [".replace("-", "−"))


def test_the_verdict_is_by_the_interval_of_the_net_drop(whole: Path) -> None:
    shown = section(study_in(whole))
    fell, _, open_ = shown.finding.partition("; cannot be told: ")
    for label, row in cells(shown.tables[0]).items():
        low = float(re.findall(r"\[(.*?),", row[-1])[0].replace("−", "-"))
        assert (f"{label} (" in fell) == (low > 0)
        assert (f"{label} (" in (open_ or shown.finding)) == (low <= 0) or not open_
    panel = shown.figure.panels[0]
    marks = next(layer for layer in panel.layers if isinstance(layer, Points) and layer.label.startswith("mean over"))
    assert marks.interval is not None
    assert panel.y.ticks is not None
    names = [name for _, name in panel.y.ticks]
    for x, low, high, name in zip(marks.x, marks.interval.low, marks.interval.high, names, strict=True):
        told = cells(shown.tables[0])[name][-1].replace("−", "-").replace("+", "")
        assert told == f"{x:.1f} [{low:.1f}, {high:.1f}]"


def test_what_never_gets_there_is_shown_at_its_last_checkpoint(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", thresholds=[0.99])
    shown = section(study_in(folder))
    assert "at the last checkpoint" in shown.finding
    rows = cells(shown.tables[0])
    assert {row[0] for row in rows.values()} == {"the last"}
    table = pl.read_parquet(folder / "records.parquet")
    ends = table.filter(pl.col("method") == "grpo", pl.col("step") == 6)
    best = [max(ends.filter(seed=seed)["new"].to_list()) for seed in (0, 1)]
    assert rows["GRPO"][1] == f"{50 * sum(best):.1f}"


def test_a_method_that_gets_there_in_no_seed_is_told_apart_from_those_that_do(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(whole, folder)
    table = pl.read_parquet(folder / "records.parquet")
    table.filter((pl.col("method") != "grpo") | (pl.col("new") < 0.7)).write_parquet(folder / "records.parquet")
    shown = section(study_in(folder))
    assert "at new ≥ 90%, item by item" in shown.finding
    assert shown.finding.count("at its last checkpoint") == shown.finding.count("GRPO at its last checkpoint (") == 1
    where = {label: row[0] for label, row in cells(shown.tables[0]).items()}
    assert where == {"GRPO": "the last", "SFT, one answer": "new ≥ 90%", "1-0 REINFORCE": "new ≥ 90%"}


def test_a_method_that_gets_there_in_some_seeds_is_said_to_be_judged_on_those(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "partial", seeds=3, thresholds=[0.9])
    table = pl.read_parquet(folder / "records.parquet")
    too_good = (pl.col("method") == "grpo") & (pl.col("seed") > 0) & (pl.col("new") >= 0.9)
    table.filter(~too_good).write_parquet(folder / "records.parquet")
    shown = section(study_in(folder))
    rows = cells(shown.tables[0])
    assert {label: row[:3:2] for label, row in rows.items()} == {
        "GRPO": ["new ≥ 90%", "1 of 3"],
        "SFT, one answer": ["new ≥ 90%", "3"],
        "1-0 REINFORCE": ["new ≥ 90%", "3"],
    }
    assert re.findall(r"(\S+) \([^()]*; 1 of 3 seeds\)", shown.finding) == ["GRPO"]
    assert shown.finding.count(" seeds") == 1
    assert "some of the seeds alone, as they have no such checkpoint in the others: GRPO on 1 of 3." in shown.note
    assert "All prior tasks of all methods are counted." not in shown.note


def test_sequences_that_did_not_end_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "stages"
    rows: list[dict[str, Any]] = []
    for row in (
        make_table(methods=("grpo", "sft-one"), seeds=2).filter(pl.col("run_id").str.contains(" [01] ")).to_dicts()
    ):
        stage = int(row["run_id"].split()[1]) + 1 if row["method"] != "base" else 1
        if stage == 1 or row["run_id"] == "grpo 1 0":
            rows.append({**row, "order": "1", "stage": stage, "task": f"task {stage}"})
    make_folder(folder, pl.DataFrame(rows, infer_schema_length=None))
    write(folder, "grpo 1 0", outcomes("grpo 1 0", 6))
    shown = section(study_in(folder))
    assert cells(shown.tables[0])["GRPO"][2] == "1 of 2"
    assert "some of the sequences alone, as they have no such checkpoint in the others: GRPO on 1 of 2." in shown.note
    assert "SFT, one answer: not counted, as no run has such a checkpoint." in shown.note


def changed(folder: Path, run_id: str, how: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    path = folder / "runs" / run_id / items_file.NAME
    path.write_bytes(items_file.to_bytes(how(pl.read_parquet(path))))


def test_what_is_missing_is_said_in_a_sentence(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    shutil.copytree(whole, folder)
    study = study_in(folder)
    assert "All prior tasks of all methods are counted." in section(study).note
    for path in (folder / "runs").glob("grpo *"):
        (path / items_file.NAME).unlink()
    for path in (folder / "runs").glob("sft-one * 1"):
        (path / items_file.NAME).unlink()
    for path in (folder / "runs").glob("reinforce * 0"):
        other = pl.when(pl.col("item") == "3-copy").then(pl.lit("3-new")).otherwise("item")
        changed(folder, path.name, lambda table, other=other: table.with_columns(item=other))  # type: ignore[misc]
    assert applies(study)
    shown = section(study)
    assert "copy is not counted of 1-0 REINFORCE: its items are not the same in all runs." in shown.note
    assert "1 of 2 of SFT, one answer" in shown.note
    assert "Of no run of GRPO is it known what became of the items." in shown.note
    assert set(cells(shown.tables[0])) == {"SFT, one answer", "1-0 REINFORCE"}
    assert cells(shown.tables[0])["SFT, one answer"][2] == "1 of 2"
    assert cells(shown.tables[0])["1-0 REINFORCE"][3] == "30"


def test_where_nothing_can_be_counted_the_page_is_made_all_the_same(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    shutil.copytree(whole, folder)
    for path in (folder / "runs").iterdir():
        changed(folder, path.name, lambda table: table.with_columns(base=pl.lit(None, pl.Float64)))
    results = load(folder, {"items": KINDS["items"]})
    assert [one.finding for one in results.sections] == ["Nothing can be counted item by item."]
    assert "the outcomes of some of its items are not known" in results.sections[0].note
    write_report(results)


def test_a_folder_without_items_has_no_such_section(whole: Path, tmp_path: Path) -> None:
    make_folder(tmp_path, make_table(methods=METHODS))
    assert not applies(study_in(tmp_path))
    assert not applies(replace(study_in(whole), store=None))
    assert load(tmp_path, {"items": KINDS["items"]}).sections == []


HOSTILE = "What is <script>alert(1)</script> | `x` [a](b)\n\x1b[31m {{ 7 * 7 }} $a$?"


def test_the_items_lost_most_surely_are_shown_by_what_they_ask_and_as_text(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "asked"
    shutil.copytree(whole, folder)
    unnamed = section(study_in(folder)).tables[-1]
    assert len(unnamed.rows) == 10
    assert all(re.fullmatch(r"(copy|sort), item \d+-(copy|sort)", row[1]) for row in unnamed.rows)
    asked = outcomes("base 0 0", 0).select("prior", "task", "item", prompt=pl.lit(HOSTILE))
    some = pl.when(pl.col("prior") == "sort").then(pl.lit(["one", "t<i>wo", "three", "four"]))
    write(folder, "base 0 0", asked.with_columns(answers=some), items_file.QUESTIONS)
    found = section(study_in(folder)).tables[-1]
    shown = r"What is <script>alert(1)</script> | `x` [a](b) \x1b[31m {{ 7 * 7 }} $a$?"
    assert {row[1] for row in found.rows} == {shown}
    choosing = [(row, before) for row, before in zip(found.rows, unnamed.rows, strict=True) if row[0] == "sort"]
    assert choosing
    for row, before in choosing:
        names = {f"no. {place}": text for place, text in enumerate(("one", "t<i>wo", "three", "four"), 1)}
        assert row[2:4] == [names[before[2]], names[before[3]]]
        assert row[5] == "4"  # from 2 above the best wrong answer to 2 below
    results = load(folder, {"items": KINDS["items"]})
    page = write_report(results).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert(1)" not in page
    monkeypatch.setattr("rlrazor.report.markdown.drawing.save", lambda *_, **__: None)
    notes = write_markdown(results, tmp_path / "notes").read_text()
    assert r"\<script\>alert(1)\</script\> \| \`x\` \[a\](b)" in notes


def test_who_lost_an_item_is_told_with_the_seeds(whole: Path) -> None:
    rows = section(study_in(whole)).tables[-1].rows
    by = {method: reported(whole, method, 0.9) for method in METHODS}
    for prior, name, *_, who, _ in rows:
        item = name.removeprefix(f"{prior}, item ")
        lost = {
            method: sum(one.row(by_predicate=pl.col("item") == item, named=True)["tuned"] == 0 for one in runs)
            for method, runs in by.items()
        }
        was_right = [one.row(by_predicate=pl.col("item") == item, named=True)["base"] for one in by["grpo"]]
        if was_right == [1, 1] and sum(lost.values()) < 6:
            assert who == ", ".join(f"{LABELS[method]} ({count} of 2)" for method, count in lost.items() if count)


def test_stages_are_looked_at_where_the_last_one_ends(tmp_path: Path) -> None:
    folder = tmp_path / "stages"
    rows: list[dict[str, Any]] = []
    for row in make_table(methods=("grpo",), seeds=2).filter(pl.col("run_id").str.contains(" [012] ")).to_dicts():
        stage = int(row["run_id"].split()[1]) + 1 if row["method"] != "base" else 1
        rows.append({**row, "order": "1", "stage": stage, "task": f"task {stage}"})
    make_folder(folder, pl.DataFrame(rows, infer_schema_length=None))
    for run_id in ("grpo 2 0", "grpo 2 1"):
        write(folder, run_id, pl.concat([outcomes(run_id, step) for step in range(1, 7)]))
    shown = section(study_in(folder))
    assert "at the end of the last stage" in shown.finding
    ends = pl.concat([outcomes(run_id, 6) for run_id in ("grpo 2 0", "grpo 2 1")])
    (told,) = cells(shown.tables[0]).values()
    assert told[0] == "the end of the last stage"
    assert told[4] == f"{ends.filter(pl.col('base') > pl.col('tuned')).height / 2:g}"
    assert "It is the last checkpoint of the last stage" in shown.note


def test_the_tables_show_what_that_of_compare_shows_and_counts(whole: Path) -> None:
    run = reported(whole, "grpo", 0.9)[0].filter(prior="sort")
    seen = transitions(run["base"].to_numpy(), run["tuned"].to_numpy(), 0.95, choices_N=[4] * len(run))
    assert seen is not None
    columns = items._columns(lambda of: of, [seen])
    told = {column.header: str(column.of(seen)).replace("−", "-").replace("+", "") for column in columns}
    counts = [told.pop(of) for of in ("lost", "gained")]
    assert counts == [str(seen.lost.count), str(seen.gained.count)]
    assert told == dict(zip(HEADERS[1:], shown_changes(seen), strict=True))


def test_every_name_in_the_text_is_known(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "read_prose", lambda path, numbers: read_prose(path, numbers, None))
    assert "{{" not in section(study_in(whole)).note


def test_the_report_of_the_runs_that_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/language/smollm2/README.md has the counts."""
    shutil.copytree(KEPT, tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--json"]) == 0
    assert set(json.loads((KEPT / "config.json").read_text())["drift"]) <= set(DRIFT)
    found = json.loads(capsys.readouterr().out)["sections"]["items"]
    for label, lost, gained in (("SFT on fixed", 17, 8), ("GRPO", 8, 2), ("1-0 REINFORCE", 6, 2)):
        assert f"{label} (+" in found["finding"]
        assert f"lost {lost}, gained {gained} of 684)" in found["finding"]
    first = found["tables"][0]
    beyond = first["headers"].index("lost beyond luck, %")
    assert {row[beyond] for row in first["rows"]} == {WITHIN_LUCK}
    assert [table["title"] for table in found["tables"]][-2:] == ["mmlu by category, item by item", "Lost most surely"]
    assert (tmp_path / "run" / "figures" / "items.png").exists()
    assert items.NAME in KINDS


def test_the_noise_floor_is_beside_every_drop_where_it_was_measured(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert "--noise-floor" in section(study_in(folder)).note
    floor.write(folder, floor.Floor(of="0" * 16, how=["in bfloat16"], tasks={"copy": 0.02, "sort": 0.004}, mean=0.01))
    made = section(study_in(folder))
    assert "from itself, in bfloat16." in made.note
    of_all, of_copy, of_sort, *_ = made.tables
    for table, shown in ((of_all, "+1.0"), (of_copy, "+2.0"), (of_sort, "+0.4")):
        assert {row[table.headers.index("noise floor, points")] for row in table.rows} == {shown}
