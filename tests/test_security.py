"""What docs/security.md says is never done is not done. What a recipe can run is in test_own_code.py."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chatty import PLAIN, chat_tokenizer
from resuming import make_trainer
from tiny_run import make_recipe, make_teacher

from selkd.data.corpus import open_corpus
from selkd.data.documents import Exchange
from selkd.data.encoding import Encoder
from selkd.errors import InputError
from selkd.models.loading import load_model, read_config
from selkd.models.sources import locate
from selkd.models.tokenizers import load_tokenizer
from selkd.recipe.data import DataOptions
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.training.sealing import seal


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.left),)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """The folder that code makes where it runs."""
    return tmp_path / "ran"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_models_own_code_is_never_run(tmp_path: Path, left: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    (teacher / "evil.py").write_text(f"import os\n\nos.mkdir({str(left)!r})\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change(teacher / "config.json", auto_map=auto_map)
    change(teacher / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    source = locate(str(teacher), tmp_path / "cache")
    assert type(load_model(source, torch.float32, torch.device("cpu"))).__name__ == "LlamaForCausalLM"
    load_tokenizer(source)
    change(teacher / "config.json", model_type="evil", architectures=["EvilForCausalLM"])
    unknown = locate(str(teacher), tmp_path / "cache")
    for read in (read_config, lambda source: load_model(source, torch.float32, torch.device("cpu"))):
        with pytest.raises(InputError):
            read(unknown)
    assert not left.exists()


def test_a_data_sets_own_code_is_never_run(tmp_path: Path, left: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "set.py").write_text(f"import os\n\nos.mkdir({str(left)!r})\n")
    with pytest.raises(InputError, match=r"data\.path"):
        list(open_corpus(parse_part(DataOptions, {"path": str(folder)})).documents())
    assert not left.exists()


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path, left: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    (teacher / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(left)))
    source = locate(str(teacher), tmp_path / "cache")
    load_model(source, torch.float32, torch.device("cpu"))
    (teacher / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pickled"):
        locate(str(teacher), tmp_path / "cache")
    assert not left.exists()


def test_the_trap_is_one(left: Path) -> None:
    pickle.loads(pickle.dumps(Trap(left)))
    assert left.exists()


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path, left: Path) -> None:
    trainer = make_trainer("top_k", tmp_path / "out", tmp_path / "shared", num_train_epochs=1)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        whole = (checkpoint / name).read_bytes()
        torch.save(Trap(left), checkpoint / name)
        seal(checkpoint)
        again = make_trainer("top_k", tmp_path / "out", tmp_path / "shared", num_train_epochs=2)
        if name == "training_args.bin":  # nobody reads it
            again.train(resume_from_checkpoint=str(checkpoint))
        else:
            with pytest.raises((InputError, pickle.UnpicklingError)):
                again.train(resume_from_checkpoint=str(checkpoint))
        assert not left.exists(), name
        (checkpoint / name).write_bytes(whole)


@pytest.mark.parametrize(
    "attempt",
    [
        "{{ cycler.__init__.__globals__.os.mkdir(LEFT) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir(LEFT) }}",
        "{% include LEFT %}",
    ],
)
def test_a_chat_template_has_no_access(attempt: str, tmp_path: Path, left: Path) -> None:
    (tmp_path / "file.txt").write_text("SECRET")
    tokenizer = chat_tokenizer(PLAIN + attempt.replace("LEFT", repr(str(left))))
    encoder = Encoder(parse_part(DataOptions, {"path": "x", "prompt_field": "q", "template": "chat"}), tokenizer)
    with pytest.raises(InputError, match="the chat template refuses"):
        encoder(Exchange("a question", "an answer"))
    assert not left.exists()


def test_a_recipes_template_is_text_but_for_its_two_places() -> None:
    template = "{{ 7 * 7 }} {0.__class__} {prompt} {% raw %} {completion}"
    options = parse_part(DataOptions, {"path": "x", "prompt_field": "q", "completion_field": "a", "template": template})
    tokenizer = chat_tokenizer()
    encoded = Encoder(options, tokenizer)(Exchange("Q", "A"))[0]
    assert tokenizer.decode(encoded.token_ids) == "{{ 7 * 7 }} {0.__class__} Q {% raw %} A<|im_end|>"
    with pytest.raises(InputError, match=r"data\.template"):
        parse_part(DataOptions, {"path": "x", "prompt_field": "q", "template": "{prompt.__class__} {completion}"})


def test_a_recipes_yaml_makes_plain_values_alone(tmp_path: Path, left: Path) -> None:
    recipe = tmp_path / "evil.yaml"
    for tag in ("os.mkdir", "os.system"):
        recipe.write_text(f"teacher: !!python/object/apply:{tag} ['{left}']\n")
        with pytest.raises(InputError, match=r"evil\.yaml"):
            load_recipe(recipe)
    with pytest.raises(InputError):
        load_recipe("demo", [f"seed=!!python/object/apply:os.mkdir ['{left}']"])
    assert not left.exists()


APART = """
import os, socket
from selkd.cli.main import main

def refuse(self, address):
    raise AssertionError(f"a connection to {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
os.umask(0o022)
main()
"""


def test_a_run_on_local_files_connects_to_nothing_and_writes_where_it_is_told(tmp_path: Path) -> None:
    """A whole run in a process of its own, with another home and an empty current folder."""
    inputs, here, home = tmp_path / "inputs", tmp_path / "here", tmp_path / "home"
    for folder in (inputs, here, home, tmp_path / "tmp"):
        folder.mkdir()
    recipe = make_recipe(inputs, cache={"path": str(tmp_path / "shared" / "cache")})
    recipe["samples"]["path"] = str(tmp_path / "shared" / "scores.parquet")
    (inputs / "toy.yaml").write_text(yaml.safe_dump(recipe))
    before = {path: path.stat().st_mtime_ns for path in inputs.rglob("*")}
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LANG")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {"HOME": str(home)}
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "SELKD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", APART, "distill", str(inputs / "toy.yaml"), "--out", str(tmp_path / "run")],
        capture_output=True, text=True, cwd=here, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in inputs.rglob("*")} == before
    assert list(here.iterdir()) == []
    assert {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()} <= {
        (".cache", "matplotlib")
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "inputs", "here", "home", "tmp", "shared", "cache", "run"
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"cache", "scores.parquet"}
    student = [path for path in (tmp_path / "run" / "student").rglob("*") if path.is_file()]
    assert {path.suffix for path in student} <= {".json", ".safetensors", ".md", ".jinja"}
    for folder in ("run", "shared", "cache"):
        rights = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / folder).rglob("*")}
        is_folder = {path.name: path.is_dir() for path in (tmp_path / folder).rglob("*")}
        assert not {name: oct(r) for name, r in rights.items() if r != (0o755 if is_folder[name] else 0o644)}
