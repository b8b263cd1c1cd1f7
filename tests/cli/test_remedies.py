"""What a refusal tells to do is done here, word for word, and it helps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import selkd
from tiny_run import make_recipe

from selkd.errors import InputError
from selkd.models.sources import locate
from selkd.models.tokenizers import load_tokenizer

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_selkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: selkd(monkeypatch, capsys, *arguments)


def test_a_damaged_file_of_a_run_is_made_anew_or_moved_away_first(run_selkd: Command, tmp_path: Path) -> None:
    recipe, run = tmp_path / "toy.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(make_recipe(tmp_path)))
    assert run_selkd("distill", recipe, "--out", run)[0] == 0
    damages = {"selection/examples.json": b"[]", "selection/samples.parquet": b"PAR1"}
    for name, content in damages.items():
        (run / name).write_bytes(content)
        code, _, err = run_selkd("report", run)
        assert (code, f"{run}: {name} changed since" in err) == (2, True)
        assert "`selkd distill` with the run's recipe makes it again, or says how it comes back" in err
        code, _, err = run_selkd("distill", recipe, "--out", run)
        if code == 2:
            assert (f"{run / name}" in err, "Move it away" in err) == (True, True)
            shutil.move(run / name, tmp_path / "away")
            code, _, err = run_selkd("distill", recipe, "--out", run)
        assert code == 0, (name, err)
        assert run_selkd("report", run)[0] == 0


def test_a_tokenizer_without_end_token_gets_a_padding_token(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    path = tmp_path / "teacher" / "tokenizer_config.json"
    content: dict[str, Any] = json.loads(path.read_text())
    bare = {key: value for key, value in content.items() if key not in ("eos_token", "pad_token", "unk_token")}
    path.write_text(json.dumps(bare))
    source = locate(str(tmp_path / "teacher"), tmp_path / "cache")
    with pytest.raises(InputError, match=f"Set pad_token in {path} to an existing token"):
        load_tokenizer(source)
    path.write_text(json.dumps(bare | {"pad_token": "w7"}))
    assert load_tokenizer(source).pad_token_id == 7
