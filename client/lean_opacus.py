"""Imports Opacus without what no worker uses: all of it would cost the zygote 90 MB that it holds for good.

Its package loads the engine and the accountants at once (SciPy), and optimizers for models that are sharded over
machines (DTensor, and with it SymPy). While it is imported, placeholders stand in for these; afterwards they are gone,
and who imports the real ones gets them. Import this before `opacus`, or it does nothing.
"""

import importlib
import sys
from types import ModuleType

_UNUSED = {  # module -> the names that Opacus imports from it
    "opacus.privacy_engine": "PrivacyEngine",
    "torch.distributed.tensor": "DTensor",  # in annotations
    "torch.distributed._tensor.experimental": "implicit_replication",  # of sharded models
}


def _import() -> None:
    absent = {name: attribute for name, attribute in _UNUSED.items() if name not in sys.modules}
    for name, attribute in absent.items():
        module = ModuleType(name)
        setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module
    try:
        opacus = importlib.import_module("opacus")
        importlib.import_module("opacus.optimizers")
    finally:
        for name in absent:
            del sys.modules[name]
    if "opacus.privacy_engine" in absent:
        del opacus.PrivacyEngine


if "opacus" not in sys.modules:
    _import()
