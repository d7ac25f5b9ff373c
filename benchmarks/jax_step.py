"""The DP-SGD step of the ancestor's network in JAX: vmap(grad), clipped, summed and noised in one compiled function."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

NAME = "JAX"


def installed() -> bool:
    return importlib.util.find_spec("jax") is not None


def step(model: Any, inputs: Any, targets: Any, *, rate: float, bound: float, noise: float) -> Callable[[], object]:
    """Steps from the parameters of `models.ancestor_cnn()`, on the same records again and again; one thread."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax

    parameters = [jax.numpy.array(each.detach().numpy()) for each in model.parameters()]
    x, target, key = jax.numpy.array(inputs.numpy()), jax.numpy.array(targets.numpy()), jax.random.key(0)
    update = compiled(rate=rate, bound=bound, noise=noise)

    def take() -> None:
        nonlocal parameters, key
        key, mine = jax.random.split(key)
        parameters = jax.block_until_ready(update(parameters, mine, x, target))

    return take


def compiled(*, rate: float, bound: float, noise: float) -> Callable[..., list[Any]]:
    """(parameters, key, inputs [n, 3, 32, 32], targets [n]) -> parameters after a step."""
    import jax
    from jax import numpy as jnp

    def stage(x: Any, weight: Any, bias: Any, scale: Any, shift: Any, groups: int) -> Any:
        x = jax.lax.conv_general_dilated(x[None], weight, (1, 1), "VALID")[0] + bias[:, None, None]
        channels, height, width = x.shape
        x = jnp.tanh(x).reshape(channels, height // 2, 2, width // 2, 2).mean((2, 4))
        grouped = x.reshape(groups, -1)
        mean, variance = grouped.mean(1, keepdims=True), grouped.var(1, keepdims=True)
        x = ((grouped - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
        return x * scale[:, None, None] + shift[:, None, None]

    def loss(parameters: Any, x: Any, target: Any) -> Any:
        first, second, *dense = parameters[:4], parameters[4:8], parameters[8:10], parameters[10:12], parameters[12:]
        x = stage(stage(x, *first, groups=2), *second, groups=4).ravel()
        for number, (weight, bias) in enumerate(dense):
            x = weight @ (jnp.tanh(x) if number else x) + bias
        return -jax.nn.log_softmax(x)[target]

    def clipped(parameters: Any, x: Any, target: Any) -> Any:
        gradient = jax.grad(loss)(parameters, x, target)
        norm = jnp.sqrt(sum((part**2).sum() for part in gradient))
        return [part * jnp.minimum(1.0, bound / norm) for part in gradient]

    @jax.jit
    def update(parameters: Any, key: Any, x: Any, target: Any) -> Any:
        gradients = jax.vmap(clipped, (None, 0, 0))(parameters, x, target)
        keys = jax.random.split(key, len(parameters))
        return [
            p - rate * (g.sum(0) + noise * bound * jax.random.normal(k, p.shape)) / len(x)
            for p, g, k in zip(parameters, gradients, keys, strict=True)
        ]

    return update
