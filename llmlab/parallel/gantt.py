"""A pipeline's runs as a picture: who does what when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmlab.parallel.schedules import Timeline

KINDS = {"F": ("forward", 0, None), "B": ("backward", 1, None), "W": ("weights' part", 2, "///")}


def draw_gantt(
    ax: Any, theme: Any, timelines: Sequence[Timeline], notes: Sequence[str], until: float | None = None
) -> None:
    """Draw runs under each other on matplotlib axes, each below its note and a line for each rank.

    A box is an operation, with its micro-batch's number; a bar in it marks chunks behind the first. theme: a
    ``figures.Theme``, which ``figures.show`` hands over. until: where the axis of time ends, for pictures of one scale.
    """
    from matplotlib.patches import Patch, Rectangle

    y, ticks = 0.0, []
    for timeline, note in zip(timelines, notes, strict=True):
        ax.text(0, y + 0.62, note, fontsize=9, va="center")
        y += 1.15
        for rank, spans in enumerate(timeline.spans):
            ax.add_patch(Rectangle((0, y), float(timeline.makespan), 1, color=theme.grid, lw=0))
            for operation, start, end in spans:
                _, index, hatch = KINDS[operation.kind]
                left, width, color = float(start), float(end - start), theme.colors[index]
                ax.add_patch(Rectangle((left, y), width, 1, fc=color, ec=theme.ground, lw=0.7, hatch=hatch))
                if operation.chunk:
                    ax.add_patch(Rectangle((left + 0.06, y + 0.78), width - 0.12, 0.2, fc=theme.ink, lw=0))
                _write(
                    ax,
                    left + width / 2,
                    y + (0.4 if operation.chunk else 0.5),
                    operation.micro_batch,
                    color,
                    hatch,
                    width,
                )
            ticks.append((y + 0.5, str(rank)))
            y += 1
        y += 0.35
    ax.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8)
    last = until or max(float(timeline.makespan) for timeline in timelines)
    ax.set(xlim=(0, last), ylim=(y, 0), xlabel="time, in forwards of a whole rank", ylabel="rank")
    ax.grid(visible=False)
    ax.tick_params(axis="y", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    shown = {span.operation.kind for timeline in timelines for spans in timeline.spans for span in spans}
    patches = [
        Patch(fc=theme.colors[index], ec=theme.ground, label=label, hatch=hatch)
        for kind, (label, index, hatch) in KINDS.items()
        if kind in shown
    ]
    patches.append(Patch(fc=theme.grid, label="idle"))
    if any(timeline.schedule.v > 1 for timeline in timelines):
        patches.append(Patch(fc=theme.ground, ec=theme.ink, lw=0.8, label="bar: 2nd chunk"))
    ax.legend(
        handles=patches, ncols=len(patches), loc="lower center", bbox_to_anchor=(0.46, 1.0), fontsize=8, columnspacing=0.9,
        handlelength=1.0, handletextpad=0.4,
    )  # fmt: skip


def _write(ax: Any, x: float, y: float, number: int, color: str, hatch: str | None, width: float) -> None:
    """A number on a colour, in black or white, whichever is read on it; over a hatch, with an edge."""
    from matplotlib.patheffects import withStroke

    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#ffffff"
    effects = [withStroke(linewidth=1.4, foreground=color)] if hatch else None
    size = 7 if width >= 1 else 5.8
    ax.text(x, y, number, color=ink, fontsize=size, ha="center", va="center_baseline", path_effects=effects)
