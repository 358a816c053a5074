"""The status as a table for people; see :mod:`feature_repo.status`."""

from datetime import datetime

from feature_repo.status import Status


def status_lines(status: Status) -> list[str]:
    """The status as a table for people."""
    lines = [f"{status.dataset}, profile {status.profile}, now {_short(status.now)}", ""]
    for name, service in status.services.items():
        said = f"up, {service.milliseconds} ms" if service.up else f"DOWN: {service.error}"
        lines.append(f"{name:<10}{service.place}: {said}")
    header = ("view", "rows", "keys", "newest event", "online keys", "copied until", "lag")
    rows = [
        (
            name,
            f"{view.num_rows:,}",
            f"{view.num_keys:,}",
            _short(view.newest_event),
            "?" if view.online_keys is None else f"{view.online_keys:,}",
            _short(view.copied_until),
            ("-" if view.lag_s is None else f"{view.lag_s:,.0f} s")
            + (", pending" if view.pending else ""),
        )
        for name, view in status.views.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        name, *others = (
            text.ljust(width) if number in (0, len(header) - 1) else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((name, *others)).rstrip())
    lines.append("")
    encoder = status.encoder
    if encoder:
        lines.append(
            f"encoder   {encoder['fingerprint']} ({encoder['model']}, layer "
            f"{encoder['split_layer']}, {encoder['width']} wide)"
        )
    if status.served:
        lines.append(
            f"served    {status.served['run']}, encoder "
            f"{status.served.get('encoder_fingerprint', '?')}; {status.num_runs} runs"
        )
    if status.parity:
        lines.append(
            f"parity    {status.parity['mismatches']:,} of {status.parity['values']:,} values wrong"
        )
    lines.append("changed   " + ", ".join(f"{k} {_short(v)}" for k, v in status.steps.items()))
    return lines


def _short(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}"
