"""A signed statement holds, or `verify` names what does not: edits, other keys, lies that are signed, old ledgers."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization

from client import ledger
from client.ledger import Ledger, chain
from client.policy import worst_round
from client.statement.__main__ import main
from client.statement.making import Signer
from common import audit, pki, statement
from common.certificates import load_key
from common.config import Policy, parse
from common.statement import MAX_BYTES, Signed, Statement, StatementError

NAME, RUN = "clinic", "20260101T000000Z-abcdef"


class Owner:
    """A data owner with a key, a policy and a ledger of three charges, two of them in one run."""

    def __init__(self, folder: Path, accounting: str) -> None:
        self.folder = folder
        self.keys, self.public = folder / "pki/clients", folder / "pki/public/clients"
        self.content: dict[str, Any] = {
            "task": "digits",
            "privacy": {
                "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.5, "max_grad_norm": 0.5, "batch_size": 64,
                "records": 718, "max_steps_per_round": 4, "accounting": accounting,
            },
            "client": {"keys": str(self.keys), "state": str(folder / "state"), "audit": str(folder / "audit.json")},
            "partitions": [{"name": NAME}],
        }  # fmt: skip
        pki.create(folder / "pki", partitions=[NAME])
        ledger.create(self.ledger, partition=NAME, privacy=self.policy.privacy)
        self.charge("one", run="")
        self.charge("two", "three", run=RUN)

    @property
    def policy(self) -> Policy:
        return parse(Policy, self.content, source="test")

    @property
    def ledger(self) -> Path:
        return self.folder / "state" / NAME / "ledger.jsonl"

    def charge(self, *messages: str, run: str = RUN) -> None:
        opened = Ledger.open(self.ledger, partition=NAME, privacy=self.policy.privacy)
        for message in messages:
            reservation = opened.reserve(message, worst_round(self.policy.privacy), run=run)
            if message != "three":  # its training never ended
                opened.commit(reservation)
        opened.close()

    def signed(self, update: str | None = None) -> Signed:
        return Signer(self.policy, NAME).sign(ledger.read(self.ledger), run=RUN, update=update)

    def audit(self, *, ok: bool = True) -> None:
        """What an audit of these terms leaves."""
        trial = audit.Setting(
            name="owner", noise_multiplier=1.5, sample_rate=64 / 718, steps=4,
            points=[audit.Point(rounds=n, claimed=2.0, one_run=n / 2, privacy_loss=1.0) for n in (0, 1)],
            checks=[audit.Check(name="noise", observed=1.0, low=0.9, high=1.1, ok=ok)],
        )  # fmt: skip
        found = audit.Audit(
            time=datetime(2026, 1, 1, tzinfo=UTC), ok=ok, short=True, confidence=0.95, false_alarm=1e-6, canaries=9,
            seconds=1.0, privacy=self.policy.privacy, settings=[trial],
        )  # fmt: skip
        audit.write(found, self.folder / "audit.json")

    def file(self, *contents: dict[str, Any], **around: Any) -> Path:
        """A statement file, of the true statement or of these."""
        path = self.folder / "privacy.json"
        path.write_text(json.dumps({"statements": list(contents) or [self.signed().content()], **around}))
        return path

    def lie(self, **changes: Any) -> Path:
        """A statement file in which the partition itself signs something else than its ledger says."""
        content = self.signed().statement.model_dump(mode="json")
        for name, value in changes.items():
            *way, last = name.split("__")
            place = content
            for step in way:
                place = place[step]
            place[last] = value
        said = Statement.model_validate_json(json.dumps(content))
        return self.file(Signed.by(load_key(self.keys / NAME / "key"), said).content())


@pytest.fixture(params=["adaptive", "fixed"])
def owner(request: pytest.FixtureRequest, tmp_path: Path) -> Owner:
    return Owner(tmp_path, request.param)


@pytest.fixture
def adaptive(tmp_path: Path) -> Owner:
    return Owner(tmp_path, "adaptive")


def verify(capsys: pytest.CaptureFixture[str], path: Path, *more: Any) -> tuple[int, str]:
    """The exit code and what was printed."""
    code = main(["verify", str(path), *map(str, more)])
    return code, "".join(capsys.readouterr())


def everything(owner: Owner) -> tuple[Any, ...]:
    return "--ledger", owner.ledger, "--public-keys", owner.public


def test_what_make_prints_holds(owner: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    policy = owner.folder / "policy.yaml"
    policy.write_text(yaml.safe_dump(owner.content))
    assert main(["make", "--policy", str(policy), "--run", RUN]) == 0
    made = owner.folder / "made.json"
    made.write_text(capsys.readouterr().out)
    code, said = verify(capsys, made, *everything(owner))
    account = ledger.read(owner.ledger)
    assert code == 0, said
    assert said.startswith(f"{NAME}: holds: epsilon {account.epsilon_spent:.4f} of 8 at delta 1e-05 (")
    assert "2 rounds in run" in said
    assert "as registered, the ledger agrees" in said
    (content,) = json.loads(made.read_text())["statements"]
    assert content["statement"]["run"] == {
        "name": RUN, "rounds_charged": 2, "rounds_committed": 1, "steps_charged": 8,
    }  # fmt: skip
    assert content["statement"]["releases"] == [{"noise_multiplier": 1.5, "sample_rate": 64 / 718, "steps": 12}]


def test_a_statement_is_small(owner: Owner) -> None:
    assert len(owner.signed(update="0" * 64).dumps()) < 4096


def test_openssl_agrees_about_the_signature(adaptive: Owner) -> None:
    """Whoever does not trust this code can check with other means."""
    content = json.loads(adaptive.file().read_text())["statements"][0]
    text = json.dumps(content["statement"], sort_keys=True, separators=(",", ":"))
    files = {name: adaptive.folder / name for name in ("text", "signature", "key.pem")}
    files["text"].write_bytes(b"fedeps privacy statement\n" + text.encode())
    files["signature"].write_bytes(base64.b64decode(content["signature"]))
    key = serialization.load_ssh_public_key((adaptive.public / f"{NAME}.pub").read_bytes())
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    files["key.pem"].write_bytes(key.public_bytes(serialization.Encoding.PEM, info))
    command = ["openssl", "dgst", "-sha384", "-verify", files["key.pem"], "-signature", files["signature"]]
    assert subprocess.run([*command, files["text"]], capture_output=True).returncode == 0
    files["text"].write_bytes(files["text"].read_bytes().replace(b"1e-05", b"1e-06"))
    assert subprocess.run([*command, files["text"]], capture_output=True).returncode == 1


def leaves(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value that holds no other."""
    if isinstance(content, dict | list) and content:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, (*way, key))
    else:
        yield way


