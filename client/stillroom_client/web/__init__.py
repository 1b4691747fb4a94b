"""The web page of a device: `stillroom serve --web`. It needs the extra `web`; nothing else imports this package."""

from __future__ import annotations

from stillroom_client.web.server import WebServer as WebServer
