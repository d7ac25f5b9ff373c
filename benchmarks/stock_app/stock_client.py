"""The recipe of Flower's Opacus example: a new model, loader and PrivacyEngine for each message, one pass."""

import logging
import warnings

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RECORDS = 64
DELTA = 1e-5

warnings.filterwarnings("ignore")
logging.getLogger("opacus").setLevel(logging.ERROR)

app = ClientApp()


def load_data(partition: int) -> DataLoader:
    first = RECORDS * partition
    digits = load_digits()
    pixels = digits.data[first : first + RECORDS].astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    targets = digits.target[first : first + RECORDS].astype(np.int64)
    return DataLoader(TensorDataset(torch.from_numpy(pixels), torch.from_numpy(targets)), batch_size=RECORDS)


@app.train()
def train(message: Message, context: Context) -> Message:
    model: nn.Module = nn.Linear(64, 10, bias=False)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    engine = PrivacyEngine(secure_mode=False)
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=16.0),
        data_loader=load_data(int(context.node_config["partition-id"])),
        noise_multiplier=3.0,
        max_grad_norm=0.25,
    )
    private.train()
    criterion = nn.CrossEntropyLoss()
    for pixels, targets in loader:
        optimizer.zero_grad()
        criterion(private(pixels), targets).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": RECORDS, "epsilon": engine.get_epsilon(DELTA)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
