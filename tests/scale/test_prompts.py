"""Prompt lists from every kind of file, and what is said of those that cannot be read."""

import csv
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scale.prompts import Record, read_classes, read_records

PROMPTS = ["a red fox", "两只猫", 'quotes " and, commas', "a\u2028line separator inside"]
RECORDS = [Record(prompt) for prompt in PROMPTS]


def json_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(PROMPTS) + "\n  \n").encode())
    assert read_records(path) == RECORDS
    assert read_records(str(path)) == RECORDS


@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_json_lines(tmp_path: Path, column: str) -> None:
    path = json_lines(tmp_path / "p.jsonl", [{column: prompt, "other": 1} for prompt in PROMPTS])
    assert read_records(path, column) == RECORDS


def test_a_list_of_the_hpsv2_benchmark(tmp_path: Path) -> None:
    (tmp_path / "anime.json").write_text(json.dumps(PROMPTS, ensure_ascii=False), encoding="utf-8")
    assert read_records(tmp_path / "anime.json") == RECORDS


def test_the_table_of_oneig_bench(tmp_path: Path) -> None:
    path = tmp_path / "OneIG-Bench.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["category", "id", "prompt_en"])
        table.writerows(["Portrait", f"{number:03d}", prompt] for number, prompt in enumerate(PROMPTS))
    assert read_records(path, "prompt_en") == RECORDS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "p.parquet"
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"caption": PROMPTS, "width": list(range(4))}), path)
    assert read_records(path, "caption") == RECORDS
    with pytest.raises(ValueError, match=r"p.parquet has no column 'captions'; did you mean 'caption'\?"):
        read_records(path, "captions")
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="is not parquet"):
        read_records(path)


class HubData(list[dict[str, object]]):
    """What `datasets` makes of a split, as far as it is used."""

    column_names = ("caption", "image")

    def select_columns(self, names: list[str]) -> list[dict[str, object]]:
        return [{name: row[name] for name in names} for row in self]


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load_dataset(name: str, split: str) -> HubData:
        if name != "someone/captions":
            raise FileNotFoundError(f"{name} is not on the hub")
        assert split == "train"
        return HubData({"caption": prompt, "image": object()} for prompt in PROMPTS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    assert read_records("someone/captions", "caption") == RECORDS
    with pytest.raises(ValueError, match="someone/captions has no column 'prompt'; it has caption, image"):
        read_records("someone/captions")
    with pytest.raises(ValueError, match="'someone/else' is no file, and no data set that can be loaded"):
        read_records("someone/else")
    with pytest.raises(ValueError, match="images come with JSON lines, CSV or parquet, not with the data set"):
        read_records("someone/captions", "caption", "image")


@pytest.mark.parametrize(
    ("name", "source", "package"), [("pyarrow", "p.parquet", "pyarrow"), ("datasets", "org/name", "datasets")]
)
def test_what_to_install_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, source: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    Path("p.parquet").touch()
    with pytest.raises(ImportError, match=f"run `pip install {package}`"):
        read_records(source)


def test_images_are_named_from_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "fox.png"
    image.touch()
    path = json_lines(tmp_path / "p.jsonl", [{"prompt": "a fox", "image": "images/fox.png"}])
    monkeypatch.chdir(tmp_path / "images")
    assert read_records(path, image_column="image") == [Record("a fox", image)]
    assert read_records(path) == [Record("a fox")]
    json_lines(path, [{"prompt": "a fox", "image": "images/fox.png"}, {"prompt": "a cat", "image": "cat.png"}])
    with pytest.raises(ValueError, match=r"line 2: there is no image '.*cat.png'"):
        read_records(path, image_column="image")
    json_lines(path, [{"prompt": "a fox", "image": {"bytes": "..."}}])
    with pytest.raises(ValueError, match="line 1: image must be the path of an image, got dict"):
        read_records(path, image_column="image")
    text = tmp_path / "p.txt"
    text.write_text("a fox")
    with pytest.raises(ValueError, match=r"images come with JSON lines, CSV or parquet, and .* has prompts alone"):
        read_records(text, image_column="image")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("p.txt", "\n \n", "the prompt list .*p.txt has no prompts"),
        ("p.jsonl", "", "has no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', "line 2 has no column 'prompt'; did you mean 'promt'"),
        ("p.jsonl", '{"text": "a"}\n', "line 1 has no column 'prompt'; it has text"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1: prompt must be text, got 3"),
        ("p.jsonl", '{"prompt": "a"\n', "line 1 is not JSON"),
        ("p.jsonl", '"a"\n', "line 1 must be an object such as"),
        ("p.json", '{"prompt": "a"}', "must be a list such as .*, got a dict"),
        ("p.json", '["a", 3]', "prompt 2: prompt must be text, got 3"),
        ("p.json", '["a"', "is not JSON"),
        ("p.csv", "prompt_en,id\na,1\n", "has no column 'prompt'; did you mean 'prompt_en'"),
        ("p.csv", "", "has no column 'prompt'; it has none"),
        ("p.csv", "id,prompt\n1\n", "row 1: prompt must be text, got None"),
        ("p.tsv", "prompt\na\n", "must end in one of .txt, .jsonl, .ndjson, .json, .csv, .parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, contents: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(contents)
    with pytest.raises(ValueError, match=message) as error:
        read_records(path)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.txt' is no file, nor a data set such as org/name"):
        read_records(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="is no file"):
        read_records("missing.txt")
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        read_records(tmp_path)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("één".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_records(latin)


def test_classes_are_numbered_by_the_names_of_their_folders(tmp_path: Path) -> None:
    files = [
        "n02/b.JPEG",
        "n02/a.png",
        "n10/c.webp",
        "n01/d.jpg",
        "n01/.hidden.jpg",
        "n01/list.txt",
        ".git/e.png",
        "f.png",
    ]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    found = [(each.label, str(each.image.relative_to(tmp_path))) for each in read_classes(tmp_path, 3) if each.image]
    assert found == [(0, "n01/d.jpg"), (1, "n02/a.png"), (1, "n02/b.JPEG"), (2, "n10/c.webp")]
    with pytest.raises(ValueError, match="must have a subfolder for each of 1000 classes, got 3 subfolders"):
        read_classes(tmp_path, 1000)
    with pytest.raises(ValueError, match=r"the folder of images '.*f\.png' is not there"):
        read_classes(tmp_path / "f.png", 3)
    (tmp_path / "empty" / "one").mkdir(parents=True)
    with pytest.raises(ValueError, match="has subfolders without images"):
        read_classes(tmp_path / "empty", 1)
