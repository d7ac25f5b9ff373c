"""The two names that Flower wants in a bundle."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from server.app import app as server

client = ClientApp()


@client.train()
def refuse(_message: Message, _context: Context) -> Message:
    """Clients of this federation run the code in their own image and never come here."""
    raise RuntimeError("this bundle trains nothing: run the client's own image (python -m client)")


__all__ = ["client", "server"]
