"""Who may ask the explorer: whoever knows the address that it was given, from a page of its own.

A page of another site, open in the same browser, can send requests to this machine, too; and by a name that is made to
mean this machine (DNS rebinding) its script could read the answers. So the address has a token in it, the name that is
asked for has to be one of this machine, and a page that asks has to be ours.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from bokeh.document import Document
    from bokeh.server.server import BaseServer

FORBIDDEN = 403


def is_own(address: str, host: str, origin: str | None) -> bool:
    """Whether a request is for this machine by a name of its own, and from a page of this server.

    Args:
        address: that the server listens on. host: who is asked, with its port. origin: of the page that asks, if any.
    """
    name = (urlsplit(f"//{host}").hostname or "").lower()
    try:
        ipaddress.ip_address(name)  # numbers are nobody's name
    except ValueError:
        if name not in ("localhost", address.lower(), socket.gethostname().lower()):
            return False
    return origin is None or urlsplit(origin).netloc.lower() == host.lower()


def serve(page: Callable[[Document], None], address: str, port: int) -> tuple[BaseServer, str]:
    """A server of one page, and its address.

    Raises:
        OSError: the port cannot be opened.
    """
    from bokeh.server.server import BaseServer
    from bokeh.server.tornado import BokehTornado
    from bokeh.server.util import bind_sockets
    from tornado.httpserver import HTTPServer
    from tornado.httputil import HTTPServerRequest
    from tornado.ioloop import IOLoop
    from tornado.web import ErrorHandler

    class OwnPagesOnly(BokehTornado):
        """Bokeh's application, which answers no request, of a WebSocket neither, that `is_own` refuses."""

        def find_handler(self, request: HTTPServerRequest, **options: object) -> object:  # type: ignore[override]
            if is_own(address, request.host, request.headers.get("Origin")):
                return super().find_handler(request, **options)
            return self.get_handler_delegate(request, ErrorHandler, {"status_code": FORBIDDEN})

    sockets, opened = bind_sockets(address, port)
    token = secrets.token_urlsafe(16)
    application = OwnPagesOnly({"/": page}, prefix=token, extra_websocket_origins=["*"])  # `is_own` is stricter
    http = HTTPServer(application)
    http.add_sockets(sockets)
    written = f"[{address}]" if ":" in address else address
    return BaseServer(IOLoop.current(), application, http), f"http://{written}:{opened}/{token}/"
