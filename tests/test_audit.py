"""The audit finds what it is there to find, and nothing where the shipped client is sound."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from audit import conformance, report
from audit.one_run import claim_p_value, count_correct, lower_bound, measured_epsilon, p_value
from audit.privacy_loss import losses, refuted_epsilon
from audit.settings import fit, settings
from audit.trial import AuditError, Size, Trial, run
from audit.view import chart, text
from client import accounting, app
from client.accounting import Release
from client.exporter import AuditCollector
from client.gradients import MODES
from client.model_check import ModelRefused
from common import audit as result
from common.audit import Audit
from common.config import GradientMode, Partition, Policy, Privacy, load
from tests.audit_breakages import ALSO_CAUGHT_BY, AMPLITUDE, CAUGHT_BY, LOSS, Patch, sensitivity_doubled

ROOT = Path(__file__).parents[1]
QUICK = Size(canaries=1000, silent=300, steps=100)


def policy(**changes: Any) -> Policy:
    """The shipped policy with other terms of privacy."""
    shipped = load(Policy, ROOT / "config/policy.yaml")
    return shipped.model_copy(update={"privacy": Privacy(**{**shipped.privacy.model_dump(), **changes})})


@pytest.fixture(autouse=True)
def _fresh_accounting() -> Iterator[None]:
    """What an accountant remembers, broken or not, is of its own test."""
    remembered = (accounting.epsilon, accounting._steps_within, accounting._rdp_of_one_step)
    for cache in remembered:
        cache.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for cache in remembered:
        cache.cache_clear()


def quick(monkeypatch: Patch, terms: Policy | None = None) -> Audit:
    """An audit of a size for tests."""
    monkeypatch.setattr(report, "SHORT", QUICK)
    return report.audit(terms or policy(noise_multiplier=1.0), short=True)


def failed(audit: Audit) -> set[str]:
    return {check.name for setting in audit.settings for check in setting.checks if not check.ok}


# The shipped client, and the client broken on purpose


def test_the_shipped_client_passes(monkeypatch: Patch) -> None:
    audit = quick(monkeypatch)
    assert failed(audit) == set()
    for setting in audit.settings:
        last = setting.points[-1]
        assert 0 < last.one_run < last.privacy_loss < last.claimed  # it sees something, and not too much


@pytest.mark.parametrize("mode", MODES)
def test_each_gradient_mode_is_held_to_its_clip(mode: GradientMode, monkeypatch: Patch) -> None:
    terms = policy(noise_multiplier=1.0)
    terms = terms.model_copy(update={"training": terms.training.model_copy(update={"gradient_mode": mode})})
    assert failed(quick(monkeypatch, terms)) == set()
    sensitivity_doubled(monkeypatch)
    assert AMPLITUDE in failed(quick(monkeypatch, terms))


@pytest.mark.long
def test_a_compiled_step_is_held_to_its_clip(monkeypatch: Patch) -> None:
    terms = policy(noise_multiplier=1.0)
    terms = terms.model_copy(update={"training": terms.training.model_copy(update={"gradient_mode": "compiled"})})
    assert failed(quick(monkeypatch, terms)) == set()
    sensitivity_doubled(monkeypatch)
    with pytest.raises(AuditError, match="other sums than those of one record at a time"):  # sooner than by its noise
        quick(monkeypatch, terms)
    monkeypatch.setattr(sys.modules["client.gradients.choose"], "_agree", lambda *_: True)
    assert AMPLITUDE in failed(quick(monkeypatch, terms))


@pytest.mark.parametrize("breakage", CAUGHT_BY, ids=lambda breakage: breakage.__name__)
def test_a_client_that_breaks_its_promise_is_caught(breakage: Callable[[Patch], None], monkeypatch: Patch) -> None:
    breakage(monkeypatch)
    audit = quick(monkeypatch)
    assert not audit.ok
    assert CAUGHT_BY[breakage] in failed(audit)


@pytest.mark.long
@pytest.mark.parametrize("breakage", {**CAUGHT_BY, **ALSO_CAUGHT_BY}, ids=lambda breakage: breakage.__name__)
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_the_short_form_catches_it_under_the_shipped_policy(
    mode: str, breakage: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    breakage(monkeypatch)
    audit = report.audit(policy(accounting=mode), short=True)
    assert {**CAUGHT_BY, **ALSO_CAUGHT_BY}[breakage] in failed(audit)


@pytest.mark.long
def test_it_is_the_owners_terms_that_show_a_wrong_accountant(monkeypatch: Patch) -> None:
    """Not only the trial beyond the budget."""
    next(b for b, check in CAUGHT_BY.items() if check == LOSS)(monkeypatch)
    checks = {check.name: check.ok for check in report.audit(policy(), short=False).settings[0].checks}
    assert not checks[LOSS]


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"accounting": "fixed"},
        {"epsilon": 0.3, "noise_multiplier": 4.0},
        {"batch_size": 718, "max_steps_per_round": 1, "noise_multiplier": 6.0},
        {"noise_multiplier": 0.4, "epsilon": 100.0},
        {"delta": 1e-3, "epsilon": 2.0},
        {"max_grad_norm": 1e4, "batch_size": 8},
        {"max_grad_norm": 1e-3, "max_steps_per_round": 500},
    ],
    ids=str,
)
def test_the_shipped_client_passes_under_other_terms(changes: dict[str, Any]) -> None:
    audit = report.audit(policy(**changes), short=True)
    assert failed(audit) == set()


# The bound from one run, against oracles


def exact_p_value(m: int, r: int, v: int, q: Fraction, delta: Fraction) -> Fraction:
    """The paper's Theorem 5.2 with r guesses, v of them right and accuracy q, by exact enumeration."""
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max((Fraction(sum(mass[max(0, v - i) : v])) / i for i in range(1, v + 1)), default=Fraction(0))
    return min(Fraction(1), sum(mass[v:], Fraction(0)) + 2 * m * delta * alpha)


