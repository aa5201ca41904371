"""What the rows of published data sets look like, and the conversation that each stands for.

- LLaVA, and in its form ShareGPT4V and VILA's sets: `conversations`, turns {"from": "human" | "gpt", "value": text}
  with a placeholder <image> or <video> for each file in `image` or `video`, a path or a list of paths.
- LLaVA-NeXT's video sets: the same, with <image> for a video too; read so where a row has videos alone.
- Shot2Story (bytedance/Shot2Story, DATA.md): `video` and `whole_caption`, a summary. Its `captions` are of shots, files
  of their own, and `whole_ASR` is what is spoken: neither is read.
"""

import re
from typing import Any

from ..model.chat import Kind

KINDS: tuple[Kind, ...] = ("image", "video")
DESCRIBE = "<video>\nElaborate on the visual and narrative elements of the video in detail."  # VILA's for captions

Turns = list[Any]


def conversation(fields: dict[str, Any]) -> tuple[Turns, list[tuple[Kind, str]]]:
    """Turns in LLaVA's form, and kind and name of each file in the order of the placeholders.

    Raises ValueError, with the field, what is expected and what was found, where they do not match.
    """
    turns = _turns(fields)
    names = {kind: _names(fields, kind) for kind in KINDS}
    placeholders = _placeholders(turns)
    if names["video"] and not names["image"] and "video" not in placeholders:
        turns = [_video_for_image(turn) for turn in turns]
        placeholders = _placeholders(turns)
    for kind in KINDS:
        if (found := placeholders.count(kind)) != len(names[kind]):
            raise ValueError(
                f"{found} placeholders <{kind}> for {len(names[kind])} in field {kind!r}: one for each file is "
                f"expected, found {', '.join(names[kind]) or 'no file'}"
            )
    remaining = {kind: iter(names[kind]) for kind in KINDS}
    return turns, [(kind, next(remaining[kind])) for kind in placeholders]


def _turns(fields: dict[str, Any]) -> Turns:
    if isinstance(turns := fields.get("conversations"), list):
        return turns
    if "conversations" not in fields and isinstance(summary := fields.get("whole_caption"), str):
        return [{"from": "human", "value": DESCRIBE}, {"from": "gpt", "value": summary}]
    raise ValueError(
        "no list in field 'conversations', nor a text in 'whole_caption' instead: "
        f"the row has {', '.join(fields) or 'no fields'}"
    )


def _placeholders(turns: Turns) -> list[Kind]:
    text = " ".join(str(turn.get("value")) for turn in turns if isinstance(turn, dict))
    return re.findall("<(image|video)>", text)


def _video_for_image(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        return turn
    return {**turn, "value": turn["value"].replace("<image>", "<video>")}


def _names(fields: dict[str, Any], kind: Kind) -> list[str]:
    value = fields.get(kind)
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"field {kind!r} has {value!r}, neither a path nor a list of paths")
    return names
