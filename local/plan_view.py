"""A plan for people: two tables as text, and the first of them as a chart."""

from collections.abc import Sequence

from client.accounting import MAX_ROUNDS
from common.charts import Chart, Series
from local.plan import MODES, Plan

_ACCOUNTANTS = {"fixed": "PLD", "adaptive": "RDP"}


def text(plan: Plan) -> str:
    """What was asked for is marked in both tables."""
    terms, privacy = plan.terms, plan.terms.privacy
    heads = [f"{mode} ({_ACCOUNTANTS[mode]})" for mode in MODES]
    noise = [
        [_mark(row.rounds == terms.rounds), str(row.rounds)]
        + [cell for mode in MODES for cell in (f"{row.multiplier[mode]:.3f}", f"{row.epsilon[mode]:.4f}")]
        for row in plan.noise
    ]
    rounds = [
        [_mark(row.multiplier == privacy.noise_multiplier), f"{row.multiplier:g}"]
        + [_count(row.rounds[mode]) for mode in MODES]
        for row in plan.rounds
    ]
    return "\n".join(
        [
            f"Epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for one partition; batches of"
            f" {privacy.batch_size} expected of {privacy.records} records (rate {privacy.sample_rate:.4g}),"
            f" {terms.steps} {'step' if terms.steps == 1 else 'steps'} a round.",
            "",
            "The least noise multiplier that fits so many rounds, to 0.001, and what they then cost:",
            *_table(["", "rounds", *(cell for head in heads for cell in (head, "epsilon"))], noise),
            "",
            "The rounds that a noise multiplier buys:",
            *_table(["", "noise multiplier", *heads], rounds),
            "",
            "fixed holds noise multiplier and sample rate for the ledger's life; adaptive lets them change.",
        ]
    )


def chart(plan: Plan) -> Chart:
    """The noise multiplier over rounds, a line for each mode."""
    privacy = plan.terms.privacy
    lines = {mode: [(float(row.rounds), row.multiplier[mode]) for row in plan.noise] for mode in MODES}
    values = [value for line in lines.values() for _, value in line]
    first, last = plan.noise[0], plan.noise[-1]
    said = ", ".join(f"{mode} {first.multiplier[mode]:.3f} to {last.multiplier[mode]:.3f}" for mode in MODES)
    return Chart(
        name="plan",
        title=f"Noise multiplier that keeps the rounds within epsilon {privacy.epsilon:g} at delta {privacy.delta:g}",
        description=f"From {first.rounds} to {last.rounds} rounds of {plan.terms.steps} steps: {said}.",
        x_label=f"rounds of {plan.terms.steps} steps at rate {privacy.sample_rate:.4g}",
        y_label="noise multiplier",
        y_range=(0.0, max(values) * 1.1),
        series=[Series(label=f"{mode} {line[-1][1]:.3f}", points=line, hint=mode) for mode, line in lines.items()],
    )


def _mark(asked: bool) -> str:
    return ">" if asked else ""


def _count(rounds: int) -> str:
    return f"{rounds}" if rounds < MAX_ROUNDS else f"over {MAX_ROUNDS:.0e}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
