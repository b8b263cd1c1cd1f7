"""The wheels of both distributions in an environment that has what they require, and nothing else.

No network and no second torch: the environment's packages are links to those of this one, found by walking the
requirements of the built wheel. What a part of selkd imports without requiring it is missing there.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_run import make_recipe

from selkd.extras import EXTRAS
from selkd.recipe.files import named_recipes

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = (ROOT, ROOT / "packages" / "selkd-cache")


def requirements(dist: Distribution) -> list[Requirement]:
    """What a distribution requires without extras on this machine."""
    found = [Requirement(text) for text in dist.requires or ()]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def required(wheels: list[Distribution]) -> dict[str, Distribution]:
    """All distributions of this environment that the wheels require, directly or not."""
    known: dict[str, Distribution] = {}
    queue = [each for wheel in wheels for each in requirements(wheel)]
    while queue:
        name = canonicalize_name(queue.pop().name)
        if name in known or name.startswith("selkd"):
            continue
        try:
            known[name] = distribution(name)
        except PackageNotFoundError:  # of another platform, as an accelerator's libraries
            continue
        queue += requirements(known[name])
    return known


def link(dist: Distribution, site: Path) -> None:
    """Link the folders and files that a distribution put into its site-packages."""
    for top in {Path(file).parts[0] for file in dist.files or () if ".." not in Path(file).parts}:
        source, target = Path(str(dist.locate_file(top))), site / top
        if source.is_dir() and target.is_symlink() and target.resolve() != source.resolve():
            continue
        if source.exists() and not target.exists() and top != "__pycache__":
            target.symlink_to(source)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with both wheels and what they require."""
    folder = tmp_path_factory.mktemp("packaging")
    for number, source in enumerate(DISTRIBUTIONS):
        copy = folder / f"source{number}"  # a build writes beside what it builds
        copy.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(source / name, copy)
        shutil.copytree(source / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "dist", copy]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    wheels = sorted((folder / "dist").glob("*.whl"))
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["selkd", "selkd_cache"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    command = ["install", "--quiet", "--no-deps", "--no-index", "--no-warn-script-location", "--target", site]
    subprocess.run([sys.executable, "-m", "pip", *command, *wheels], check=True)
    built = [Distribution.at(path) for path in site.glob("selkd*.dist-info")]
    for dist in required(built).values():
        link(dist, site)
    return folder / "env"


def run(environment: Path, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the environment's own selkd, outside the checkout."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [str(environment / "bin" / "python"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=clean)


def test_the_demos_recipe_runs_from_the_wheels(environment: Path, tmp_path: Path) -> None:
    """At toy size, with the plots' package missing: the page says so and the run is whole."""
    place = run(environment, "-c", "import selkd, selkd_cache as c; print(selkd.__file__, c.__file__)", folder=tmp_path)
    assert place.returncode == 0, place.stderr
    assert str(ROOT) not in place.stdout
    shown = run(environment, "-c", "import selkd; print(selkd.__version__)", folder=tmp_path)
    version = run(environment, "-m", "selkd", "--version", folder=tmp_path)
    assert version.stdout.strip() == f"selkd {shown.stdout.strip()}"
    toy = make_recipe(tmp_path)
    kept = yaml.safe_load(named_recipes()["demo"])
    sizes = {name: toy[name] for name in ("teacher", "student", "data", "training")}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(kept | sizes))
    done = run(environment, "-m", "selkd", "distill", "demo.yaml", "--out", "run", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["steps"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "drawing needs the package matplotlib" in page
    assert run(environment, "-m", "selkd", "verify", "run", folder=tmp_path).returncode == 0


def test_each_missing_package_is_asked_for_by_its_extra(environment: Path, tmp_path: Path) -> None:
    """One process asks for all of them: a recipe's error comes before a model is looked for."""
    make_recipe(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    cases = {
        "lm_eval": "evaluation.suite=[piqa]",
        "peft": "student.lora={}",
        "mlflow": "training.report_to=mlflow",
        "tensorboard": "training.report_to=[tensorboard]",
        "trackio": "training.report_to=trackio",
        "wandb": "training.report_to=wandb",
        "bitsandbytes": "training.optim=paged_adamw_8bit",
    }
    code = f"""
import json, sys
from importlib.util import find_spec
from selkd.cli.options import read, require_packages
told = {{}}
for package, override in {cases!r}.items():
    assert find_spec(package) is None, package
    try:
        require_packages(read("se_kd", [override]))
    except ValueError as error:
        told[package] = str(error)
assert "torch" not in sys.modules
import torch
from pathlib import Path
from selkd.models.sources import locate
from selkd.models.quantisation import require_quantization
from selkd.reporting.figure import one_plot
def tell(package, call):
    try:
        call()
    except ValueError as error:
        told[package] = str(error)
tell("gguf", lambda: locate("x.gguf", Path("cache")))
tell("torchao", lambda: require_quantization("torchao_int8", torch.device("cpu")))
tell("matplotlib", lambda: one_plot().__enter__())
print(json.dumps(told))
"""
    done = run(environment, "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.keys() == EXTRAS.keys() - {"deepspeed"}
    for package, message in told.items():
        assert f"pip install 'selkd[{EXTRAS[package]}]'" in message, message
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) | {"all", "dev"} <= extras.keys()
