"""What a notebook shows: tables and texts as HTML, and one output that is written again while something runs."""

import html
import importlib
import io
import logging
import sys
import time
import warnings
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from carft_ray.untrusted import visible

WIDTH, HEIGHT = 110, 40  # characters and lines that a table may take
AT_MOST_EVERY_S = 0.5
NUM_LINES = 5  # of epochs and of warnings that stay
_FORM = (
    "<pre style=\"font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace;line-height:1.3;"
    'white-space:pre;overflow-x:auto;background:none;color:inherit">{code}</pre>'
)


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook; nothing is imported for it."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def without_bars_of_others() -> None:
    """Silences tqdm and Ray, which ask for ipywidgets when they are imported in a notebook: our output needs none."""
    if in_notebook():
        warnings.filterwarnings("ignore", "IProgress not found")
        logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)


def as_text(*parts: RenderableType) -> str:
    """Returns tables and texts as plain text."""
    return _printed(parts).export_text().rstrip("\n")


def as_html(*parts: RenderableType) -> str:
    """Returns tables and texts as HTML, with the colours of the terminal and the foreground of the notebook."""
    return _printed(parts).export_html(inline_styles=True, code_format=_FORM)


def framed(page: str) -> str:
    """Returns a whole HTML page as a frame inside a notebook."""
    style = "width:100%;height:720px;border:0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}" sandbox="allow-scripts"></iframe>'


class Area:
    """One output of the cell that runs, written again and again, at most every ``AT_MOST_EVERY_S``."""

    def __init__(self) -> None:
        self._lines: list[RenderableType] = []
        self._shown_at = 0.0
        self._handle: Any = None

    def show(self, part: RenderableType, line: RenderableType = "", must: bool = False) -> None:
        """Shows a part below the last lines, in place of what was shown before.

        Args:
            part: What to show.
            line: What has happened; it is shown at once, and stays above the parts that follow.
            must: Even when the last version has just been shown.
        """
        if line:
            self._lines = [*self._lines, line][-NUM_LINES:]
        if not (line or must or time.monotonic() - self._shown_at >= AT_MOST_EVERY_S):
            return
        self._shown_at = time.monotonic()
        display = importlib.import_module("IPython.display")
        content = display.HTML(as_html(*self._lines, part))
        if self._handle is None:
            self._handle = display.display(content, display_id=True)
        else:
            self._handle.update(content)


def _printed(parts: tuple[RenderableType, ...]) -> Console:
    console = Console(
        file=io.StringIO(),
        record=True,
        width=WIDTH,
        height=HEIGHT,
        force_jupyter=False,
        force_terminal=False,
        color_system="truecolor",
        highlight=False,
        soft_wrap=False,
    )
    for part in parts:
        console.print(Text(visible(part)) if isinstance(part, str) else part)
    return console
