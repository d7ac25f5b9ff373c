"""Why no second line of defence is Flower's: what docs/privacy.md says of its parts, shown on the pinned release.

A test that fails here after an upgrade is good news: read that section again.
"""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.compat.common import recorddict_compat
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

from common import messages
from common.messages import Standing
from tests import wire

CLIP, LEVELS, MODULUS, WEIGHT = 8.0, 2**22, 2**32, 1000.0
STANDING = Standing(
    partition="a", epsilon_spent=1.0, epsilon_budget=8.0, delta=1e-5, rounds_remaining=3, ledger_sequence=4,
    ledger_head="0" * 64,
)  # fmt: skip


class Node:
    """A client of Flower's own SecAgg+ mod, in the form that the mod expects of its app."""

    def __init__(self, number: int, update: np.ndarray) -> None:
        self.number, self.update = number, update
        self.context = Context(run_id=1, node_id=number, node_config={}, state=RecordDict(), run_config={})

    def ask(self, stage: str, **config: object) -> ConfigRecord:
        content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({Key.STAGE: stage, **config})})  # type: ignore[dict-item]
        message = Message(content, dst_node_id=self.number, message_type="train")
        return secaggplus_mod(message, self.context, self._train).content[RECORD_KEY_CONFIGS]  # type: ignore[return-value]

    def _train(self, message: Message, _: Context) -> Message:
        fitted = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self.update]), int(WEIGHT), {})
        return Message(recorddict_compat.fitres_to_recorddict(fitted, keep_input=True), reply_to=message)


def masked_by(nodes: list[Node]) -> tuple[dict[int, list[bytes]], list[np.ndarray]]:
    """An honest run of the first three stages: the public keys, and what the last node sends."""
    setup = {
        Key.SAMPLE_NUMBER: len(nodes), Key.SHARE_NUMBER: len(nodes), Key.THRESHOLD: 2, Key.CLIPPING_RANGE: CLIP,
        Key.TARGET_RANGE: LEVELS, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: WEIGHT,
    }  # fmt: skip
    keys: dict[int, list[bytes]] = {}
    for node in nodes:
        sent = node.ask(Stage.SETUP, **setup)
        keys[node.number] = [sent[Key.PUBLIC_KEY_1], sent[Key.PUBLIC_KEY_2]]  # type: ignore[list-item]
    post: dict[int, list[tuple[int, bytes]]] = {node.number: [] for node in nodes}
    for node in nodes:
        sent = node.ask(Stage.SHARE_KEYS, **{str(number): pair for number, pair in keys.items()})
        for to, text in zip(sent[Key.DESTINATION_LIST], sent[Key.CIPHERTEXT_LIST], strict=True):  # type: ignore[arg-type]
            post[to].append((node.number, text))  # type: ignore[index]
    for node in nodes:
        letters = post[node.number]
        sources, texts = [source for source, _ in letters], [text for _, text in letters]
        sent = node.ask(Stage.COLLECT_MASKED_VECTORS, **{Key.SOURCE_LIST: sources, Key.CIPHERTEXT_LIST: texts})
    return keys, [bytes_to_ndarray(array) for array in sent[Key.MASKED_PARAMETERS]]  # type: ignore[union-attr, arg-type]


def test_a_lying_server_reads_one_clients_update_out_of_secagg() -> None:
    """It says of one client that it is alive and that it is dead, and is handed both halves of its secret."""
    wire.identify()
    generator = np.random.default_rng(1)
    nodes = [Node(number, generator.normal(size=50)) for number in (11, 12, 13)]
    keys, vector = masked_by(nodes)
    victim = nodes[-1]
    seeds, private_keys = [], []
    for node in nodes[:2]:
        sent = node.ask(Stage.UNMASK, **{Key.ACTIVE_NODE_ID_LIST: [11, 12, 13], Key.DEAD_NODE_ID_LIST: [13]})
        assert sent[Key.NODE_ID_LIST] == [11, 12, 13, 13]
        seeds.append(sent[Key.SHARE_LIST][2])  # type: ignore[index]
        private_keys.append(sent[Key.SHARE_LIST][3])  # type: ignore[index]
    shapes = [array.shape for array in vector]
    vector = parameters_subtraction(vector, pseudo_rand_gen(combine_shares(seeds), MODULUS, shapes))
    private_key = bytes_to_private_key(combine_shares(private_keys))
    for other in (11, 12):
        shared = generate_shared_key(private_key, bytes_to_public_key(keys[other][0]))
        vector = parameters_subtraction(vector, pseudo_rand_gen(shared, MODULUS, shapes))  # added: its id is larger
    _, (read,) = factor_extract(parameters_mod(vector, MODULUS))
    (read,) = dequantize([read], CLIP, LEVELS)
    assert np.allclose(read, victim.update, atol=2 * CLIP / LEVELS * 2)


