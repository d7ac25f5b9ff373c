"""Cryptographic randomness for the noise and the sampling that the privacy claim rests on.

A seed that repeats, or a stream that two processes share, cancels the noise between releases. So there is no
seed: each generator draws its own key from the operating system, and it cannot be copied, pickled or used
in a forked process.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_CHUNK = 2**16  # numbers per step: scratch memory stays small, however large the result
_GRID = 2.0**-24  # of a standard deviation, rounded down to a power of two
_ZEROS = memoryview(bytes(8 * _CHUNK))  # in CTR mode, zeros encrypt to the key stream itself


class SecureGenerator:
    """Normal noise and Poisson masks from AES-256 in counter mode (NIST SP 800-38A) under a key of its own.

    The counter has 128 bits and starts at zero: it never wraps, and after 2**48 blocks (4 PiB) the stream
    can be told from true randomness with probability below 2**-32. Torch's and NumPy's generators are
    neither read nor disturbed. Not for use by several threads at once.
    """

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        self._pid = os.getpid()

    def normal(
        self,
        shape: Sequence[int],
        std: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Independent draws of N(0, std**2), a tensor of `shape`, `()` for a scalar, on `device` or the CPU.

        Box & Muller 1958 in float64 from uniforms of 63 bits, then rounded to `dtype`; values end at 9.34
        `std`, which a true normal passes with probability 1e-20. It is a floating-point Gaussian: Mironov
        2012 applies, so what leaves is made by `noised`.

        Raises ValueError for a negative or non-finite `std`, a negative size or a `dtype` that is not
        floating point, RuntimeError in a process forked from the one that made the generator.
        """
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"expected std={std} to be finite and >= 0")
        if any(size < 0 for size in shape):
            raise ValueError(f"expected every size in shape={tuple(shape)} to be >= 0")
        if not dtype.is_floating_point:
            raise ValueError(f"expected dtype={dtype} to be floating point")
        with _one_thread():
            if (count := math.prod(shape)) <= _CHUNK:
                noise = self._box_muller(count, std).to(dtype).view(tuple(shape))
            else:
                noise = torch.empty(tuple(shape), dtype=dtype, device="cpu")
                for part in noise.view(-1).split(_CHUNK):
                    part.copy_(self._box_muller(len(part), std))
        return noise.to(device)

    def noised(self, total: torch.Tensor, std: float) -> torch.Tensor:
        """`total` plus N(0, std**2), on a grid that depends on `std` alone; in the type and on the device of `total`.

        Takes `total` over: the result may lie in its memory.
        In floating point the last bits of a sum tell its summands apart (Mironov 2012; Haney et al. 2022,
        arXiv:2207.13793). Here they are rounded away: near one `std` some 2**28 float64 sums share a point of the
        grid. Whatever follows, the rounding to float32 first, is a function of that point.
        """
        if std == 0:
            return total
        grid = _GRID * 2.0 ** math.floor(math.log2(std))
        result = total.reshape(-1)
        # Part by part, so that the float64 numbers stay in the cache; another device gets them all at once.
        size = _CHUNK if total.device.type == "cpu" else max(1, total.numel())
        with _one_thread():
            for part in result.split(size):
                # In units of the grid from the start: it is a power of two, so that no bit of the sum is another.
                noise = self.normal(part.shape, std / grid, device=part.device, dtype=torch.float64)
                part.copy_(noise.add_(part, alpha=1 / grid).round_().mul_(grid))
        return result.view(total.shape)

    def noised_all(self, totals: Sequence[torch.Tensor], std: float) -> list[torch.Tensor]:
        """`noised` of each of `totals`, all on one device; the small ones in one go, which costs less."""
        small = [total for total in totals if total.numel() < _CHUNK]
        sizes = [total.numel() for total in small]
        together = self.noised(torch.cat([total.reshape(-1) for total in small]), std).split(sizes) if small else ()
        ready = iter(together)
        return [
            next(ready).view(total.shape).to(total.dtype) if total.numel() < _CHUNK else self.noised(total, std)
            for total in totals
        ]

    def poisson_mask(self, n: int, rate: float) -> torch.Tensor:
        """Which of `n` records join a batch, bool [n]: each one independently with probability `rate`.

        The probability is `rate` rounded down to a multiple of 2**-64, never above what is accounted for.
        Draw it for every batch, and train on an empty one too.

        Raises ValueError unless `n` >= 0 and `rate` is in (0, 1], RuntimeError in a forked process.
        """
        if n < 0:
            raise ValueError(f"expected n={n} to be >= 0")
        if not 0 < rate <= 1:
            raise ValueError(f"expected rate={rate} in (0, 1]")
        if rate == 1:
            return torch.ones(n, dtype=torch.bool, device="cpu")
        threshold = math.floor(rate * 2.0**64) - 2**63  # words are signed: both sides are shifted by 2**63
        if n <= _CHUNK:
            return self._words(n) < threshold
        mask = torch.empty(n, dtype=torch.bool, device="cpu")
        with _one_thread():
            for part in mask.split(_CHUNK):
                part.copy_(self._words(len(part)) < threshold)
        return mask

    def _box_muller(self, count: int, std: float) -> torch.Tensor:
        """`count` <= _CHUNK draws of N(0, std**2), float64 [count]."""
        pairs = (count + 1) // 2
        words = self._words(2 * pairs)
        words[:pairs].bitwise_or_(1)  # an odd number of 63 bits and a sign: below, the logarithm is finite
        noise = words.double()
        # All in place, by NumPy, whose logarithm and tangent take a third of the time of torch's where it has AVX-512.
        radius, tangent = np.split(noise.numpy(), 2)
        radius *= 2.0**-63
        radius *= radius  # (0, 1], the square of a uniform number
        np.log(radius, out=radius)
        np.negative(radius, out=radius)
        noise[:pairs].sqrt_()  # twice as fast by torch
        radius *= std
        # One tangent for both: cos 2x = 2 / (1 + tan(x)**2) - 1 and sin 2x = 2 tan(x) / (1 + tan(x)**2).
        tangent *= math.pi * 2.0**-64
        np.tan(tangent, out=tangent)
        share = tangent * tangent
        share += 1
        np.divide(radius, share, out=share)
        share *= 2
        tangent *= share
        np.subtract(share, radius, out=radius)
        return noise[:count]

    def _words(self, count: int) -> torch.Tensor:
        """The next `count` <= _CHUNK words of the stream, int64 [count]."""
        if os.getpid() != self._pid:
            raise RuntimeError(f"this generator belongs to process {self._pid}: make one in each forked process")
        words = np.empty(count, np.int64)
        self._stream.update_into(_ZEROS[: 8 * count], words.view(np.uint8).data)
        return torch.from_numpy(words)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a SecureGenerator cannot be copied or pickled: a second copy would repeat the noise")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads gain nothing on steps this small, and on a busy machine they wait 20 times as long for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
