"""What a plan promises, layer by layer, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from forerun.moe.plan import LayerReport, Plan

__all__ = ["as_table", "draw", "moved_bytes"]


def moved_bytes(report: LayerReport, row_bytes: int) -> tuple[float | None, float | None]:
    """Bytes of hidden states that a token sends in a layer and gets back, by the plan and in stock; None: no paths.

    Each row that is sent comes back as one: by the plan a sum per rank (`exact=False`), in stock one per pair.

    Args:
        report: Of the layer.
        row_bytes: Bytes of a token's hidden state.

    Raises:
        ValueError: `row_bytes` is not 1 or more.
    """
    if row_bytes < 1:
        raise ValueError(f"row_bytes is {row_bytes}; expected the bytes of a token's hidden state, 1 or more")
    ours, stock = (None if rows is None else 2 * rows * row_bytes for rows in (report.sent, report.contiguous_sent))
    return ours, stock


def as_table(plan: Plan, row_bytes: int | None = None) -> Table:
    """A row per layer: ours beside experts in their order ("stock").

    Args:
        plan: The plan.
        row_bytes: Bytes of a token's hidden state: `moved_bytes` are shown, too; None: they are not.

    Raises:
        ValueError: `row_bytes` is not 1 or more.
    """
    table = Table(title=f"{plan.identity} on {plan.ranks} ranks")
    for heading in (
        "layer",
        "local (stock)",
        "in batches",
        "calibration",
        "ranks a token (stock)",
        "rows sent a token (stock)",
        "experts' load (stock)",
        "tokens' load",
        "look-back",
        *(() if row_bytes is None else ("bytes there and back a token (stock)",)),
    ):
        table.add_column(heading, justify="right")
    for report in plan.layers:
        table.add_row(
            str(report.layer),
            f"{report.local:.3f} ({report.contiguous:.3f})" + (" best" if report.exact else ""),
            _number(report.batch),
            _number(report.calibration),
            f"{_number(report.fan_out)} ({_number(report.contiguous_fan_out)})",
            f"{_number(report.sent)} ({_number(report.contiguous_sent)})",
            f"{report.experts:.2f} ({report.contiguous_experts:.2f})",
            f"{report.tokens:.2f}",
            f"{report.lookback:.1f}",
            *(() if row_bytes is None else ("{} ({})".format(*map(_bytes, moved_bytes(report, row_bytes))),)),
        )
    caption = (
        "local: share of a token's experts on its rank, by its id's counts; in batches: tokens shuffled by prediction, "
        f"{1 / plan.ranks:.3f} by chance; loads: max/mean over the ranks; -: the profile has no paths"
    )
    if row_bytes is not None:
        caption += f"; bytes: rows of {row_bytes}, as many back as were sent (exact=False)"
    table.caption = caption
    return table


def draw(plan: Plan, path: str | Path) -> None:
    """Draws local activation rate, rows sent and experts' load by layer into a picture file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'forerun[deepspeed]'") from error
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    local, sent, load = figure.subplots(1, 3)
    layers = [report.layer for report in plan.layers]
    local.plot(layers, [report.local for report in plan.layers], "o-", label="by the table")
    if all(report.batch is not None for report in plan.layers):
        local.plot(layers, [report.batch for report in plan.layers], "s-", label="in batches, predicted")
        sent.plot(layers, [report.sent for report in plan.layers], "o-", label="planned, a row a rank")
        sent.plot(
            layers, [report.contiguous_sent for report in plan.layers], "^--", color="C7", label="stock, a row a pair"
        )
        sent.legend(fontsize=8)
    local.plot(layers, [report.contiguous for report in plan.layers], "^--", color="C7", label="experts in order")
    local.axhline(1 / plan.ranks, color="black", linewidth=1, linestyle=":", label="by chance")
    local.legend(fontsize=8)
    load.plot(layers, [report.experts for report in plan.layers], "o-", label="planned")
    load.plot(layers, [report.contiguous_experts for report in plan.layers], "^--", color="C7", label="in order")
    load.legend(fontsize=8)
    for axes, title, top in (
        (local, "local activation rate", 1.0),
        (sent, "rows a token sends", None),
        (load, "experts' load, max/mean", None),
    ):
        axes.set(title=title, xlabel="layer", ylim=(1.0 if axes is load else 0.0, top))
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"{plan.identity} on {plan.ranks} ranks", fontsize=10)
    figure.savefig(Path(path), dpi=110)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
