"""What is promised to those who install and release the package, as far as it can be checked without doing either."""

import configparser
import re
import subprocess
from importlib.metadata import files, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hack_pipelines
from hack_pipelines.cli import SUBCOMMANDS


ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = SETUP["options.extras_require"]
# Networks that judge pictures, and what the demo models are trained with: no test installs them.
UNPINNED = {"eval", "train"}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins() -> dict[str, str]:
    found = (Requirement(line) for line in lines((ROOT / "constraints.txt").read_text()))
    return {pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==") for pin in found}


def requirements() -> list[Requirement]:
    texts = [SETUP["options"]["install_requires"], *(text for name, text in EXTRAS.items() if name not in UNPINNED)]
    return [Requirement(line) for text in texts for line in lines(text)]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_what_is_pinned_is_what_users_are_allowed(requirement):
    """`make` and CI install the pins, users what setup.cfg says: the first must be a case of the second."""
    if requirement.name == "hack_pipelines":
        assert requirement.extras <= set(EXTRAS)
    else:
        assert requirement.specifier.contains(pins()[requirement.name.lower().replace("_", "-")])


def test_types_are_announced():
    assert (Path(hack_pipelines.__file__).parent / "py.typed").exists()
    assert "Typing :: Typed" in SETUP["metadata"]["classifiers"]


def test_the_installed_command_is_the_command_line():
    """The console script of the environment that runs the tests, in a process of its own."""
    script = next(Path(str(path.locate())) for path in files("hack_pipelines") or () if path.name == "hack-pipelines")
    shown = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["hack_pipelines", version("hack_pipelines")]
    listed = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    for module in SUBCOMMANDS:
        assert re.search(rf"^ +{module.__name__.rpartition('.')[2]}\b", listed, re.MULTILINE)


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def test_there_is_a_workflow_for_tests_docs_and_release():
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_is_there(workflow):
    targets = set(re.findall(r"^([\w.$()/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {target.replace("$(VENV)", ".venv") for target in targets}
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    made = [target for command in commands for target in re.findall(r"\bmake (\S+)", command)]
    scripts = [script for command in commands for script in re.findall(r"\bbash (\S+)", command)]
    assert made or scripts
    assert set(made) <= targets
    assert all((ROOT / script).exists() for script in scripts)


def release_step(name: str) -> str:
    return next(
        step["run"] for step in steps(ROOT / ".github" / "workflows" / "release.yml") if step.get("name") == name
    )


def run_step(name: str, folder: Path, tag: str) -> int:
    for part in ("CHANGELOG.md", "src/hack_pipelines/__init__.py"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / part).exists():
            (folder / part).write_text((ROOT / part).read_text())
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", release_step(name)]
    return subprocess.run(command, cwd=folder, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}).returncode


def test_a_release_is_refused_where_tag_version_and_change_log_differ(tmp_path):
    check, now = "The tag, the version and the change log agree", hack_pipelines.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    dated = re.sub(rf"^## {re.escape(now)} \(.*\)$", f"## {now} (2026-12-24)", changes, flags=re.MULTILINE)
    assert dated.count(f"## {now} (2026-12-24)") == 1
    (tmp_path / "CHANGELOG.md").write_text(dated)
    assert run_step(check, tmp_path, f"v{now}") == 0
    assert run_step(check, tmp_path, "v99.0.0") != 0
    (tmp_path / "CHANGELOG.md").write_text(dated.replace("(2026-12-24)", "(unreleased)"))
    assert run_step(check, tmp_path, f"v{now}") != 0


def test_the_notes_of_a_release_are_those_of_its_version(tmp_path):
    old = "## 0.0.1 (2026-01-01)\n\n- The one before.\n"
    (tmp_path / "CHANGELOG.md").write_text((ROOT / "CHANGELOG.md").read_text() + "\n" + old)
    assert run_step("What the change log says of this version", tmp_path, f"v{hack_pipelines.__version__}") == 0
    notes = (tmp_path / "notes.md").read_text()
    assert "HackVARPipeline" in notes and "The one before" not in notes
    assert run_step("What the change log says of this version", tmp_path, "v0.0.1") == 0
    assert (tmp_path / "notes.md").read_text().strip() == "- The one before."
