"""The sum of clipped per-record gradients, computed in one of several ways that differ in speed alone.

model, loss, max_grad_norm  ->  Hooks | BookKeeping  ->  (inputs, targets) -> sums, one per trainable parameter

`hooks` is Opacus as shipped, and the oracle; `book_keeping` never makes the gradients of large layers per record;
`choose` measures which is faster here. Invariant of each: one record adds at most `max_grad_norm` in L2 to the sums
together, whatever the record and the parameters are.
"""

from client.gradients.choose import MODES, Choice, choose, require
from client.gradients.clipped import ClippedSums, Loss, Unsupported, trainable

__all__ = ["MODES", "Choice", "ClippedSums", "Loss", "Unsupported", "choose", "require", "trainable"]
