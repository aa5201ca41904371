"""Rows of published data sets become conversations in LLaVA's form."""

from typing import Any

import pytest
from longtake.train.styles import DESCRIBE, conversation

SHOT2STORY = {
    "video": "v_1.mp4",
    "image_id": "v_1.mp4",
    "id": 0,
    "whole_caption": "A man cooks, then eats.",
    "whole_ASR": "hello",
    "nvid": "v_1.mp4",
    "video_names": ["v_1_0.mp4", "v_1_1.mp4"],
    "audio_captions": ["", ""],
    "captions": ["A man cooks.", "He eats."],
    "ASR": ["hello", ""],
}


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_sharegpt4v_is_llava() -> None:
    said = turns("Describe it.\n<image>", "A dog.", "Where ?", "At sea.")
    row = {"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": said}
    assert conversation(row) == (said, [("image", "coco/train2017/000000000009.jpg")])


def test_files_come_in_the_order_of_the_placeholders() -> None:
    said = turns("<image> then <video>", "a", "<image>", "b")
    row = {"image": ["a.png", "b.png"], "video": "c.mp4", "conversations": said}
    assert conversation(row) == (said, [("image", "a.png"), ("video", "c.mp4"), ("image", "b.png")])


@pytest.mark.parametrize("none", [{}, {"image": None}, {"image": []}])
def test_a_video_may_stand_where_image_is_written(none: dict[str, Any]) -> None:
    row = {"video": "a.mp4", "conversations": turns("<image>\nWhat ?", "red"), **none}
    assert conversation(row) == (turns("<video>\nWhat ?", "red"), [("video", "a.mp4")])
    assert row["conversations"][0]["value"] == "<image>\nWhat ?"  # the row is as it was


def test_it_may_not_where_the_row_has_images() -> None:
    row = {"video": "a.mp4", "image": "a.png", "conversations": turns("<image><image>", "red")}
    with pytest.raises(ValueError, match=r"2 placeholders <image> for 1 in field 'image'.* found a.png$"):
        conversation(row)


def test_shot2story_is_a_summary_of_its_video() -> None:
    assert conversation(SHOT2STORY) == (turns(DESCRIBE, "A man cooks, then eats."), [("video", "v_1.mp4")])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"video": None}, "1 placeholders <video> for 0 in field 'video': .*found no file"),
        ({"whole_caption": None}, "nor a text in 'whole_caption' instead: the row has video, image_id, id,"),
        ({"conversations": "none"}, "no list in field 'conversations'"),
        ({"video": {"path": "a"}}, "field 'video' has {'path': 'a'}, neither a path nor a list of paths"),
    ],
)
def test_a_row_that_is_not_in_its_style_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        conversation({**SHOT2STORY, **changed})
