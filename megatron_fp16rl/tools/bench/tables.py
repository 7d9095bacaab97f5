"""Results for people to read."""

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table


def collectives(result: dict) -> Table:
    """A line a case: the time of small messages is latency, the bandwidth of large ones is speed."""
    columns = ("group", "operation", "dtype", "size", "µs", "spread", "GB/s", "bus")
    title = f"{len(result['hosts'])} ranks, {result['backend']}; bus: bus bandwidth, GB/s"
    table = Table(*columns, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for row in result["rows"]:
        table.add_row(
            f"{row['group']} {row['ranks']}",
            row["operation"],
            row["dtype"],
            decimal(row["bytes"]),
            f"{row['latency_us']:,.0f}",
            f"{row['latency_us_low']:,.0f}-{row['latency_us_high']:,.0f}",
            f"{row['algorithm_gb_per_s']:.3f}",
            f"{row['bus_gb_per_s']:.3f}",
        )
    return table


def sync(result: dict) -> Table:
    """A line a transport and bucket size."""
    columns = ("transport", "bucket MiB", "MB", "s", "spread", "GB/s", "of a bare broadcast")
    table = Table(*columns, title=f"{result['servers']} server(s), {result['platform']}")
    for row in result["rows"]:
        table.add_row(
            row["transport"],
            str(row["bucket_mib"] or "-"),
            f"{row['bytes'] / 1e6:,.0f}",
            *_seconds(row, "seconds"),
            f"{row['gb_per_s']:.2f}",
            f"{row['fraction_of_broadcast']:.2f}",
        )
    return table


def rollout(result: dict) -> Table:
    """A line a concurrency."""
    columns = ("at once", "tokens/s", "spread", "raw server", "of raw server")
    table = Table(*columns, title=f"{result['servers']} server(s), {result['platform']}")
    for row in result["rows"]:
        table.add_row(
            str(row["concurrency"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s_low']:,.0f} to {row['tokens_per_s_high']:,.0f}",
            f"{row['raw_tokens_per_s']:,.0f}",
            f"{row['fraction_of_raw_server']:.2f}",
        )
    return table


def learner(result: dict) -> Table:
    """A line a layout and dtype."""
    columns = ("layout", "dtype", "tokens/s", "s a step", "spread", "gradient norm")
    table = Table(*columns, title=result["platform"])
    for row in result["rows"]:
        table.add_row(
            row["layout"],
            row["dtype"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['seconds']:.3f}",
            f"{min(row['repeats_s']):.3f} to {max(row['repeats_s']):.3f}",
            f"{row['grad_norm']:.5f}",
        )
    return table


def step(result: dict) -> Table:
    """A line for each part of a step."""
    title = (
        f"{result['steps']} steps of {result['step_s']:.2f} s, {result['tokens_per_s']:,.0f} "
        f"tokens/s, {result['tokens_per_s_per_rank']:,.0f} for each of {result['ranks']} rank(s)"
    )
    table = Table("part", "share", "s", "spread", title=title)
    for row in result["rows"]:
        table.add_row(row["part"], f"{100 * row['share']:.0f} %", *_seconds(row, "seconds"))
    return table


def _seconds(row: dict, name: str) -> tuple[str, str]:
    return f"{row[name]:.3f}", f"{row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f}"