@pytest.mark.parametrize("accuracy", [Fraction(1, 2), Fraction(3, 4), Fraction(20, 21)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10**5), Fraction(1, 100)])
def test_the_p_value_is_the_papers(accuracy: Fraction, delta: Fraction) -> None:
    epsilon = math.log(accuracy / (1 - accuracy))
    for m, r in ((1, 1), (6, 4), (30, 30), (200, 40)):
        for v in range(r + 1):
            found = p_value(canaries=m, guesses=r, correct=v, epsilon=epsilon, delta=float(delta))
            assert found == pytest.approx(float(exact_p_value(m, r, v, accuracy, delta)), rel=1e-9), (m, r, v)


def test_the_lower_bound_is_where_the_p_value_meets_the_level() -> None:
    terms: dict[str, Any] = {"canaries": 1000, "guesses": 100, "correct": 95, "delta": 1e-5}
    found = lower_bound(**terms, level=0.05)
    assert p_value(**terms, epsilon=found) < 0.05 <= p_value(**terms, epsilon=found + 1e-5)
    assert lower_bound(**{**terms, "correct": 50}, level=0.05) == 0


def randomised_response(epsilon: float, canaries: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth of the mechanism for which the bound is tight: each coin is told, rightly or not."""
    included = draw.random(canaries) < 0.5
    truthful = draw.random(canaries) < 1 / (1 + math.exp(-epsilon))
    # All are as sure: which of them are guessed first is left to chance.
    return np.where(included == truthful, 1.0, -1.0) * (1 + 0.1 * draw.random(canaries)), included


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 4.0])
def test_the_bound_on_randomised_response_is_right_as_often_as_it_says(epsilon: float) -> None:
    draw = np.random.default_rng(0)
    too_high = [  # the bound exceeds epsilon where epsilon itself is refuted
        claim_p_value(*randomised_response(epsilon, 1000, draw), epsilon=epsilon, delta=0.0) < 0.05 for _ in range(400)
    ]
    assert np.mean(too_high) < 0.05 + 6 * math.sqrt(0.05 * 0.95 / 400)  # six sigma of a binomial


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
def test_the_bound_on_randomised_response_comes_close(epsilon: float) -> None:
    draw = np.random.default_rng(1)
    found = [measured_epsilon(*randomised_response(epsilon, 4000, draw), delta=0.0, level=0.05) for _ in range(5)]
    assert np.median(found) > 0.85 * epsilon - 0.05


def test_a_claim_below_the_truth_is_refuted_and_the_truth_is_not() -> None:
    scores, included = randomised_response(2.0, 4000, np.random.default_rng(1))
    assert claim_p_value(scores, included, epsilon=1.5, delta=0.0) < 1e-6
    assert claim_p_value(scores, included, epsilon=2.0, delta=0.0) > 1e-6


def test_the_most_certain_are_guessed() -> None:
    scores = np.array([5.0, -5.0, 0.1, -0.1, 3.0, -3.0, 1.0, -1.0] * 4)
    included = scores > 0.5
    right = count_correct(scores, included)
    assert right == {32: 28, 8: 8, 4: 4, 2: 2}  # the fours at 0.1 are out and guessed in


# The privacy loss, against closed forms


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The delta of one Gaussian release of sensitivity mu: Balle & Wang 2018, arXiv:1805.06530, Theorem 8."""

    def cdf(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)


def documented(round_: Release, rounds: int, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`seen` and `included` of the documented mechanism, by NumPy's generators."""
    draw = np.random.default_rng(seed)
    included = draw.random(canaries) < 0.5
    parts = draw.binomial(round_.steps, round_.sample_rate, (rounds, canaries)) * included
    return parts + draw.normal(0, round_.noise_multiplier * math.sqrt(round_.steps), parts.shape), included


def test_without_sampling_the_loss_is_that_of_a_gaussian() -> None:
    round_ = Release(noise_multiplier=2.0, sample_rate=1.0, steps=3)
    seen, _ = documented(round_, 5, 10, 0)
    total, mu_squared = seen.sum(axis=0), 15 / 4.0
    assert np.allclose(losses(seen, round_), total / 4.0 - mu_squared / 2)


def test_the_loss_is_the_logarithm_of_a_likelihood_ratio() -> None:
    """Its exponential has mean 1 where the record is absent, for any mechanism."""
    round_ = Release(noise_multiplier=3.0, sample_rate=0.1, steps=4)
    seen, included = documented(round_, 3, 400_000, 0)
    ratios = np.exp(losses(seen, round_)[~included])
    assert abs(ratios.mean() - 1) < 6 * ratios.std() / math.sqrt(len(ratios))


def test_the_refuted_epsilon_is_below_the_truth_and_comes_close() -> None:
    round_, mu = Release(noise_multiplier=2.0, sample_rate=1.0, steps=1), math.sqrt(9) / 2
    true = next(epsilon for epsilon in np.arange(0, 20, 0.01) if gaussian_delta(epsilon, mu) < 1e-5)
    found = []
    for seed in range(20):
        seen, included = documented(round_, 9, 20_000, seed)
        found.append(refuted_epsilon(losses(seen, round_), included, delta=1e-5, level=1e-7))
    assert max(found) < true
    assert min(found) > 0.7 * true


# The conformance checks, on the documented mechanism and on others


def trial(round_: Release, rounds: int, *, seed: int = 0, factor: float = 1.0, canaries: int = 2000) -> Trial:
    seen, included = documented(round_, rounds, canaries, seed)
    std = round_.noise_multiplier * math.sqrt(round_.steps)
    noise = np.random.default_rng(seed + 10**6).normal(0, factor * std, (rounds, 2, 500))
    return Trial(round_=round_, included=included, seen=seen, noise=noise, claims=(), account=SimpleNamespace())  # type: ignore[arg-type]


CHECKS = (conformance.noise_variance, conformance.canary_amplitude, conformance.noise_correlation)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_fails_as_often_as_it_says_at_most(check: Callable[..., Any]) -> None:
    """At a level of 1 in 10, over 300 sound clients; a level of 1e-7 could not be tested."""
    round_ = Release(noise_multiplier=1.5, sample_rate=0.1, steps=6)
    failures = sum(not check(trial(round_, 8, seed=seed, canaries=400), 0.1).ok for seed in range(300))
    assert failures <= 30 + 6 * math.sqrt(300 * 0.1 * 0.9)


def test_the_checks_tell_small_deviations() -> None:
    round_ = Release(noise_multiplier=1.5, sample_rate=0.1, steps=6)
    sound = trial(round_, 20)
    assert all(check(sound, 1e-7).ok for check in CHECKS)
    assert not conformance.noise_variance(trial(round_, 20, factor=0.95), 1e-7).ok
    sound.noise[7, 1] = 0.5 * sound.noise[7, 1] + 0.5 * sound.noise[2, 0]
    assert not conformance.noise_correlation(sound, 1e-7).ok
    sound.noise[:] = np.nan
    assert not any(check(sound, 1e-7).ok for check in (CHECKS[0], CHECKS[2]))


# What is audited


def test_the_owners_terms_come_first_and_fill_the_budget() -> None:
    terms = policy(noise_multiplier=1.0).privacy
    chosen = settings(terms, Size(canaries=2000, silent=500, steps=10_000), short=False, level=1e-7)
    assert [setting.name for setting in chosen][:2] == ["owner's terms", "every record"]
    first = chosen[0]
    steps = first.rounds * first.steps
    mechanism = (1.0, terms.sample_rate)
    assert first.steps <= terms.max_steps_per_round
    assert accounting.epsilon("adaptive", frozenset({(mechanism, steps)}), terms.delta) <= terms.epsilon
    assert accounting.epsilon("adaptive", frozenset({(mechanism, steps + 12)}), terms.delta) > terms.epsilon


def test_a_budget_of_nothing_is_still_audited() -> None:
    first = settings(policy(epsilon=1e-6).privacy, QUICK, short=True, level=1e-7)[0]
    assert (first.rounds, first.steps) == (2, 1)


def test_under_too_much_noise_there_is_nothing_to_see() -> None:
    with pytest.raises(AuditError, match=r"privacy\.noise_multiplier: 500 hides 500 canaries for 100 steps"):
        settings(policy(noise_multiplier=500.0).privacy, QUICK, short=True, level=1e-7)


def test_the_claim_is_the_ledgers() -> None:
    terms = policy(noise_multiplier=2.0)
    found = run(terms.privacy, terms.training, rounds=3, steps=2, size=Size(canaries=50, silent=10, steps=6))
    assert found.account.charged == frozenset({((2.0, 64 / 718), 6)})
    assert found.account.commits == 3
    assert found.claims[-1] == found.account.epsilon_spent
    assert list(found.claims) == sorted(set(found.claims))
    assert found.seen.shape == (3, 50)
    assert found.noise.shape == (3, 2, 10)


def test_there_are_no_more_canaries_than_the_client_trains_on() -> None:
    assert fit(QUICK, policy(delta=1.3e-3).privacy).canaries == 769
    with pytest.raises(AuditError, match=r"privacy\.delta: 0\.0125 allows 79 records, the audit needs 100"):
        fit(QUICK, policy(delta=0.0125, records=64).privacy)


def test_a_client_that_refuses_is_not_audited(monkeypatch: Patch) -> None:
    def refuse(*_: object) -> None:
        raise ModelRefused("no such layer")

    monkeypatch.setattr(app, "check_model", refuse)
    with pytest.raises(AuditError, match="the client refuses to train: model: no such layer"):
        quick(monkeypatch)


# The command, its file, and the metrics


def command(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "audit", *arguments],
        cwd=directory, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(directory)},
        text=True, capture_output=True, timeout=850, check=False,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_command_writes_a_result_and_a_chart(tmp_path: Path) -> None:
    done = command(tmp_path, "--short", "--policy", str(ROOT / "config/policy.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "claimed epsilon" in done.stdout
    audit = result.read(tmp_path / "state/audit/audit.json")
    assert audit is not None
    assert audit.privacy == load(Policy, ROOT / "config/policy.yaml").privacy
    assert (tmp_path / "state/audit/audit.svg").read_text().startswith("<svg")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = command(tmp_path, "--policy", "absent.yaml")
    assert done.returncode == 2
    assert done.stderr == "absent.yaml: cannot be read: No such file or directory (give the path of a YAML file)\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_result_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    done = command(tmp_path, "--short", "--policy", str(ROOT / "config/policy.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["state/audit: Not a directory (client.audit is state/audit/audit.json)"]


def found(*, ok: bool = True, terms: Privacy | None = None) -> Audit:
    checks = [result.Check.of(name="noise", observed=1.0 if ok else 0.5, low=0.9, high=1.1)]
    points = [
        result.Point(rounds=1, claimed=1.0, one_run=0.2, privacy_loss=0.4),
        result.Point(rounds=2, claimed=1.5, one_run=0.3, privacy_loss=0.7),
    ]
    setting = result.Setting(
        name="owner's terms", noise_multiplier=1.5, sample_rate=0.1, steps=1, points=points, checks=checks
    )
    return Audit(
        time="2026-01-02T03:04:05Z", ok=ok, short=True, confidence=0.95, false_alarm=1e-6, canaries=10, seconds=1.0,
        privacy=terms or policy().privacy, settings=[setting],
    )  # type: ignore[arg-type]  # fmt: skip


def exported(path: Path) -> dict[str, float]:
    terms = policy()
    terms = terms.model_copy(update={"client": terms.client.model_copy(update={"audit": path})})
    registry = CollectorRegistry()
    members = [SimpleNamespace(partition=Partition(name=name)) for name in ("a", "b")]
    registry.register(AuditCollector(terms, members))  # type: ignore[arg-type]
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    of_a, of_b = ([line for line in lines if f'partition="{name}"' in line] for name in ("a", "b"))
    assert [line.replace('"a"', '"b"') for line in of_a] == of_b
    assert all('task="digits"' in line for line in lines)
    return {line.split("{")[0].removeprefix("fl_privacy_audit_"): float(line.split()[-1]) for line in of_a}


def test_the_exporter_shows_the_last_audit(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    assert exported(path) == {}
    result.write(found(), path)
    shown = {"ok": 1.0, "epsilon_lower_bound": 0.3, "timestamp_seconds": 1767323045.0}
    assert exported(path) == shown
    result.write(found(ok=False), path)
    assert exported(path) == {**shown, "ok": 0.0}


def test_an_audit_of_other_terms_vouches_for_nothing(tmp_path: Path) -> None:
    result.write(found(terms=policy(noise_multiplier=2.0).privacy), tmp_path / "audit.json")
    assert exported(tmp_path / "audit.json") == {"ok": 0.0, "timestamp_seconds": 1767323045.0}


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    content = json.loads(found(ok=False).model_dump_json())
    change(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": "another"}',
        edited(lambda audit: audit.update(ok=True)), edited(lambda audit: audit.pop("privacy")),
        edited(lambda audit: audit.update(settings=[])), edited(lambda audit: audit["settings"][0].update(points=[])),
        edited(lambda audit: audit["settings"][0]["points"][1].update(one_run="3")),
        edited(lambda audit: audit.update(time="yesterday")), edited(lambda audit: audit.update(more=1)),
        edited(lambda audit: audit["settings"][0]["points"][1].update(one_run=float("nan"))),
    ],
)  # fmt: skip
def test_what_is_no_result_is_not_ok(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_bytes(content)
    assert exported(path) == {"ok": 0.0}
    with pytest.raises(result.AuditUnreadable, match="not the result of an audit"):
        result.read(path)


def test_a_directory_or_a_path_through_a_file_is_not_ok(tmp_path: Path) -> None:
    assert exported(tmp_path) == {"ok": 0.0}
    (tmp_path / "file").write_text("")
    assert exported(tmp_path / "file" / "audit.json") == {"ok": 0.0}


def test_the_edit_alone_is_what_makes_it_unreadable(tmp_path: Path) -> None:
    """The negative control of the list above."""
    path = tmp_path / "audit.json"
    path.write_bytes(edited(lambda _: None))
    assert result.read(path) == found(ok=False)


def test_people_read_the_same() -> None:
    said = text(found(ok=False))
    assert "claimed epsilon 1.500, measured at least 0.300 (95% confidence" in said
    assert "VIOLATION: the client's claim is false" in said
    assert "claimed 1.50" in chart(found()).svg()


def test_the_audit_lies_where_the_policy_says(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "config/policy.yaml").read_text())
    content["client"] = {"audit": "elsewhere/result.json"}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(content))
    assert load(Policy, tmp_path / "policy.yaml").client.audit == Path("elsewhere/result.json")
    assert load(Policy, ROOT / "config/policy.yaml").client.audit == Path("state/audit/audit.json")
