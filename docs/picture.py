"""Draw docs/picture.svg, the README's picture, from what these commands print: make picture."""

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
WIDTH = 108
WORSE = 3  # the exit code of a comparison
PIPELINE = """\
fetch  ──►  train  ──►  evaluate            DVC runs only what a change affects
  │           │            │
  └───────────┴────────────┴──►  MLflow     a faithful record of what DVC did
"""
# Each command, and the beginnings of the lines of its output that are shown; all of them if there are none.
COMMANDS = (
    (
        "dvc exp run --temp --name slower -S train.lr=0.005",
        ("Stage 'fetch'", "Running stage", "epoch", "test accuracy"),
    ),
    ("python -m commands.compare main slower", ()),
)
# Rich's own format loads a font from the network.
FORMAT = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main() -> None:
    """Run the commands in the project, and draw."""
    listed = subprocess.run(["dvc", "exp", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True, check=True)
    if "slower" in listed.stdout.split():
        sys.exit("error: expected no experiment named slower, found one; `dvc exp remove slower` removes it")
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(PIPELINE, highlight=False)
    for command, beginnings in COMMANDS:
        console.print(Text(f"$ {command}", style="bold green"))
        environment = os.environ | {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1" if not beginnings else ""}
        ended = subprocess.run(command.split(), cwd=ROOT, env=environment, capture_output=True, text=True)
        if ended.returncode not in (0, WORSE):
            sys.exit(f"error: {command} failed:\n{ended.stdout}{ended.stderr}")
        lines = ended.stdout.splitlines()
        if not all(any(line.startswith(one) for line in lines) for one in beginnings):
            subprocess.run(["dvc", "exp", "remove", "--quiet", "slower"], cwd=ROOT, check=True)
            sys.exit(
                f"error: expected {command} to train, found its result in DVC's run cache; move .dvc/cache/runs away"
            )
        shown = [line for line in lines if line.startswith(beginnings)] if beginnings else lines
        console.print(Text.from_ansi("\n".join(shown)))
        console.print()
    subprocess.run(["dvc", "exp", "remove", "--quiet", "slower"], cwd=ROOT, check=True)
    path = ROOT / "docs" / "picture.svg"
    path.write_text(
        console.export_svg(title="dvc, mlflow and pytorch", theme=MONOKAI, code_format=FORMAT, unique_id="picture"),
        encoding="utf-8",
    )
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
