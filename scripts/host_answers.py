"""Exit with 0 if the host of a URL accepts a connection within four seconds, name look-up included."""

import os
import socket
import sys
import threading
from urllib.parse import urlsplit


def main(url: str) -> None:
    """Connect, and leave with the answer; a look-up that hangs is cut off."""
    timer = threading.Timer(4, os._exit, [1])
    timer.daemon = True
    timer.start()
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=4).close()
    except OSError:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
