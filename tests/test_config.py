"""The shipped files load; whatever is wrong in a file is one line with its name, the key, the value and the fix."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import ConfigError, Federation, Policy, load, parse

ROOT = Path(__file__).parents[1]

POLICY: dict[str, Any] = {
    "privacy": {
        "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.5, "max_grad_norm": 0.5,
        "batch_size": 64, "records": 718, "max_steps_per_round": 12,
    },
    "partitions": [{"name": "digits-0-of-2", "index": 0, "of": 2}],
}  # fmt: skip
FEDERATION: dict[str, Any] = {"steps_per_round": 12, "learning_rate": 16.0}


def changed(base: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `base` with the dotted `key` set."""
    content = copy.deepcopy(base)
    *path, last = key.split(".")
    section: Any = content
    for name in path:
        section = section[int(name)] if isinstance(section, list) else section.setdefault(name, {})
    section[last] = value
    return content


def error_of(document: type, content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(document, content, source="some/file.yaml")
    return str(caught.value)


# What loads


@pytest.mark.parametrize(("name", "document"), [("policy", Policy), ("federation", Federation)])
def test_the_shipped_files_load(name: str, document: type) -> None:
    load(document, ROOT / "config" / f"{name}.yaml")


def test_every_file_in_config_is_tested() -> None:
    assert sorted(path.name for path in (ROOT / "config").iterdir()) == ["federation.yaml", "policy.yaml"]


def test_the_shipped_files_fit_together() -> None:
    policy, federation = load(Policy, ROOT / "config/policy.yaml"), load(Federation, ROOT / "config/federation.yaml")
    assert federation.task == policy.task
    assert federation.steps_per_round <= policy.privacy.max_steps_per_round
    assert federation.learning_rate <= policy.training.max_learning_rate
    assert federation.min_clients <= len(policy.partitions)


def test_a_whole_number_is_a_float() -> None:
    policy = parse(Policy, changed(POLICY, "privacy.epsilon", 3), source="x")
    assert type(policy.privacy.epsilon) is float


def test_the_paths_of_a_partition() -> None:
    policy = parse(Policy, changed(POLICY, "client", {"state": "s", "keys": "k", "anchors": "a"}), source="x")
    assert policy.ledger_path("p") == Path("s/p/ledger.jsonl")
    assert policy.key_path("p") == Path("k/p/key")
    assert policy.anchor_path("p") == Path("a/p.json")
    assert parse(Policy, POLICY, source="x").anchor_path("p") is None


def test_terms_cannot_be_changed_after_loading() -> None:
    policy = parse(Policy, POLICY, source="x")
    with pytest.raises(ValueError, match="frozen"):
        policy.privacy.epsilon = 100.0


# What does not: (key, value, what the line must say)

NUMBERS = [
    ("privacy.epsilon", 0.0), ("privacy.epsilon", -1.0), ("privacy.epsilon", math.nan), ("privacy.epsilon", math.inf),
    ("privacy.epsilon", "8"), ("privacy.epsilon", None), ("privacy.epsilon", True), ("privacy.epsilon", [8.0]),
    ("privacy.epsilon", {"of": 8.0}), ("privacy.epsilon", 10**400),
    ("privacy.delta", 0.0), ("privacy.delta", 1.0), ("privacy.delta", -1e-5), ("privacy.delta", math.nan),
    ("privacy.noise_multiplier", 0.0), ("privacy.noise_multiplier", -1.5), ("privacy.noise_multiplier", math.nan),
    ("privacy.noise_multiplier", math.inf), ("privacy.noise_multiplier", 1e200), ("privacy.noise_multiplier", 1e-3),
    ("privacy.max_grad_norm", 0.0), ("privacy.max_grad_norm", math.inf), ("privacy.max_grad_norm", math.nan),
    ("privacy.batch_size", 0), ("privacy.batch_size", 64.0), ("privacy.batch_size", -1), ("privacy.batch_size", True),
    ("privacy.records", 0), ("privacy.records", 718.0), ("privacy.records", "718"), ("privacy.records", 10**400),
    ("privacy.max_steps_per_round", 0), ("privacy.max_steps_per_round", 1.5), ("privacy.max_steps_per_round", 10**10),
    ("privacy.accounting", "prv"), ("privacy.accounting", None),
    ("training.physical_batch_size", 0), ("training.max_learning_rate", math.inf), ("training.weight", -1.0),
    ("training.device", "tpu"), ("training.max_workers", 0), ("training.idle_seconds", 0.0),
    ("client.server_address", "localhost"), ("client.server_address", "a b:1"), ("client.metrics_address", 9464),
    ("client.state", 3),
    ("task", 7), ("partitions", []), ("partitions", {"name": "a"}), ("partitions.0.name", "Ä/../x"),
    ("partitions.0.name", "../x"), ("partitions.0.name", ""), ("partitions.0.index", -1), ("partitions.0.of", 0),
    ("privacy", 3), ("privacy", None), ("partitions", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_a_wrong_value_is_named_with_file_and_key(key: str, value: Any) -> None:
    line = error_of(Policy, changed(POLICY, key, value))
    assert line.startswith(f"some/file.yaml: {key}: ")
    assert f"found {value!r}" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", 0), ("rounds", 1.0), ("min_clients", "2"), ("steps_per_round", 0), ("learning_rate", math.nan),
        ("learning_rate", 0.0), ("strategy", "fedprox"), ("server_learning_rate", -1.0), ("seed", -1),
        ("round_deadline_seconds", math.inf), ("server.fleet_address", ":9092"), ("server.control_port", 65536),
        ("server.control_port", 0), ("server.state", None),
    ],
)  # fmt: skip
def test_a_wrong_value_for_the_server(key: str, value: Any) -> None:
    line = error_of(Federation, changed(FEDERATION, key, value))
    assert line.startswith(f"some/file.yaml: {key}: ")
    assert f"found {value!r}" in line


@pytest.mark.parametrize(
    ("text", "fix"),
    [("1e-5", "1.0e-05"), ("2E-06", "2.0e-06"), ("+1e5", "1.0e+05"), ("5.e-1", "5.0e-01"), (".5e1", "5.0e+00")],
)
def test_a_float_without_a_dot_is_explained(text: str, fix: str) -> None:
    line = error_of(Policy, changed(POLICY, "privacy.delta", text))
    assert line.endswith(f"found {text!r} (a YAML float needs a dot: {fix})")


@pytest.mark.parametrize("text", ["1.2.3e5", "..e1", "e5", "1e", "--1e5"])
def test_what_only_looks_like_a_float_is_an_error_too(text: str) -> None:
    assert f"found {text!r}" in error_of(Policy, changed(POLICY, "privacy.delta", text))


@pytest.mark.parametrize("key", ["privacy.epsilon", "privacy.records", "privacy", "partitions"])
def test_a_missing_key(key: str) -> None:
    content = copy.deepcopy(POLICY)
    *path, last = key.split(".")
    del (content[path[0]] if path else content)[last]
    assert error_of(Policy, content) == f"some/file.yaml: {key}: missing (add it)"


@pytest.mark.parametrize("key", ["epsilon", "privacy.epsilom", "training.batch_size", "client.port", "partitions.0.id"])
def test_an_unknown_key(key: str) -> None:
    line = error_of(Policy, changed(POLICY, key, 1.5))
    assert line == f"some/file.yaml: {key}: unknown key, found 1.5 (remove it or correct its spelling)"


def test_a_key_that_is_no_name() -> None:
    assert error_of(Policy, {**POLICY, 3: 4}).startswith("some/file.yaml: 3: ")


@pytest.mark.parametrize(
    ("document", "key", "value", "expected"),
    [
        (Policy, "privacy.delta", 1 / 718, "privacy.delta: expected below 1/records = 0.00139, found 0.001392757"),
        (Policy, "privacy.delta", 0.5, "privacy.delta: expected below 1/records = 0.00139, found 0.5"),
        (Policy, "privacy.batch_size", 719, "privacy.batch_size: expected at most records=718, found 719"),
        (Policy, "partitions.0.index", 2, "partitions.0.index: expected below of=2, found 2"),
        (Federation, "fit_clients", 3, "fit_clients: expected at most min_clients=2, found 3"),
    ],
)
def test_values_that_do_not_fit_together(document: type, key: str, value: Any, expected: str) -> None:
    base = POLICY if document is Policy else FEDERATION
    assert error_of(document, changed(base, key, value)).startswith(f"some/file.yaml: {expected}")


def test_the_largest_delta_and_batch_that_fit() -> None:
    content = changed(changed(POLICY, "privacy.delta", math.nextafter(1 / 718, 0)), "privacy.batch_size", 718)
    assert parse(Policy, content, source="x").privacy.sample_rate == 1.0


def test_a_partition_listed_twice() -> None:
    content = {**POLICY, "partitions": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}
    assert error_of(Policy, content) == "some/file.yaml: partitions: expected each name once, found a twice"


def test_each_finding_has_a_line() -> None:
    content = changed(changed(POLICY, "privacy.epsilon", -1.0), "surprise", 1)
    lines = error_of(Policy, content).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("some/file.yaml: ") for line in lines)


