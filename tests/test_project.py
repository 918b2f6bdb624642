"""The files at the top of the repository agree with each other, and the source keeps to the rules of the house."""

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "visprompt"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())

TOP_LEVEL = {
    *(
        ".ci",
        ".gitattributes",
        ".gitignore",
        ".dockerignore",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "Dockerfile",
        "LICENSE",
        "Makefile",
        "README.md",
    ),
    *("benchmarks", "configs", "data", "docs", "environment.yaml", "logs", "notebooks", "pyproject.toml"),
    *("SECURITY.md", "requirements-uv.txt", "setup.cfg", "src", "tests", "uv.lock"),
}
# The only modules that may import Lightning, Hydra, OmegaConf or W&B.
SHELL = {
    *(
        "models/tuning_module.py",
        "models/fit.py",
        "data/datamodule.py",
        "data/split_datamodule.py",
        "data/ragged_datamodule.py",
        "data/own_datamodule.py",
        "data/vtab_datamodule.py",
    ),
    *(
        "data/other_datamodule.py",
        "data/fgvc_datamodule.py",
        "data/folder_datamodule.py",
        "data/hf_datamodule.py",
        "data/digits_datamodule.py",
        "data/segmentation_datamodule.py",
        "data/ade20k_datamodule.py",
        "data/mask_folder_datamodule.py",
    ),
    *("runs", "tuning", "reports", "export/command.py", "export/pictures.py"),
}
BLOCKED = ("lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb")


def git(*arguments):
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def requirements():
    """Every requirement of pyproject.toml: [build-system], the dependencies, the extras, and the groups."""
    groups = (entry for group in PYPROJECT["dependency-groups"].values() for entry in group)
    listed = [
        *PYPROJECT["build-system"]["requires"],
        *PYPROJECT["project"]["dependencies"],
        *extras(),
        *groups,
    ]
    return [entry for entry in listed if isinstance(entry, str)]


def extras():
    """Every requirement of the extras, which users choose and `make setup` installs."""
    return [
        entry for extra in PYPROJECT["project"].get("optional-dependencies", {}).values() for entry in extra
    ]


def locked(entries):
    """Requirements as pyproject.toml writes them: `tritonclient[http]>=2.60,<3`."""
    return {
        entry["name"] + (f"[{','.join(entry['extras'])}]" if "extras" in entry else "") + entry["specifier"]
        for entry in entries
    }


def pinned_uv():
    return re.search(r"^uv==(\d+\.\d+\.\d+) ", (ROOT / "requirements-uv.txt").read_text(), re.M)[1]


def version_tuple(text):
    return tuple(int(part) for part in text.split("."))


@pytest.mark.parametrize("requirement", requirements())
def test_every_dependency_is_bounded_once_with_its_reason_beside_it(requirement):
    assert re.fullmatch(r"[a-z0-9_-]+(\[[a-z0-9]+\])?>=[\d.]+,<[\d.]+", requirement)
    lines = [
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if f'"{requirement}"' in line
    ]
    assert len(lines) == 1
    assert re.search(r"\]?,? +# \S+ \S+", lines[0]), "say on the same line why the bound is what it is"


def test_every_package_that_is_imported_is_declared():
    module = {
        "pillow": "PIL",
        "pyyaml": "yaml",
        "protobuf": "google",
        "scikit-learn": "sklearn",
        "opencv-python-headless": "cv2",
        "hydra-core": "hydra",
    }
    listed = [*PYPROJECT["project"]["dependencies"], *extras()]
    declared = {re.split(r"[><]", entry)[0] for entry in listed}
    known = (
        {module.get(name, name.replace("-", "_")) for name in declared}
        | {"visprompt"}
        | sys.stdlib_module_names
    )
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.partition(".")[0] for name in names} <= known, path


def test_the_lock_is_of_these_dependencies_and_hashed():
    (ours,) = (package for package in LOCK["package"] if package["name"] == PYPROJECT["project"]["name"])
    assert LOCK["requires-python"].replace(" ", "") == PYPROJECT["project"]["requires-python"]
    held = locked(ours["metadata"]["requires-dist"])
    assert held == {*PYPROJECT["project"]["dependencies"], *extras()}
    for group in PYPROJECT["dependency-groups"]:
        held = locked(ours["metadata"]["requires-dev"][group])
        assert {entry for entry in PYPROJECT["dependency-groups"][group] if isinstance(entry, str)} <= held
    files = [
        file
        for package in LOCK["package"]
        for file in [*package.get("wheels", []), package.get("sdist")]
        if file
    ]
    assert len(files) > 1000
    assert all(file["hash"].startswith("sha256:") for file in files)


def test_nothing_unhashed_is_fetched_to_build_packages():
    """What has no wheel is built with the locked setuptools, this project by the backend inside the pinned uv."""
    source_only = {
        package["name"] for package in LOCK["package"] if "sdist" in package and not package.get("wheels")
    }
    assert source_only == set(PYPROJECT["tool"]["uv"]["no-build-isolation-package"])
    assert "setuptools" in {package["name"] for package in LOCK["package"]}
    (backend,) = PYPROJECT["build-system"]["requires"]
    low, high = re.fullmatch(r"uv_build>=([\d.]+),<([\d.]+)", backend).groups()
    assert version_tuple(low) <= version_tuple(pinned_uv()) < version_tuple(high)


