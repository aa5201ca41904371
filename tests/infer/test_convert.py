"""`longtake convert`, there and back."""

from pathlib import Path

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.infer.convert import main
from longtake.infer.generate import check_files, load_engine
from longtake.model.config import ModelConfig
from longtake.model.official import load_official
from torch import nn

from tests.model.official_files import write_official
from tests.training_files import write_start


def differing(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Parameters that are not equal bit for bit, dtype included."""
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    return [n for n, p in ours.named_parameters() if p.dtype != expected[n].dtype or not torch.equal(p, expected[n])]


def test_official_to_ours_and_back_is_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official, ours, again = (tmp_path / name for name in ("official", "ours", "again"))
    write_official(official, kind="mlp_downsample_3x3_fix", dtype=torch.bfloat16)
    main([str(official), str(ours)])
    main([str(ours), str(again)])
    assert capsys.readouterr().out == f"wrote {ours}\nwrote {again}\n"
    expected, tokenizer = load_official(official, dtype=None)
    returned, its_tokenizer = load_official(again, dtype=None)
    assert not differing(returned, expected) and returned.config == expected.config == ModelConfig.load(ours)
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert its_tokenizer.chat_template == tokenizer.chat_template
    engine, _ = load_engine(ours, Mesh(alone=True))
    assert not differing(engine.model, expected.float())
    check_files(official, None)
    straight, its_tokenizer = load_engine(official, Mesh(alone=True))
    assert not differing(straight.model, engine.model) and straight.model.config == engine.model.config
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()


def test_ours_to_official_and_back_is_bit_for_bit(tmp_path: Path) -> None:
    ours, official, again = (tmp_path / name for name in ("ours", "official", "again"))
    write_start(ours)
    main([str(ours), str(official)])
    main([str(official), str(again)])
    expected, _ = load_engine(ours, Mesh(alone=True))
    returned, _ = load_engine(again, Mesh(alone=True))
    assert not differing(returned.model, expected.model)
    assert returned.model.config == expected.model.config


def test_options_change_what_they_say(tmp_path: Path) -> None:
    write_official(tmp_path / "official")
    options = ["--dtype", "bfloat16", "--no-newline", "--projector", "mlp_downsample_columns"]
    main([str(tmp_path / "official"), str(tmp_path / "ours"), *options])
    config = ModelConfig.load(tmp_path / "ours")
    assert (config.newline_token_id, config.projector.kind) == (None, "mlp_downsample_columns")
    main([str(tmp_path / "ours"), str(tmp_path / "again")])
    model, _ = load_official(tmp_path / "again", dtype=None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_is_no_checkpoint_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="in is not a checkpoint"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ValueError, match="out is there already: take another folder"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
