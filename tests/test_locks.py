"""The lists that the images install from hold every dependency, at the version of constraints.txt, with hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVICE_EXTRAS = ("service", "openvino", "tracing")
LISTS = {
    "requirements/cpu.lock": SERVICE_EXTRAS,
    "requirements/cuda.lock": SERVICE_EXTRAS,
    "requirements/trainer.lock": (*SERVICE_EXTRAS, "training", "demo"),
}
# Of another index for CPU builds, with other hashes: pinned by constraints.txt alone.
PINNED_BY_VERSION = {"torch"}


def pinned(text: str) -> dict[str, str]:
    """Versions by canonical name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("file", LISTS)
def test_a_lock_holds_what_the_project_declares(file: str) -> None:
    """After a dependency is declared: `make lock`."""
    declared = [*PROJECT["dependencies"]]
    for extra in LISTS[file]:
        declared += PROJECT["optional-dependencies"][extra]
    locked = pinned((ROOT / file).read_text())
    for requirement in map(Requirement, declared):
        name = canonicalize_name(requirement.name)
        if name in PINNED_BY_VERSION and file != "requirements/cuda.lock":
            assert name not in locked
        else:
            assert requirement.specifier.contains(locked[name]), f"{name}=={locked[name]}"


@pytest.mark.parametrize("file", LISTS)
def test_a_lock_and_the_constraints_name_the_same_versions(file: str) -> None:
    constraints = pinned((ROOT / "constraints.txt").read_text())
    locked = pinned((ROOT / file).read_text())
    assert {name: locked[name] for name in locked.keys() & constraints.keys()} == {
        name: constraints[name] for name in locked.keys() & constraints.keys()
    }


@pytest.mark.parametrize("file", LISTS)
def test_every_package_of_a_lock_has_a_hash(file: str) -> None:
    text = (ROOT / file).read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)
