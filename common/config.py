"""The two YAML files as frozen types: `federation.yaml` (who runs the training), `policy.yaml` (who owns the data).

Nothing else configures the programs. A key that is unknown, missing, of the wrong type or out of range is one
`ConfigError` line each that names file, key, value and fix. Relative paths start at the working directory.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PARTITION_NAME = r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?"

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=10**9)]
FilePath = Annotated[Path, Field(strict=False)]
GradientMode = Literal["hooks", "book_keeping", "compiled"]  # how client.gradients computes clipped sums
Compression = Literal["none", "int8"]  # how common.compression packs an update
Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^\s:\[\]]+):[0-9]{1,5}$")]
PartitionName = Annotated[str, Field(pattern=f"^{PARTITION_NAME}$")]


class ConfigError(ValueError):
    """A configuration file cannot be used. One line per finding."""


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ServerSettings(_Section):
    """Where the server listens and keeps what it must not lose."""

    fleet_address: Address = "127.0.0.1:9092"
    control_port: Annotated[int, Field(ge=1, le=65535)] = 9093  # SuperLink's HTTP APIs, always on loopback
    metrics_address: Address = "127.0.0.1:9465"
    ca_certificate: FilePath = Path("state/pki/public/ca.crt")
    certificate: FilePath = Path("state/pki/server/server.crt")
    certificate_key: FilePath = Path("state/pki/server/server.key")
    public_keys: FilePath = Path("state/pki/public/clients")  # one <partition>.pub per partition that may join
    state: FilePath = Path("state/server")
    # Of the replies that SuperLink may hold at once: a round of more asks further clients as replies come, all of them
    # within round_deadline_seconds.
    reply_memory_mb: Positive = 1024.0
    runs: FilePath = Path("runs")


class Federation(_Section):
    """One training over many partitions: what the server proposes to every client in every round."""

    task: str = "digits"
    data_root: FilePath = Path("data")
    rounds: Count = 3
    min_clients: Count = 2  # connected partitions before the first round starts
    fit_clients: Count = 2  # partitions sampled in each round
    steps_per_round: Count
    learning_rate: Positive
    strategy: Literal["fedavg", "fedadam"] = "fedavg"
    compression: Compression = "none"  # of the updates: int8 is a quarter of the bytes, and rounds
    server_learning_rate: Positive = 0.1  # fedadam's eta; fedavg has none
    seed: Annotated[int, Field(ge=0)] = 0  # of the first global model, which is public
    round_deadline_seconds: Positive = 600.0  # of a whole round, however many clients are asked one after another
    connect_deadline_seconds: Positive = 600.0
    server: ServerSettings = ServerSettings()

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        if self.fit_clients > self.min_clients:
            raise ValueError(
                f"fit_clients: expected at most min_clients={self.min_clients}, found {self.fit_clients}"
                " (a round cannot sample more partitions than the run waits for)"
            )
        return self


class Privacy(_Section):
    """The owner's terms. They bind whatever the server asks for."""

    epsilon: Positive  # the budget of each partition, over all runs
    delta: Annotated[float, Field(gt=0, lt=1)]
    noise_multiplier: Annotated[float, Field(ge=0.01, le=1e6)]  # noise stddev / max_grad_norm, dimensionless
    max_grad_norm: Positive  # L2 bound on one record's gradient
    batch_size: Count  # expected records in a Poisson batch
    records: Count  # nominal, public: the sample rate is batch_size / records
    max_steps_per_round: Count
    accounting: Literal["fixed", "adaptive"] = "fixed"

    @property
    def sample_rate(self) -> float:
        """Probability that a record joins a batch, (0, 1]. A constant of the policy, never of the data."""
        return self.batch_size / self.records

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size > self.records:
            raise ValueError(
                f"batch_size: expected at most records={self.records}, found {self.batch_size}"
                " (a batch cannot be expected to hold more records than there are)"
            )
        if self.delta * self.records >= 1:
            raise ValueError(
                f"delta: expected below 1/records = {1 / self.records:.3g}, found {self.delta}"
                " (a delta that large would allow publishing one record outright)"
            )
        return self


