"""An audit for people: a table for the terminal, and a chart of claimed against measured epsilon."""

from common.audit import Audit, Check, Setting
from common.charts import Chart, Series


def text(audit: Audit) -> str:
    """What `python -m audit` prints."""
    terms = audit.privacy
    lines = [
        f"{audit.time:%Y-%m-%d %H:%M} UTC, {'short' if audit.short else 'long'} form, {audit.canaries} canaries,"
        f" {audit.seconds:.0f} s: epsilon {terms.epsilon:g} at delta {terms.delta:g}, clip {terms.max_grad_norm:g},"
        f" {terms.accounting} accounting",
        "",
    ]
    for setting in audit.settings:
        lines += [*_setting(setting, audit.confidence), ""]
    verdict = "ok: nothing contradicts what the client claims" if audit.ok else "VIOLATION: the client's claim is false"
    return "\n".join([*lines, f"{verdict} (a sound client fails with probability below {audit.false_alarm:g})"])


_KINDS = {"privacy_loss": "by privacy loss", "one_run": "by one run"}


def chart(audit: Audit) -> Chart:
    """Measured over claimed epsilon, up to what the owner's terms allow: a sound client stays below the diagonal."""
    end = max(audit.epsilon_claimed, audit.privacy.epsilon)
    shown = {
        setting.name: [point for point in setting.points if point.claimed <= end] or setting.points[:1]
        for setting in audit.settings
    }
    end = max(end, *(point.claimed for points in shown.values() for point in points))
    top = max(end, *(point.privacy_loss for points in shown.values() for point in points))
    series = [Series(label="claimed", points=[(0.0, 0.0), (end, end)], hint="what the client claims")]
    for kind, how in _KINDS.items():
        for name, points in shown.items():
            path = sorted((point.claimed, float(getattr(point, kind))) for point in points)
            series.append(Series(label=f"{name}, {how}", points=path, hint=f"{name}, {how}"))
    said = [
        f"{name}: claimed {points[-1].claimed:.2f}, measured at least {points[-1].one_run:.2f} by one run and"
        f" {points[-1].privacy_loss:.2f} by privacy loss"
        for name, points in shown.items()
    ]
    return Chart(
        name="audit-chart",
        title="Claimed and measured epsilon",
        description=". ".join(said) + ".",
        x_label="epsilon claimed by the client",
        y_label="measured lower bound",
        y_range=(0.0, 1.02 * top),
        series=series,
    )


def _setting(setting: Setting, confidence: float) -> list[str]:
    last = setting.points[-1]
    return [
        f"{setting.name}: noise {setting.noise_multiplier:g}, rate {setting.sample_rate:.4g},"
        f" {last.rounds} rounds of {setting.steps} steps",
        f"  claimed epsilon {last.claimed:.3f}, measured at least {last.one_run:.3f}"
        f" ({confidence:.0%} confidence, for any training)",
        *(_check(check) for check in setting.checks),
    ]


def _check(check: Check) -> str:
    observed = "none" if check.observed is None else f"{check.observed:.4g}"
    interval = f"{check.low:.4g} to {check.high:.4g}"
    return f"  {check.name:<27}{observed:>9}   {interval:<22}{'ok' if check.ok else 'VIOLATION'}"