# Files


def load_error(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Policy, path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a mapping of keys to values, found None"),
        (b"- a\n- b\n", "expected a mapping of keys to values, found ['a', 'b']"),
        (b"text", "expected a mapping of keys to values, found 'text'"),
        (b"a: [", "not YAML: "),
        (b"a: b: c", "not YAML: "),
        (b"\xff\xfe\x00", "not YAML: "),
        (b"a: \x00", "not YAML: "),
        (b"[" * 100_000, "not YAML: "),
        (b"task: 2020-13-45", "not YAML: "),
        (b"task: !!python/object/apply:os.system [true]", "not YAML: "),
        (b"task: digits\ntask: cifar10\n", "not YAML: key 'task' is there twice"),
        (b"privacy: {epsilon: 1.0, delta: 1.0e-5, epsilon: 100.0}", "not YAML: key 'epsilon' is there twice"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(content)
    line = load_error(path)
    assert line.startswith(f"{path}: {expected}")
    assert "\n" not in line


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    fix = "(give the path of a YAML file)"
    missing = tmp_path / "none.yaml"
    assert load_error(missing) == f"{missing}: cannot be read: No such file or directory {fix}"
    assert load_error(tmp_path) == f"{tmp_path}: cannot be read: Is a directory {fix}"


def test_yaml_spellings_of_what_is_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    for text, found in [(".nan", "nan"), (".inf", "inf"), ("-.inf", "-inf"), ("1e-5", "'1e-5'"), ("yes", "True")]:
        content = yaml.safe_dump(POLICY).replace("epsilon: 8.0", f"epsilon: {text}")
        path.write_text(content)
        assert f"{path}: privacy.epsilon: " in load_error(path)
        assert f"found {found}" in load_error(path)


def test_merged_keys_are_not_twice(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    names = "partitions: [&first {name: a, of: 2}, {<<: *first, name: b, index: 1}]"
    path.write_text(yaml.safe_dump({"privacy": POLICY["privacy"]}) + names)
    assert [(p.name, p.index, p.of) for p in load(Policy, path).partitions] == [("a", 0, 2), ("b", 1, 2)]
