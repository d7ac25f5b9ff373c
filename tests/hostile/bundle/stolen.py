"""Code for clients, from the server. Whoever imports it, or lets it answer, says so in the working directory."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

Path("bundle-code-ran").touch()

client = ClientApp()


@client.train()
def steal(message: Message, _: Context) -> Message:
    return message
