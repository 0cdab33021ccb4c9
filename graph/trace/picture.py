"""Draw pictures with matplotlib, an optional dependency: a column of axes, written to a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..file.errors import RequestError

PALETTE = ("#4878a8", "#d1704b", "#5f9e6e", "#e6b655", "#857aab", "#8d7866", "#dc8add", "#777777")


@contextlib.contextmanager
def picture(file: Path, heights: Sequence[float], width: float = 9.0) -> Iterator[list[Any]]:
    """Yield axes in one column, of these heights in inches, and write the file at the end.

    The ending of the file name chooses the format: PNG, SVG, or another one that matplotlib can write.

    Raises:
        RequestError: matplotlib is not installed, or cannot write this file.
    """
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise RequestError("pictures need matplotlib; pip install 'ranvier[plot]'") from None
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(width, sum(heights)), squeeze=False, height_ratios=list(heights)
    )
    try:
        yield [row[0] for row in axes]
        figure.tight_layout()
        figure.savefig(file, dpi=110)
    except (ValueError, OSError) as error:
        raise RequestError(f"--plot {file}: {error}") from None
    finally:
        pyplot.close(figure)