class Training(_Section):
    """How a client spends its machine on a round. Nothing here changes the guarantee."""

    physical_batch_size: Count = 256  # records per forward pass
    max_learning_rate: Positive = 1000.0
    weight: Positive = 1.0  # of this owner's updates in the average: a public constant, not a record count
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_workers: Count = 2  # partitions that train at the same time
    # Of the GPU's memory, for one worker; 1 / max_workers without it. Less where several clients share a GPU.
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    gradient_mode: Literal["auto", GradientMode] = "auto"  # auto: the faster of the first two, found by trying
    idle_seconds: Positive = 30.0  # a worker without a job ends then, which returns its GPU memory


class ClientSettings(_Section):
    """Where the client finds its server, its keys and its ledgers."""

    server_address: Address = "127.0.0.1:9092"
    metrics_address: Address = "127.0.0.1:9464"
    ca_certificate: FilePath = Path("state/pki/public/ca.crt")
    keys: FilePath = Path("state/pki/clients")  # <keys>/<partition>/key
    state: FilePath = Path("state/clients")  # <state>/<partition>/ledger.jsonl
    max_message_bytes: Count = 10**9  # of one request: what a hostile server can make a partition's thread hold
    anchors: FilePath | None = None  # a second place, best another volume, for each ledger's head
    audit: FilePath = Path("state/audit/audit.json")  # the result of `python -m audit`, exported if it is there


class Partition(_Section):
    """One data owner's data set: the `index`-th of `of` parts where the task splits it, 0 of 1 where it does not."""

    name: PartitionName
    index: Annotated[int, Field(ge=0)] = 0
    of: Count = 1

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.index >= self.of:
            raise ValueError(f"index: expected below of={self.of}, found {self.index}")
        return self


class Policy(_Section):
    """Everything a client process obeys."""

    task: str = "digits"
    data_root: FilePath = Path("data")
    privacy: Privacy
    training: Training = Training()
    client: ClientSettings = ClientSettings()
    partitions: Annotated[list[Partition], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_name_each(self) -> Self:
        names = [partition.name for partition in self.partitions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"partitions: expected each name once, found {', '.join(twice)} twice")
        return self

    def ledger_path(self, partition: str) -> Path:
        """Where the partition's ledger lies, beside nothing but its lock."""
        return self.client.state / partition / "ledger.jsonl"

    def anchor_path(self, partition: str) -> Path | None:
        """Where the second copy of the ledger's head lies, if the owner wants one."""
        return self.client.anchors / f"{partition}.json" if self.client.anchors else None

    def key_path(self, partition: str) -> Path:
        """Where the partition's private key lies."""
        return self.client.keys / partition / "key"


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, without a second value for a key: of two epsilons, which one is the owner's?"""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


Document = TypeVar("Document", bound=BaseModel)


def load(document: type[Document], path: Path) -> Document:
    """The file at `path` as a `Federation`, a `Policy`, or another such document.

    Raises:
        ConfigError: with one line per finding.
    """
    return parse(document, read(path), source=str(path))


def read(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`, not yet held against any document. Raises ConfigError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - it is a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror} (give the path of a YAML file)") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or no such date
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {content!r}")
    return content


def parse(document: type[Document], content: dict[str, Any], *, source: str) -> Document:
    """The same from a mapping; `source` names it in errors."""
    try:
        return document.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(source, finding) for finding in error.errors())) from None


def _line(source: str, finding: Any) -> str:
    key = ".".join(str(part) for part in finding["loc"])
    found = finding["input"]
    match finding["type"]:
        case "missing":
            return f"{source}: {key}: missing (add it)"
        case "extra_forbidden":
            return f"{source}: {key}: unknown key, found {found!r} (remove it or correct its spelling)"
        case "value_error":
            return f"{source}: {key + '.' if key else ''}{finding['ctx']['error']}"
    fix = ""
    if isinstance(found, str) and re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+", found):
        fix = f" (a YAML float needs a dot: {float(found):.1e})"
    elif isinstance(found, str) and finding["type"].startswith(("float", "int")):
        fix = " (write a number without quotes)"
    return f"{source}: {key}: {finding['msg'].removeprefix('Input ')}, found {found!r}{fix}"
