"""Python environments of their own, for libraries whose pins differ from ours; kept in the cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kronsae.support.cache import cache_root
from kronsae.support.errors import UserError
from kronsae.support.files import folder_lock, write_json
from kronsae.support.terminal import say

STDERR = 2
READY_FILE = "ready.json"


@dataclass(frozen=True)
class Environment:
    """A virtual environment with certain packages.

    Args:
        name: what it is for.
        requirements: all packages besides torch and what it needs, with their versions, one a line. Only they are
            installed, so what others require but nobody imports can be left out.
    """

    name: str
    requirements: str

    @property
    def folder(self) -> Path:
        """Folder in the cache: another one for other requirements, another Python or another torch."""
        key = "\n".join([self.requirements, sys.version, _torch_version()])
        return cache_root() / "environments" / f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    @property
    def ready(self) -> bool:
        """Whether it was built completely."""
        return (self.folder / READY_FILE).is_file() and self.python.exists()

    def build(self) -> None:
        """Build it with ``python -m venv`` and pip, torch in the version that runs now; what pip says goes to stderr.

        Raises:
            UserError: pip cannot install the packages. Nothing usable is left.
        """
        with folder_lock(self.folder):
            if self.ready:
                return
            for left in self.folder.iterdir():  # of a build that was interrupted
                if left.is_dir():
                    shutil.rmtree(left)
            requirements = self.folder / "requirements.txt"
            requirements.write_text(self.requirements, encoding="utf-8")
            say(f"Building the environment '{self.name}' in {self.folder}")
            _run([sys.executable, "-m", "venv", str(self.folder)], self.name)
            pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
            _run([*pip, f"torch=={_torch_version()}", "--constraint", str(requirements)], self.name)
            _run([*pip, "--no-deps", "--requirement", str(requirements)], self.name)
            write_json(self.folder / READY_FILE, {"requirements": self.requirements.splitlines()})

    def run_module(self, module: str, *words: str, offline: bool = False) -> int:
        """Run a module of ours in the environment; its output goes to stderr. Return its exit status.

        Our package is made importable by a folder that holds nothing else, so no package of ours hides one of its.
        """
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
        variables |= {"PYTHONPATH": str(_bridge(self.folder)), "PYTHONNOUSERSITE": "1"}
        if offline:
            variables["HF_HUB_OFFLINE"] = "1"
        command = [str(self.python), "-m", module, *words]
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR, env=variables, check=False).returncode


def _bridge(folder: Path) -> Path:
    """Return a folder with our package and its metadata alone, as links where the system has them."""
    package = Path(__file__).parents[1]
    version = importlib.metadata.version("kronsae")
    key = hashlib.sha256(f"{package} {version}".encode()).hexdigest()[:16]
    bridge = folder / f"kronsae-{key}"
    information = bridge / f"kronsae-{version}.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: kronsae\nVersion: {version}\n"
    (information / "METADATA").write_text(text, encoding="utf-8")
    link = bridge / "kronsae"
    try:
        if not link.is_symlink():
            link.symlink_to(package, target_is_directory=True)
    except FileExistsError:
        pass
    except OSError:  # a system without links
        shutil.copytree(package, link, dirs_exist_ok=True)
    return bridge


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR, check=False)
    if done.returncode:
        raise UserError(
            f"the environment '{name}' cannot be built: `{' '.join(command[:5])} ...` failed, and its words are above. "
            "Run the command again where PyPI or a mirror can be reached."
        )


def _torch_version() -> str:
    """Return the version of torch without the label of its build, which package indexes do not know."""
    return importlib.metadata.version("torch").partition("+")[0]
