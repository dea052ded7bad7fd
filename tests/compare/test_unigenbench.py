"""UniGenBench's prompt files, in the layouts the benchmark publishes."""

import csv
import json
import logging

import pytest

from visalign.data import PromptError, load_prompts

POINTS = {"Primary Categories": "Creative Divergence", "Subjects": "Animal", "Testpoints": ["Style", "Attribute - Quantity"],
          "Testpoint Description": ["ink painting", "two pandas"]}
CHINESE = {"一级垂类": "创意发散", "考点": ["风格"], "考点对应描述": ["\"古典水墨画\""]}


def write(path, rows, columns=("index", "prompt_en", "sub_dims_en")):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([number, text, json.dumps(points, ensure_ascii=False) if isinstance(points, dict) else points]
                         for number, text, points in rows)
    return path


@pytest.mark.parametrize("columns", [("index", "prompt_en", "sub_dims_en"), ("index", "prompt", "sub_dims")])
def test_points_and_their_descriptions_become_metadata(columns, tmp_path):
    (found,) = load_prompts(write(tmp_path / "p.csv", [(7, "two pandas, \"ink\" painting,\nby night", POINTS)], columns))
    assert found.text == "two pandas, \"ink\" painting,\nby night"
    assert found.metadata == {
        "index": "7", "Primary Categories": "Creative Divergence", "Subjects": "Animal",
        "testpoints": [{"dimension": "Style", "description": "ink painting"},
                       {"dimension": "Attribute - Quantity", "description": "two pandas"}]}


def test_the_chinese_file_too(tmp_path):
    (found,) = load_prompts(write(tmp_path / "p.csv", [(0, "熊猫", CHINESE)], ("index", "prompt_zh", "sub_dims_zh")))
    assert found.metadata["testpoints"] == [{"dimension": "风格", "description": "\"古典水墨画\""}]
    assert found.metadata["一级垂类"] == "创意发散"


def test_every_bad_row_is_named(tmp_path):
    rows = [(0, "a", POINTS), (1, "", POINTS), (2, "b", "{not json"), (3, "c", {**POINTS, "Testpoints": []}),
            (4, "d", {**POINTS, "Testpoint Description": ["one"]}), (5, "e", {"Testpoint Description": ["one"]})]
    with pytest.raises(PromptError) as caught:
        load_prompts(write(tmp_path / "p.csv", rows))
    assert len(caught.value.problems) == 5
    for part in ("row 1: the prompt is empty", "row 2: sub_dims is not JSON", "row 3: 'Testpoints' must be a list",
                 "row 4: 2 test points and 1 descriptions", "row 5: 'Testpoints' must be a list of texts, got None"):
        assert part in str(caught.value)


def test_descriptions_of_no_point_are_told_and_left_out(tmp_path, caplog):
    extra = {**POINTS, "Testpoint Description": ["ink painting", "two pandas", "nobody's"]}
    with caplog.at_level(logging.WARNING):
        (found,) = load_prompts(write(tmp_path / "p.csv", [(3, "a", extra)]))
    assert len(found.metadata["testpoints"]) == 2
    assert "prompt 3 has 2 test points and 3 descriptions" in caplog.text


def test_other_tables_are_refused_with_what_was_expected(tmp_path):
    with pytest.raises(PromptError, match="columns index, caption; expected UniGenBench's"):
        load_prompts(write(tmp_path / "p.csv", [], ("index", "caption")))
    with pytest.raises(PromptError, match="no rows"):
        load_prompts(write(tmp_path / "q.csv", []))
    (tmp_path / "r.csv").write_bytes("index,prompt,sub_dims\n0,caf\xe9,{}\n".encode("latin-1"))
    with pytest.raises(PromptError, match="not a CSV file in UTF-8"):
        load_prompts(tmp_path / "r.csv")
