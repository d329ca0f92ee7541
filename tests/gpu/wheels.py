"""The folder of wheels that a machine without a network needs: made on one that has it, taken from on the other.

    python -m tests.gpu.wheels make       # what `make gpu-kit` does
    python -m tests.gpu.wheels take SITE  # unpacks what this machine lacks into the folder SITE

The standard library alone, and pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["REQUIREMENTS", "WHEELS", "main", "make", "missing", "take"]

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "gpu-kit" / "wheels"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# Of the kit and the tree together.
LIMIT_MIB = 60.0
TARGET = [
    "--only-binary=:all:",
    "--python-version=3.12",
    "--implementation=cp",
    *(f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_17", "2014", "_2_5", "1")),
]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command, *rest = sys.argv[1:] if arguments is None else arguments
    if command == "make":
        make()
    elif command == "take":
        take(Path(rest[0]))
    else:
        raise SystemExit(f"{command!r} is neither `make` nor `take SITE`")


def make() -> None:
    """Downloads the wheels, checks that nothing is missing among them, and says how large they are."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS.glob("*.whl"):
        wheel.unlink()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--quiet", *TARGET, "--dest", WHEELS, "-r", REQUIREMENTS], check=True)
    offline = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-index", "--find-links", WHEELS]
    subprocess.run([*pip, *offline, "--target", WHEELS.parent / "nowhere", *TARGET, "-r", REQUIREMENTS], check=True)
    kit, tree = size_mib(WHEELS.glob("*.whl")), size_mib(tracked())
    print(f"{len(list(WHEELS.glob('*.whl')))} wheels, {kit:.1f} MiB; with the tree {kit + tree:.1f} MiB")
    if kit + tree > LIMIT_MIB:
        raise SystemExit(f"more than {LIMIT_MIB:.0f} MiB: take something out of {REQUIREMENTS.relative_to(ROOT)}")


def take(site: Path) -> None:
    """Unpacks the wheels of what is missing here into a folder for PYTHONPATH."""
    wheels = sorted(WHEELS.glob("*.whl"))
    wanted = missing(wheels, requirements())
    site.mkdir(parents=True, exist_ok=True)
    if wanted:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
        # Not by their names: pip would look for what they depend on, which may be installed here in another version.
        subprocess.run([*pip, "--no-deps", "--no-compile", "--target", site, *wanted], check=True)
    names = ", ".join(project(wheel) for wheel in wanted)
    print(f"{len(wanted)} of {len(wheels)} wheels: {names or 'nothing is missing'}")


def missing(wheels: Iterable[Path], asked: dict[str, str]) -> list[Path]:
    """The wheels of projects that are not installed here, or not in a version that fits.

    Args:
        wheels: files.
        asked: version specifiers of those projects that have any, by normalized name.
    """
    wanted = []
    for wheel in wheels:
        name = project(wheel)
        try:
            installed = version(name)
        except PackageNotFoundError:
            wanted.append(wheel)
            continue
        if asked.get(name) and not specifier(asked[name]).contains(installed, prereleases=True):
            wanted.append(wheel)
    return wanted


def requirements() -> dict[str, str]:
    """Version specifiers by normalized name, from the file."""
    found = {}
    for line in REQUIREMENTS.read_text().splitlines():
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^#;]*)", line.partition("#")[0].strip())
        if match:
            found[normalized(match[1])] = match[2].strip()
    return found


def project(wheel: Path) -> str:
    """The normalized name of a wheel's project."""
    return normalized(wheel.name.partition("-")[0])


def normalized(name: str) -> str:
    """A project's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def specifier(text: str) -> Any:
    """A version specifier; from the copy in pip where `packaging` itself is among what is missing."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        from pip._vendor.packaging.specifiers import SpecifierSet  # type: ignore[assignment]
    return SpecifierSet(text)


def tracked() -> list[Path]:
    """The files of the tree that travel: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def size_mib(files: Iterable[Path]) -> float:
    """Of the files together."""
    return sum(file.stat().st_size for file in files) / 2**20


if __name__ == "__main__":
    main()