def edited(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value[:-1] + ("1" if value[-1:] != "1" else "2")
        case _:
            return "0" * 64


def test_an_edit_of_any_field_is_caught(adaptive: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    adaptive.audit()
    content = adaptive.signed().content()
    ways = list(leaves(content))
    assert len(ways) > 50  # also each text of what is assumed and not covered
    assert verify(capsys, adaptive.file(content))[0] == 0
    for way in ways:
        changed = json.loads(json.dumps(content))
        place = changed
        for step in way[:-1]:
            place = place[step]
        place[way[-1]] = edited(place[way[-1]])
        code, said = verify(capsys, adaptive.file(changed))
        assert (code, said.count("DOES NOT HOLD")) == (1, 1), way
    for drop in content["statement"]:
        changed = {**content, "statement": {k: v for k, v in content["statement"].items() if k != drop}}
        assert verify(capsys, adaptive.file(changed))[0] == 1, drop
    assert verify(capsys, adaptive.file({**content, "note": "trust me"}))[0] == 1


def test_another_key_is_caught_by_the_registered_ones(adaptive: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    pki.create(adaptive.folder / "other", partitions=[NAME])
    shutil.copy(adaptive.folder / f"other/clients/{NAME}/key", adaptive.keys / NAME / "key")
    forged = adaptive.file()
    code, said = verify(capsys, forged, "--public-keys", adaptive.public)
    assert (code, "signed by another key" in said) == (1, True)
    code, said = verify(capsys, forged)  # without them only the statement's own key is there, and the line says so
    assert (code, "not compared (--public-keys)" in said) == (0, True)
    (adaptive.public / f"{NAME}.pub").unlink()
    code, said = verify(capsys, forged, "--public-keys", adaptive.public)
    assert (code, "no key to compare" in said) == (1, True)


def test_a_ledger_that_was_rolled_back_is_caught(owner: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    old = owner.ledger.read_bytes()
    owner.charge("four")
    stated = owner.file()
    owner.charge("five")
    assert verify(capsys, stated, *everything(owner))[0] == 0  # the ledger has gone on since
    owner.ledger.write_bytes(old)
    code, said = verify(capsys, stated, *everything(owner))
    assert (code, "an old copy was put back" in said) == (1, True)
    owner.charge("a", "b", "c")  # as long as before, with another history
    code, said = verify(capsys, stated, *everything(owner))
    assert (code, "is not the one that was stated" in said) == (1, True)


def test_a_lowered_epsilon_is_caught_though_it_is_signed(owner: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    true = ledger.read(owner.ledger).epsilon_spent
    for lower in (0.0, true / 2, true * 0.9999):
        code, said = verify(capsys, owner.lie(epsilon_spent=lower), "--public-keys", owner.public)
        assert (code, "epsilon_spent: states" in said) == (1, True), lower
    assert verify(capsys, owner.lie(), *everything(owner))[0] == 0  # the same way to a file, without a lie


def test_lowered_releases_are_caught_by_the_ledger(owner: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = [{"noise_multiplier": 1.5, "sample_rate": 64 / 718, "steps": 8}]
    account = ledger.read(owner.ledger)
    mode, half = account.mode, frozenset({((1.5, 64 / 718), 8)})
    from client import accounting

    lie = owner.lie(releases=fewer, epsilon_spent=accounting.epsilon(mode, half, 1e-5))
    assert verify(capsys, lie, "--public-keys", owner.public)[0] == 0  # nothing else can know
    code, said = verify(capsys, lie, *everything(owner))
    assert (code, "releases: states" in said) == (1, True)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"adjacency": "replace-one"}, "adjacency"),
        ({"unit": "one person"}, "unit"),
        ({"mechanism__sampling": "shuffled"}, "mechanism.sampling"),
        ({"version": 2}, "version"),
    ],
)
def test_what_the_arithmetic_does_not_know_is_refused(
    adaptive: Owner, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], found: str
) -> None:
    content = adaptive.signed().content()
    *way, last = next(iter(changes)).split("__")
    place = content["statement"]
    for step in way:
        place = place[step]
    place[last] = next(iter(changes.values()))
    code, said = verify(capsys, adaptive.file(content))
    assert (code, f"DOES NOT HOLD: {found}" in said) == (1, True), said


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"accounting__mode": "fixed"}, "epsilon_spent"),  # PLD is tighter: the figure is of the other mode
        ({"epsilon_budget": 0.5}, "epsilon_budget"),
        ({"delta": 1e-3}, "epsilon_spent"),
        ({"mechanism__sample_rate": 0.01}, "sample_rate is not"),
        ({"mechanism__records_nominal": 7180}, "sample_rate is not"),
        ({"ledger__charges": 100}, "do not fit together"),
        ({"ledger__commits": 4}, "do not fit together"),
        ({"run__rounds_charged": 4}, "run: more charged"),
        ({"releases": []}, "epsilon_spent"),
        ({"releases": [{"noise_multiplier": 1.5, "sample_rate": 64 / 718, "steps": 6}] * 2}, "each mechanism once"),
        ({"releases": [{"noise_multiplier": 1e-9, "sample_rate": 0.5, "steps": 6}]}, "noise_multiplier"),
        ({"audit": {"ok": False, "epsilon_lower_bound": 9.0, "time": "today"}}, "audit of today found a violation"),
    ],
)  # fmt: skip
def test_signed_nonsense_is_caught_by_the_arithmetic(
    adaptive: Owner, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], found: str
) -> None:
    code, said = verify(capsys, adaptive.lie(**changes), "--public-keys", adaptive.public)
    assert (code, found in said) == (1, True), said


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"ledger__id": "another"}, "another one"),
        ({"ledger__time": "2020-01-01T00:00:00.000Z"}, "ledger.time"),
        ({"ledger__commits": 1}, "ledger.commits"),
        ({"epsilon_budget": 9.0}, "epsilon_budget"),
        ({"run__rounds_charged": 1}, "run: states"),
        ({"run": None}, None),  # says less, and nothing false
    ],
)
def test_signed_lies_are_caught_by_the_ledger(
    adaptive: Owner, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], found: str | None
) -> None:
    lie = adaptive.lie(**changes)
    assert verify(capsys, lie, "--public-keys", adaptive.public)[0] == 0
    code, said = verify(capsys, lie, *everything(adaptive))
    assert (code, (found or "holds") in said) == (1 if found else 0, True), said