def test_uv_itself_is_one_version_with_hashes_only():
    lines = [
        line for line in (ROOT / "requirements-uv.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert lines[0] == f"uv=={pinned_uv()} \\"
    hashes = [re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?", line)[1] for line in lines[1:]]
    assert len(set(hashes)) == len(hashes) > 10
    assert [line.endswith("\\") for line in lines] == [True] * (len(lines) - 1) + [False]


def test_one_range_of_python_everywhere():
    low, high = re.fullmatch(r">=(3\.\d+),<(3\.\d+)", PYPROJECT["project"]["requires-python"]).groups()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    makefile = (ROOT / "Makefile").read_text()
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + low.replace(".", "")
    in_range = f"({low.replace('.', ', ')}) <= sys.version_info[:2] < ({high.replace('.', ', ')})"
    assert in_range in makefile
    minors = range(version_tuple(low)[1], version_tuple(high)[1])
    assert set(re.findall(r"python(3\.\d+)", makefile)) == {f"3.{minor}" for minor in minors}
    assert version_tuple(low) <= sys.version_info[:2] < version_tuple(high)


def test_conda_gives_the_same_python_and_installs_nothing_of_its_own():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    *packages, pip = environment["dependencies"]
    assert environment["name"] == PYPROJECT["project"]["name"]
    assert packages == [f"python {PYPROJECT['project']['requires-python']}", "pip", "git", "make"]
    assert pip == {"pip": ["--require-hashes", "-r requirements-uv.txt"]}
    text = (ROOT / "environment.yaml").read_text()
    assert all(re.search(rf"^  - {re.escape(package)}  # \S+ \S+", text, re.M) for package in packages), (
        "say why"
    )


def test_the_makefile_has_the_documented_targets_and_ci_calls_them():
    makefile = (ROOT / "Makefile").read_text()
    rules = dict(re.findall(r"^([a-z-]+):.*?## .*\n\t@?(.*)", makefile, re.M))
    targets = {"help", "demo", "serve", "test", "test-slow", "check", "table", "report", "docs", "setup"} | {
        "bench-gpu"
    }
    assert set(rules) == targets
    assert rules["demo"] == "$(RUN) src/train.py method=vapt $(ARGS)"
    assert rules["table"] == "$(RUN) src/tune.py experiment=demo_table engine=processes $(ARGS)"
    calls = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert calls == ["setup", "check", "test", "test-slow"]


def test_the_version_is_one():
    version = PYPROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert {package["name"]: package.get("version") for package in LOCK["package"]}["visprompt"] == version


def test_the_top_level_is_as_designed():
    tracked = {path.split("/")[0].strip('"') for path in git("ls-files")}
    assert tracked <= TOP_LEVEL, "a new entry at the top level needs a place in the design, and in this list"
    assert {name for name in TOP_LEVEL if not (ROOT / name).exists()} <= {"docs"}


def test_ignored_patterns_hide_results_and_nothing_of_the_source():
    sources = [
        "src/visprompt/data/new.py",
        "configs/data/new.yaml",
        "tests/data/test_new.py",
        "src/visprompt/runs/logs/new.py",
    ]
    kept = ["data/.gitkeep", "logs/.gitkeep", "configs/local/.gitkeep"]
    hidden = [
        "data/images/a.png",
        "logs/a/result.json",
        "configs/local/mine.yaml",
        ".venv/a",
        ".uv/a",
        "wandb/run",
        "outputs/a",
    ]
    # --no-index: a file that is tracked already must not be hidden by a pattern either.
    assert git("check-ignore", "--no-index", *sources, *kept, *hidden) == hidden
    assert all((ROOT / name).is_file() for name in kept), "a clone must have these folders"


def is_shell(path):
    inside = path.relative_to(PACKAGE).as_posix()
    return inside in SHELL or inside.split("/")[0] in SHELL


@pytest.mark.slow
def test_the_core_imports_without_lightning_hydra_and_wandb():
    core = sorted(path for path in PACKAGE.rglob("*.py") if not is_shell(path))
    names = [".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__") for path in core]
    assert {
        "visprompt.data.catalog",
        "visprompt.data.datasets",
        "visprompt.models.classifier",
        "visprompt.models.tuned_state",
        "visprompt.models.optim",
    } <= {*names}
    program = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n"
        f"for name in {names}:\n    try: importlib.import_module(name)\n"
        "    except ImportError as error: print(name, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SRC, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_lightning_has_one_namespace():
    """``lightning`` installs ``pytorch_lightning`` too, whose classes are not the same."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.glob("[stb]*/**/*.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(import|from) pytorch_lightning\b", line)
        or re.match(r"\s*import lightning( as|$)", line)
    ]
    assert found == []


def test_files_are_small_and_named_for_what_they_hold():
    lines = {path: len(path.read_text().splitlines()) for path in SRC.rglob("*.py")}
    assert {path.name: count for path, count in lines.items() if path.parent == SRC and count > 30} == {}
    assert {str(path.relative_to(SRC)): count for path, count in lines.items() if count > 350} == {}
    assert [path for path in lines if "utils" in path.relative_to(SRC).with_suffix("").parts] == []
