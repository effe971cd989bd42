"""Local files of every kind give the same rows; a mistake names file, row and remedy."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sources import SourceConfig, list_files, read_rows
from utils.config import ConfigError

ROWS = [f"document {i}\nwith two lines" for i in range(1000)]


def source(path, **changes) -> SourceConfig:
    return SourceConfig(**{"name": "s", "path": str(path), "weight": 1.0} | changes)


def write(path, rows=ROWS, field="text"):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({field: rows, "id": range(len(rows))}), path, row_group_size=300)
        return path
    data = "".join(json.dumps({field: r}) + "\n" for r in rows).encode()
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=compression) as stream:
        stream.write(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet"])
@pytest.mark.parametrize("start", [0, 1, 299, 300, 999, 1000])
def test_every_kind_of_file_gives_its_rows_from_any_row_on(tmp_path, name, start):
    config = source(write(tmp_path / name))
    (file,) = list_files(config)
    assert list(read_rows(config, file, start)) == ROWS[start:]


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    config = source(tmp_path)
    assert [list(read_rows(config, f)) for f in list_files(config)] == [["one\n\ntwo"], ["three"]]


def test_folders_and_globs_in_a_fixed_order(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.md"):
        write(tmp_path / name, ROWS[:2])
    assert [f.name for f in list_files(source(tmp_path))] == ["a.parquet", "b.jsonl"]
    assert [f.name for f in list_files(source(tmp_path / "*.jsonl"))] == ["b.jsonl"]


def test_a_changed_file_has_another_revision(tmp_path):
    path = write(tmp_path / "a.jsonl")
    (before,) = list_files(source(path))
    write(path, ["x", *ROWS[1:]])
    assert list_files(source(path))[0].revision != before.revision


def test_empty_and_null_rows_are_empty_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n{"text": null}\n{"text": "x"}\n')
    config = source(path)
    assert list(read_rows(config, list_files(config)[0])) == ["", "", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n{"tex', "row 1 is no valid JSON"),
        (b'{"content": "x"}\n', "has no field 'text'; it has 'content'. Set the source's text_f"),
        (b'{"text": 5}\n', "row 0: field 'text' holds a int"),
        (b'["x"]\n', "row 0 is a list"),
    ],
)
def test_broken_rows_name_file_and_row(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    config = source(path)
    with pytest.raises(ConfigError, match=message):
        list(read_rows(config, list_files(config)[0]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_said(tmp_path, name):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-200])
    config = source(path)
    with pytest.raises(ConfigError, match="damaged"):
        list(read_rows(config, list_files(config)[0]))


@pytest.mark.parametrize("path", ["nowhere.jsonl", "builtin:poetry"])
def test_a_source_that_is_not_there(tmp_path, path):
    with pytest.raises(ConfigError, match=r"no documents at|is none of"):
        list_files(source(path if ":" in path else tmp_path / path))


def test_files_of_unknown_kinds_are_told_of_once(tmp_path, capsys):
    for name in ("a.jsonl", "b.csv", "c.md", "d.pdf", "e.pdf"):
        (tmp_path / name).write_text("")
    source = SourceConfig(name="s", path=str(tmp_path), weight=1.0)
    assert [Path(file.path).name for file in list_files(source)] == ["a.jsonl"]
    list_files(source)
    told = "warning: source 's': not read, of no known kind: 4 file(s) (b.csv, c.md, d.pdf, ...)\n"
    assert capsys.readouterr().out == told
