"""Link packages of one environment into another, so that they need not be downloaded and stored twice.

    python .ci/share_packages.py FROM_PYTHON REQUIREMENTS OWN_REQUIREMENTS [NAME ...]

Run by the other environment's Python. What REQUIREMENTS pins is linked, and what is named; what OWN_REQUIREMENTS pins
too is not: that environment has its own. Links lie in a folder of their own, which comes last on the path: pip takes
what is there as installed, and neither upgrades nor removes it. Nothing else of the first environment can be imported.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

FOLDER = "shared"


def pinned(requirements: Path) -> set[str]:
    """The names in a file of NAME==VERSION lines, as pip compares them."""
    found = re.findall(r"^([\w.-]+)==", requirements.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def top_level(name: str) -> set[Path]:
    """What a distribution has put into its site-packages."""
    of = distribution(name)
    parts = [Path(str(file)).parts[0] for file in of.files or ()]
    return {Path(str(of.locate_file(part))) for part in parts if part not in ("..", "__pycache__")}


def main(python: str, requirements: Path, own: Path, *more: str) -> None:
    """Make the links anew."""
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    source = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()
    here = Path(sysconfig.get_path("purelib"))
    links = here.parent / FOLDER
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir()
    sys.path.insert(0, source)
    for name in sorted((pinned(requirements) | set(more)) - pinned(own)):
        for path in top_level(name):
            (links / path.name).symlink_to(path)
    (here / f"{FOLDER}.pth").write_text(f"{links}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
