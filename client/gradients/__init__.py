"""The sum of clipped per-record gradients, computed in one of several ways that differ in speed alone.

model, loss, max_grad_norm  ->  Hooks | BookKeeping | Compiled  ->  (inputs, targets) -> sums, one a trainable parameter

`hooks` is Opacus as shipped, and the oracle; `book_keeping` never makes the gradients of large layers per record;
`compiled` is one program per model, made ahead of time by `client.compiler`. `choose` measures which of the first two
is faster here; whoever wants the third names it, since making it takes a minute and a compiler. Invariant of each: one
record adds at most `max_grad_norm` in L2 to the sums together, whatever the record and the parameters are.
"""

from client.gradients.choose import MODES, Choice, choose, clipped_sums, require
from client.gradients.clipped import ClippedSums, Loss, Unsupported, trainable

__all__ = ["MODES", "Choice", "ClippedSums", "Loss", "Unsupported", "choose", "clipped_sums", "require", "trainable"]
