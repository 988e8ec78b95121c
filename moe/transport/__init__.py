"""How bytes travel between peers: libp2p, the direct link, memory. Nothing else opens connections."""

from moe.transport import hivemind_errors as hivemind_errors  # errors of calls are hivemind's, too
