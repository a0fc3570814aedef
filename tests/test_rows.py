"""Files as people have them: whatever their name, they are read as what they are, or refused."""

import codecs
import gzip
import io
import json
import os
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from datasets import Dataset, DatasetDict

from rlrazor.errors import RazorError
from rlrazor.system.rows import read_located

ROWS: list[dict[str, Any]] = [
    {"prompt": 'two\nlines, "quoted"', "completion": "1"},
    {"prompt": "naïve 漢字", "completion": "2"},
]
LINES = "\n".join(map(json.dumps, ROWS))
CSV = 'prompt,completion\r\n"two\nlines, ""quoted""",1\r\n\r\nnaïve 漢字,2\r\n'


def read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_located(path, line="prompt")]


@pytest.mark.parametrize(
    "text", [LINES, "\n" + LINES.replace("\n", "\r\n\r\n"), json.dumps(ROWS), json.dumps(ROWS, indent=2), CSV]
)
@pytest.mark.parametrize("name", ["prompts", "prompts.txt", "prompts.jsonl.bak", "prompts.csv", "PROMPTS.DATA"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_a_file_is_is_told_by_its_content(tmp_path: Path, text: str, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["rows.parquet", "rows", "rows.txt"])
def test_parquet_whatever_its_name(tmp_path: Path, name: str) -> None:
    pl.DataFrame(ROWS).write_parquet(tmp_path / name)
    assert read(tmp_path / name) == ROWS
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RazorError, match="is damaged: it begins as Parquet"):
        read(tmp_path / name)


@pytest.mark.parametrize(("delimiter", "name"), [("\t", "a.tsv"), ("\t", "a.txt"), (";", "a.csv"), (";", "a")])
def test_tables_of_other_delimiters(tmp_path: Path, delimiter: str, name: str) -> None:
    out = io.StringIO()
    pl.DataFrame(ROWS).write_csv(out, separator=delimiter)
    (tmp_path / name).write_text(out.getvalue(), encoding="utf-8")
    assert read(tmp_path / name) == ROWS
    assert [where for where, _ in read_located(tmp_path / name)] == [f"{tmp_path / name}, line {n}" for n in (2, 4)]


def test_a_table_of_one_column_and_of_long_cells(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("prompt\nabc\n \n" + "d" * 300_000)
    assert read(file) == [{"prompt": "abc"}, {"prompt": "d" * 300_000}]
    (tmp_path / "b.tsv").write_text("prompt\none, two\nthree")
    assert read(tmp_path / "b.tsv") == [{"prompt": "one, two"}, {"prompt": "three"}]


def test_lines_are_what_remains(tmp_path: Path) -> None:
    texts = [
        "[INST] one [/INST]",
        "{name} went, and",
        "[1] two\u2028b",
        "Text: a, b; c",
        "he said: hi",
        '"Hi," she said',
    ]
    texts += ["prompting", "a text", "- [ ] three", "[ ] four", "Prompt: five", "prompt: six"]
    texts += ["In this context, answer", "question"]
    for first in texts:
        lines = [first, *(text for text in texts if text != first)]
        file = tmp_path / "a.txt"
        file.write_bytes(codecs.BOM_UTF8 + ("\r\n \r\n".join(lines) + "\n").encode())
        assert read(file) == [{"prompt": line} for line in lines]
        assert read_located(file, line="text")[1] == (f"{file}, line 3", {"text": lines[1]})
    with pytest.raises(RazorError, match="none of what can be read: give JSON Lines"):
        read_located(tmp_path / "a.txt")
    # Of two files with a mark each, put one after the other.
    (tmp_path / "b").write_bytes(codecs.BOM_UTF8 + b"one\n" + codecs.BOM_UTF8 + b"two")
    assert read(tmp_path / "b") == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "c.jsonl").write_text('"one"\n"two"')
    assert read(tmp_path / "c.jsonl") == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "d").write_text('["one",\n "two"]')
    assert read(tmp_path / "d") == [{"prompt": "one"}, {"prompt": "two"}]


@pytest.mark.parametrize("name", ["a", "a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINES + '\n{"prompt": "a', "line 3: not JSON"),
        (LINES + "\nplain text", "line 3: not JSON"),
        (LINES + "\n[1]", "line 3: not a JSON object"),
        ("{'prompt': 'as Python writes it'}", "line 1: not JSON"),
        ("{prompt: as YAML does}", "line 1: not JSON"),
        (json.dumps(ROWS, indent=1)[:-1], "not JSON"),
        ('[{"prompt": "a"}]\n[{"prompt": "b"}]', "not JSON"),
        ('[{"prompt": "a"}, 3]', "row 2: not a JSON object"),
        ("[]", "is empty"),
        ("", "is empty: it has no rows"),
        (" \n\n", "is empty"),
    ],
)
def test_damaged_json_is_never_text(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RazorError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# prompts\n" + LINES, "line 2: a JSON object, and the file begins as text"),
        ("one\n\n" + json.dumps(ROWS), "line 3: a JSON object"),
        ('"one"\n"two"', "every line is in quotation marks"),
        ("prompt,completion\na", "line 2: 1 cells under 2 columns"),
        ("prompt\na, b", "line 2: 2 cells under 1 columns"),
        ('prompt,completion\n"a\nb,1\n', r"line 2: not a row of a table \(unexpected end of data\)"),
        ("prompt,prompt\na,b", "two columns have one name"),
        ("prompt,completion\n", "is empty"),
        ("<html><body>", "none of what can be read"),
        ('<?xml version="1.0"?>', "none of what can be read"),
        ("- prompt: a\n- prompt: b", "none of what can be read"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS has not fetched"),
        ("a\0b", "it is binary"),
    ],
)
def test_what_looks_like_another_format_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a").write_text(text)
    with pytest.raises(RazorError, match=message):
        read(tmp_path / "a")


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(LINES.encode()))
    with zipfile.ZipFile(tmp_path / "b", "w") as archive:
        archive.writestr("a.jsonl", LINES)
    (tmp_path / "c").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "d").write_bytes("abc".encode("utf-16-le"))
    (tmp_path / "e.parquet").write_text("abc")
    (tmp_path / "f.jsonl").write_text("abc")
    refused = {"a": "compressed by gzip", "b": "a zip archive", "c": "not UTF-8", "d": "binary", "e.parquet": "none of"}
    for name, message in (refused | {"f.jsonl": "line 1: not JSON", "g": "There is no"}).items():
        with pytest.raises(RazorError, match=message):
            read(tmp_path / name)


