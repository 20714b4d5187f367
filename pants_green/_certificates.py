"""Watching the files of a server's certificates: loading what has changed, and warning before one expires."""

import logging
import time
from typing import TYPE_CHECKING, Any

from pants_green._settings import duration
from pants_green._tls_options import TLSOptions, expires, stamp
from pants_green.channel import TLS_LOGGER

if TYPE_CHECKING:
    from pants_green._server_tls import ServerTLS

__all__ = ["EXPIRY_WARNING", "CertificateWatch"]

DAY = 24 * 60 * 60.0

#: Seconds before the end of a certificate from which on there are warnings.
EXPIRY_WARNING = 14 * DAY


class CertificateWatch:
    """Looks at the files of one server's certificates from time to time, in a greenlet of a timer.

    Args:
        server: whose ``reload_certificates()`` is called.
        call: what was called, for errors.
        interval: seconds between two looks.
        expiry_warning: seconds before the end of a certificate from which on to warn.

    Attributes:
        active: whether it goes on.
    """

    def __init__(self, server: "ServerTLS", call: str, interval: Any, expiry_warning: Any) -> None:
        duration(f"{call}: seconds", interval)
        duration(f"{call}: expiry_warning", expiry_warning)
        self._server = server
        self._expiry_warning = expiry_warning
        self._warned: dict[str, float] = {}
        self._refused: dict[str, Any] | None = None
        self.active = True
        self._warn()
        self._timer = server._engine.cycle(interval, self._look)

    def cancel(self) -> None:
        """Look no more."""
        self.active = False
        self._timer.cancel()

    def _options(self) -> TLSOptions:
        options = self._server._tls_options
        assert options is not None
        return options

    def _look(self) -> None:
        stamps = {path: stamp(path) for path in self._options().stamps}
        if stamps != self._options().stamps:
            try:
                self._server.reload_certificates()
            except (OSError, ValueError) as error:
                # Tried again at each look, for the trouble may have been another one (no descriptors, say), but told once.
                if stamps != self._refused:
                    self._refused = stamps
                    self._log(logging.ERROR, "the old certificates stay in force: %s", error, event="certificates_refused")
            else:
                self._refused = None
                self._warned.clear()
        self._warn()

    def _warn(self) -> None:
        """Warn of what expires, once a day."""
        now = time.time()
        for path in self._options().certificates:
            end = expires(path)
            if end is None or end - now > self._expiry_warning or now - self._warned.get(path, 0.0) < DAY:
                continue
            self._warned[path] = now
            day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(end))
            if end <= now:
                self._log(logging.WARNING, "the certificate in %s has expired on %s", path, day, event="certificate_expired")
            else:
                left = (end - now) / DAY
                message = "the certificate in %s expires in %.1f days, on %s"
                self._log(logging.WARNING, message, path, left, day, event="certificate_expires")

    def _log(self, level: int, message: str, *args: Any, event: str) -> None:
        self._server._log(level, message, *args, event=event, logger=TLS_LOGGER)
