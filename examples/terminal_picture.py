"""Render a real terminal run of capcli as examples/terminal.svg, the picture in the README: `python examples/terminal_picture.py`.

Needs the package pexpect (in the extra `dev`).
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

import pexpect
from rich.console import Console
from rich.text import Text

EXAMPLES = Path(__file__).parent
COLUMNS = 100
COMMANDS = (
    "capcli caption scenes --model demo-model --num-beams 4 --limit 6",
    "capcli caption scenes --model demo-model --num-beams 4 --out captions.jsonl",
    "head -n 2 captions.jsonl",
)
WEB_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich names fonts of a web server


def transcript(folder: Path) -> str:
    """The commands and what a terminal shows once each has ended, colours included."""
    shown = []
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    for command in COMMANDS:
        shown.append(f"\x1b[1;32m$\x1b[0m \x1b[1m{command}\x1b[0m")
        output, status = pexpect.run(
            f"bash -c '{command}'",
            withexitstatus=True,
            cwd=folder,
            env={
                "PATH": path,
                "TERM": "xterm-256color",
                "COLUMNS": str(COLUMNS),
                "LANG": "C.UTF-8",
                "HOME": str(folder),
            },
            dimensions=(40, COLUMNS),
            timeout=600,
        )
        if status:
            raise SystemExit(output.decode())
        shown += [final(line) for line in output.decode().split("\r\n")]
    return "\n".join(line for line in shown if line.strip())


def final(line: str) -> str:
    """What a line holds in the end: a progress bar is drawn over itself and erased."""
    return re.sub(r"\x1b\[(\?25[lh]|\d*[AKG])", "", line.rsplit("\r", 1)[-1])


def render(text: str) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text), overflow="fold")
    return WEB_FONT.sub("", console.export_svg(title="capcli", unique_id="capcli"))


def main() -> None:
    folder = Path(__file__).parents[1] / "build" / "terminal-picture"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("scenes", "demo-model"):
        (folder / name).symlink_to(EXAMPLES / name)
    (EXAMPLES / "terminal.svg").write_text(render(transcript(folder)))


if __name__ == "__main__":
    main()