def test_a_table_without_the_column_is_a_table(tmp_path: Path) -> None:
    for name, text in (
        ("a.csv", "x,y\n1,2"),
        ("b", "Question,Answer\n1,2"),
        ("c", "id\tinstruction\n1\t2"),
        ("d", "Question,The answer\n1,2"),
    ):
        (tmp_path / name).write_text(text)
        (row,) = read(tmp_path / name)
        assert list(row.values()) == ["1", "2"]
        assert "prompt" not in row


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(LINES))
    writer.start()
    assert read(pipe) == ROWS
    writer.join()


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "b.jsonl").write_text(json.dumps(ROWS[1]))
    pl.DataFrame(ROWS[:1]).write_parquet(folder / "a.parquet")
    (folder / "README.md").write_text("# prompts")
    (folder / ".hidden.jsonl").write_text("{")
    assert read(folder) == ROWS
    assert [row for _, row in read_located(folder, "*.jsonl")] == ROWS[1:]
    for name in ("train-00000-of-00001.jsonl", "test.jsonl"):
        (folder / name).write_text(LINES)
    with pytest.raises(RazorError, match="holds files of test and train: give one of them"):
        read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RazorError, match=r"holds no file named like \*\.json or "):
        read(tmp_path / "empty")


def test_what_datasets_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.with_format("torch").save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "single")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "single", tmp_path / "two" / "train"):
        assert read(folder) == ROWS
    monkeypatch.chdir(tmp_path)
    for name in ("~", "a[1-2]*"):
        assert read((tmp_path / "single" / "train").rename(tmp_path / name).relative_to(tmp_path)) == ROWS
        (tmp_path / name).rename(tmp_path / "single" / "train")
    with pytest.raises(RazorError, match=r"holds train and test: give one of them, such as .*two/train"):
        read(tmp_path / "two")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(RazorError, match="saved by the library datasets and cannot be read"):
        read(tmp_path / "one")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RazorError, match="pip install datasets"):
        read(tmp_path / "single")


@pytest.mark.parametrize(
    "text",
    [
        "prompts:\n  - what is a?\n  - what is b?\n", "---\nprompts:\n- a\n", "- role: user\n  content: hi\n",
        '[[prompts]]\ntext = "what is a?"\n', "[prompts]\nfirst = what\n",
        "| prompt | answer |\n|---|---|\n| a | b |\n", "<rows>\n<row>a</row>\n</rows>\n",
    ],
    ids=["yaml", "yaml document", "yaml turns", "toml", "ini", "markdown", "xml"],
)  # fmt: skip
def test_other_formats_are_not_lines_of_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(RazorError, match="is none of what can be read"):
        read_located(tmp_path / "prompts", line="prompt")


def test_what_only_begins_like_another_format_is_text(tmp_path: Path) -> None:
    lines = ["<s>[INST] what is a? [/INST]", "<|user|>what is b?", "- what is c?", "[a] b", "Question: what?", "a | b"]
    for line in lines:
        (tmp_path / "prompts.txt").write_text(line + "\nwhat is d?\n")
        found = read_located(tmp_path / "prompts.txt", line="prompt")
        assert [row["prompt"] for _, row in found] == [line, "what is d?"]
    for name in ("prompts.yaml", "prompts.toml", "prompts.html"):
        (tmp_path / name).write_text("what is d?\n")
        with pytest.raises(RazorError, match="is none of what can be read"):
            read_located(tmp_path / name, line="prompt")


@pytest.mark.parametrize("header", ["Prompt,Answer", "PROMPT|ANSWER", "Prompt;Answer", "prompt\tanswer"])
def test_headers_are_read_as_people_write_them(tmp_path: Path, header: str) -> None:
    delimiter = next(one for one in ",|;\t" if one in header)
    (tmp_path / "prompts.txt").write_text(f"{header}\nwhat is a?{delimiter}1\nwhat is b?{delimiter}2\n")
    assert [row["prompt"] for _, row in read_located(tmp_path / "prompts.txt")] == ["what is a?", "what is b?"]