def test_its_masks_have_a_seed_of_32_bits() -> None:
    """32 bytes are folded into 4 for a Mersenne Twister: one mask can be found by trying."""
    seed = bytes(range(32))
    folded = np.frombuffer(seed, "<u4")
    short = int(np.bitwise_xor.reduce(folded)).to_bytes(4, "little")
    (one,), (other,) = (pseudo_rand_gen(each, MODULUS, [(100,)]) for each in (seed, short))
    assert (one == other).all()


def test_its_mod_and_its_workflow_speak_only_the_old_api() -> None:
    wire.identify()
    node = Node(11, np.zeros(3))
    others = [Node(number, np.zeros(3)) for number in (12, 13)]

    def ours(message: Message, _: Context) -> Message:
        arrays = ArrayRecord([np.zeros(3, np.float32)])
        return Message(messages.update(arrays, STANDING, weight=1.0), reply_to=message)

    node._train = ours  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="fitres"):
        masked_by([*others, node])
    with pytest.raises(TypeError, match="LegacyContext"):
        SecAggPlusWorkflow(3, 2)(None, others[0].context)  # type: ignore[arg-type]


def strategy(clients: int) -> DifferentialPrivacyServerSideFixedClipping:
    made = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(weighted_by_key=messages.WEIGHT), noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=clients
    )
    made.current_arrays = ArrayRecord([np.zeros(40)])
    return made


def replies(*updates: tuple[float, float]) -> list[Message]:
    """From (value of each parameter, weight)."""
    wire.identify()
    made = []
    for value, weight in updates:
        asked = Message(RecordDict(), dst_node_id=7, message_type="train")
        content = {"arrays": ArrayRecord([np.full(40, value)]), "metrics": MetricRecord({messages.WEIGHT: weight})}
        made.append(Message(RecordDict(content), reply_to=asked))
    return made


def aggregated(*updates: tuple[float, float], clients: int, seed: int) -> np.ndarray:
    np.random.seed(seed)  # as anything in the process may
    arrays, _ = strategy(clients).aggregate_train(1, replies(*updates))
    assert arrays is not None
    return arrays.to_numpy_ndarrays()[0]


def test_server_side_noise_comes_from_a_generator_that_anybody_may_seed() -> None:
    """Two releases under one seed differ by the clients' updates alone: the noise is gone."""
    one, other = (aggregated((0.1, 1.0), (value, 1.0), clients=2, seed=5) for value in (0.1, 0.05))
    assert np.allclose(one - other, 0.025)


def test_server_side_noise_is_for_equal_weights_and_nobody_missing() -> None:
    """The sensitivity is clip / clients, whatever the weights are and however many replied."""
    one, other = (aggregated((0.1, 1.0), (value, 99.0), clients=2, seed=5) for value in (1.0, 1e-4))
    assert np.linalg.norm(one - other) > 0.98  # accounted: 1 / 2
    one, other = (aggregated((value, 1.0), clients=2, seed=5) for value in (1.0, 0.0001))
    assert np.linalg.norm(one - other) > 0.98


def test_server_side_clipping_fails_for_a_client_that_changed_nothing_and_passes_nan() -> None:
    with pytest.raises(ZeroDivisionError):
        aggregated((0.0, 1.0), (0.1, 1.0), clients=2, seed=5)
    assert np.isnan(aggregated((float("nan"), 1.0), (0.1, 1.0), clients=2, seed=5)).all()