def test_two_mechanisms_are_not_accounted_as_fixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = Owner(tmp_path, "fixed")
    both = [{"noise_multiplier": noise, "sample_rate": 64 / 718, "steps": 6} for noise in (1.5, 2.0)]
    code, said = verify(capsys, owner.lie(releases=both))
    assert (code, "2 mechanisms in fixed mode" in said) == (1, True)
    code, said = verify(capsys, owner.lie(mechanism__noise_multiplier=2.0))
    assert (code, "not the one of the releases" in said) == (1, True)


def test_a_budget_that_was_lowered_later_is_no_violation(adaptive: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    adaptive.content["privacy"]["epsilon"] = 0.1
    adaptive.charge()
    stated = adaptive.file()
    code, said = verify(capsys, stated)
    assert (code, "where its owner lowered it later, --ledger shows so" in said) == (1, True)
    assert verify(capsys, stated, *everything(adaptive))[0] == 0


def test_a_charge_beyond_the_budget_is_caught(adaptive: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger's writer refuses it; a writer that is broken, or somebody who wrote the whole chain anew, does not."""
    file = chain.Chain.open(adaptive.ledger)
    release = {"noise_multiplier": 1.5, "sample_rate": 64 / 718, "steps": 4000}
    file.append("reserve", {"message": "beyond", **release})
    file.append("budget", {"epsilon": 900.0})  # so that all looks well in the end
    file.close()
    adaptive.content["privacy"]["epsilon"] = 900.0
    code, said = verify(capsys, adaptive.file(), *everything(adaptive))
    assert (code, "was charged to a budget of 8" in said) == (1, True)


def test_a_run_without_a_proper_name_is_no_ledger_of_ours(adaptive: Owner) -> None:
    file = chain.Chain.open(adaptive.ledger)
    file.append("reserve", {"message": "m", "run": 1, "noise_multiplier": 1.5, "sample_rate": 64 / 718, "steps": 1})
    file.close()
    with pytest.raises(ledger.LedgerError, match="expected the name of a run"):
        ledger.read(adaptive.ledger)


def test_an_audit_of_these_terms_is_stated(adaptive: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    assert adaptive.signed().statement.audit is None
    for nothing in ("", "[]", "{}", "[" * 10**5):
        (adaptive.folder / "audit.json").write_text(nothing)
        assert adaptive.signed().statement.audit is None
    adaptive.audit()
    stated = adaptive.signed().statement.audit
    assert stated is not None
    assert (stated.ok, stated.epsilon_lower_bound, stated.time) == (True, 0.5, "2026-01-01T00:00:00+00:00")
    adaptive.audit(ok=False)
    assert verify(capsys, adaptive.file())[0] == 1
    adaptive.content["privacy"]["max_grad_norm"] = 1.0  # other terms than those that were audited
    assert adaptive.signed().statement.audit is None


def test_what_the_server_writes_around_must_fit(adaptive: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    content = adaptive.signed().content()
    (adaptive.folder / "model.safetensors").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert verify(capsys, adaptive.file(content, run=RUN, task="digits", model_sha256=digest))[0] == 0
    for around in ({"run": "another"}, {"task": "mnist"}, {"model_sha256": "0" * 64}):
        code, said = verify(capsys, adaptive.file(content, **around))
        assert (code, "DOES NOT HOLD" in said) == (1, True), around
    code, said = verify(capsys, adaptive.file(content, content))
    assert (code, "stated twice" in said) == (1, True)


def test_a_folder_of_ledgers_must_have_each(adaptive: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    stated = adaptive.file()
    code, said = verify(capsys, stated, "--ledger", adaptive.folder / "state")
    assert (code, "the ledger agrees" in said) == (0, True)
    (adaptive.folder / "none").mkdir()
    code, said = verify(capsys, stated, "--ledger", adaptive.folder / "none")
    assert (code, "to compare with" in said) == (1, True)
    other = adaptive.folder / "state/other/ledger.jsonl"
    ledger.create(other, partition="other", privacy=adaptive.policy.privacy)
    code, said = verify(capsys, stated, "--ledger", other)
    assert (code, "other: DOES NOT HOLD: there is its ledger, and no statement of it" in said) == (1, True)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"statements": []}', '{"statements": {}}', '{"statements": [], "statements": [1]}',
     "[" * 10**5, '{"statements": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_what_is_no_statement_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "privacy.json").write_text(content)
    code, said = verify(capsys, tmp_path / "privacy.json")
    assert code == 2
    assert said.startswith(f"{tmp_path}/privacy.json: ")
    assert len(said.splitlines()) == 1


def test_a_file_that_is_not_there_and_one_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(capsys, tmp_path / "none.json")[0] == 2
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert verify(capsys, tmp_path / "bytes")[0] == 2


def test_make_says_what_it_lacks(adaptive: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    policy = adaptive.folder / "policy.yaml"
    policy.write_text(yaml.safe_dump(adaptive.content))
    assert main(["make", "--policy", str(policy), "--partition", "nobody"]) == 2
    assert "no 'nobody' there" in capsys.readouterr().err
    assert main(["make", "--policy", str(policy), "--run", "a\nb"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    (adaptive.keys / NAME / "key").unlink()
    assert main(["make", "--policy", str(policy)]) == 2
    assert "it is the partition's key" in capsys.readouterr().err
    adaptive.ledger.unlink()
    assert main(["make", "--policy", str(policy)]) == 2


@pytest.mark.parametrize(
    "text",
    ["", "null", "{}", '{"statement": {}, "signature": ""}', '{"statement": 1, "signature": 1}', "[" * 20000,
     '{"statement": {"version": 1e999}, "signature": ""}', " " * (MAX_BYTES + 1)],
)  # fmt: skip
def test_rubbish_is_no_statement(text: str) -> None:
    with pytest.raises(StatementError):
        Signed.loads(text)


def test_many_mechanisms_still_fit(adaptive: Owner) -> None:
    """Each change of the owner's terms adds one; beyond what a message takes the client says so and trains on."""
    content = adaptive.signed().statement.model_dump(mode="json")

    def of(mechanisms: int) -> Signed:
        noises = [1.5 + number / 7 for number in range(mechanisms)]
        releases = [{"noise_multiplier": noise, "sample_rate": 64 / 718, "steps": 10**6} for noise in noises]
        statement = Statement.model_validate_json(json.dumps({**content, "releases": releases}))
        return Signed.by(load_key(adaptive.keys / NAME / "key"), statement)

    largest = of(256)
    assert Signed.loads(largest.dumps()) == largest
    with pytest.raises(ValueError, match="releases"):
        of(257)


def test_a_signature_is_over_nothing_but_a_statement(adaptive: Owner) -> None:
    """The same key signs Flower's calls: neither kind of signature may pass for the other."""
    signed = adaptive.signed()
    key = load_key(adaptive.keys / NAME / "key")
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    bare = key.sign(signed.statement.canonical(), ec.ECDSA(hashes.SHA384()))
    forged = Signed(statement=signed.statement, signature=base64.b64encode(bare).decode())
    signed.verify(key.public_key())
    with pytest.raises(StatementError):
        forged.verify(key.public_key())
    assert statement.public_text(key.public_key()) == signed.statement.public_key
