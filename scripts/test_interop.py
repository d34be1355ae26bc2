"""Run the checks against the real packages of others, each group in an environment of its own.

python scripts/test_interop.py [NAME ...] [-- PYTEST ARGUMENTS]

A group NAME has its packages in tests/interop_real/NAME.txt and its tests in tests/interop_real/NAME/. Its environment
is .venv-interop/NAME, made when it is missing or when the packages changed. They are installed under
tests/interop_real/NAME.constraints.txt where there is one, else under constraints.txt. What is in
tests/interop_real/NAME.no-deps.txt is installed without its requirements. Without names, all groups run.

The results of groups that ran as a whole and passed are written to docs/results/interop.json, and the table of
docs/interop.md from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "interop_real"
ENVIRONMENTS = ROOT / ".venv-interop"
RESULT = ROOT / "docs" / "results" / "interop.json"


def groups() -> list[str]:
    """Return the names of all groups."""
    return sorted(path.stem for path in TESTS.glob("*.txt") if "." not in path.stem)


def python_of(name: str) -> Path:
    """Return the Python of a group's environment, after installing its packages if need be."""
    folder, requirements = ENVIRONMENTS / name, TESTS / f"{name}.txt"
    own = TESTS / f"{name}.constraints.txt"
    constraints = own if own.exists() else ROOT / "constraints.txt"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    bare = TESTS / f"{name}.no-deps.txt"
    files = [requirements, constraints, *([bare] if bare.exists() else [])]
    wanted = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"{name}: installing {requirements.relative_to(ROOT)} into {folder.relative_to(ROOT)}; some minutes.")
    if not python.exists():
        venv.create(folder, with_pip=True)
    options = {"PIP_CONSTRAINT": str(constraints), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    install = [python, "-m", "pip", "install", "--quiet", "--requirement"]
    subprocess.run([*install, requirements, "--editable", ROOT], cwd=ROOT, check=True, env=os.environ | options)
    if bare.exists():
        subprocess.run([*install, bare, "--no-deps"], cwd=ROOT, check=True, env=os.environ | options)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run_group(name: str, arguments: list[str]) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Run the tests of a group; return pytest's status, the entries of passed checks and the provenance."""
    python = python_of(name)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "checks.json"
        environment = os.environ | {"KRONSAE_INTEROP": name, "KRONSAE_INTEROP_RESULTS": str(found)}
        # warnings of others' packages are not errors here
        options = ["-o", "filterwarnings=", "-o", "addopts=--import-mode=importlib", "-o", "timeout=1200", *arguments]
        command = [python, "-m", "pytest", TESTS / name, *options]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        checks = json.loads(found.read_text(encoding="utf-8")) if found.exists() else []
    about = "import json; from kronsae.support.provenance import provenance; print(json.dumps(provenance()))"
    made = subprocess.run([python, "-c", about], cwd=ROOT, capture_output=True, text=True, check=True)
    return status, checks, json.loads(made.stdout)


def main(words: list[str]) -> int:
    """Run the groups; return 1 if a test failed."""
    cut = words.index("--") if "--" in words else len(words)
    names, arguments = words[:cut] or groups(), words[cut + 1 :]
    if unknown := [name for name in names if name not in groups()]:
        raise SystemExit(f"groups must be of {', '.join(groups())}; got {', '.join(unknown)}.")
    failed = []
    for name in names:
        status, checks, about = run_group(name, arguments)
        if status != 0:
            failed.append(name)
        elif not arguments:
            kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
            kept[name] = {"provenance": about, "checks": checks}
            RESULT.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n", encoding="utf-8")
    if RESULT.exists():
        subprocess.run([python_of(names[0]), ROOT / "scripts" / "interop_results.py"], cwd=ROOT, check=True)
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
