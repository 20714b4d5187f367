"""The PROXY protocol of a client: the header with which its connections begin.

The header itself is in ``proxy_protocol``; what a server makes of one, in ``_server_proxy``.
"""

from typing import TYPE_CHECKING, Any

from pants_green import _sockets
from pants_green._address import format_address
from pants_green._lifecycle import NEW
from pants_green._proxy_tlvs import CRC32C
from pants_green._settings import Setting
from pants_green.errors import ChannelStateError, InvalidAddressFormatError, StreamConnectError
from pants_green.proxy_protocol import ProxyHeader, build, parse

if TYPE_CHECKING:
    from pants_green.stream import Stream

__all__ = ["HeaderSetting", "HeaderToSend", "header_to_send", "send_header"]

#: The versions that each word stands for.
VERSIONS = {"v1": 1, "v2": 2}

#: Bytes that a header of version 2 can announce.
LONGEST = 0xFFFF

HeaderToSend = str | bytes | ProxyHeader | None


def header_to_send(name: str, value: Any) -> HeaderToSend:
    """Check what is to be sent as a header; for a `Setting`."""
    if value is None:
        return None
    if isinstance(value, str):
        if value not in VERSIONS:
            raise ValueError(f"{name} is 'v1' or 'v2', not {value!r:.100}; a whole header is a ProxyHeader, or bytes")
        return value
    if isinstance(value, ProxyHeader):
        _check_header(name, value)
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        _check_bytes(name, data)
        return data
    raise TypeError(f"{name} is 'v1', 'v2', a ProxyHeader, the bytes that proxy_protocol.build() returns, or None, not {value!r:.100}")


def _check_header(name: str, header: ProxyHeader) -> None:
    try:
        _built(header)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from None


def _check_bytes(name: str, data: bytes) -> None:
    try:
        found = parse(data, max_length=LONGEST)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if isinstance(found, int):
        raise ValueError(f"{name} is a whole header; {data!r:.100} lacks {found} bytes or more")
    if found[1] != len(data):
        raise ValueError(f"{name} is a header and nothing else; write {data[found[1] :]!r:.100} in on_connect")


class HeaderSetting(Setting[HeaderToSend]):
    """A header, which can be set until it is on its way."""

    def __set__(self, instance: Any, value: Any) -> None:
        if instance._state is not NEW or instance._key is not None:
            raise ChannelStateError(f"proxy_header of {instance!r} goes out before anything else; set it before connect()")
        super().__set__(instance, value)


def send_header(stream: "Stream[...]") -> StreamConnectError | None:
    """Send the header of a stream that has just been connected; neither the user nor TLS has sent anything.

    Returns:
        None if it has gone out, or the stream was closed meanwhile; else why it could not be sent.
    """
    data = _bytes_for(stream, stream._preface)
    stream._preface = None
    try:
        while data and stream._socket is not None:
            try:
                data = data[stream._send(data) :]
            except BlockingIOError:
                # Not on a socket that has just been made; but one that was given may be full.
                _wait_for_room(stream)
    except OSError as error:
        text = f"cannot send the PROXY header to {format_address(stream._remote)}: {error.strerror or error}"
        failure = StreamConnectError(error.errno, text)
        failure.__cause__ = error.with_traceback(None)
        return failure
    if stream._limits is not None:
        stream._limits.end("connect")
    return None


def _wait_for_room(stream: "Stream[...]") -> None:
    seconds = stream._connect_timeout
    if seconds is not None and not (stream._limits is not None and stream._limits.runs("connect")):
        stream._limit("connect", seconds)
    stream._wait(stream._writer)


def _bytes_for(stream: "Stream[...]", header: Any) -> bytes:
    if isinstance(header, bytes):
        return header
    if isinstance(header, ProxyHeader):
        return _built(header)
    version = VERSIONS[header]
    source = _sockets.local_sockaddr(stream._socket)
    destination = _sockets.remote_sockaddr(stream._socket) or stream._remote
    try:
        return build(version, _without_zone(source), _without_zone(destination))
    except InvalidAddressFormatError:
        # Version 1 has no Unix addresses. UNKNOWN and LOCAL say that the addresses are those of the connection, as they are.
        return build(version, None, None)


def _built(header: ProxyHeader) -> bytes:
    tlvs = [tlv for tlv in header.tlvs if tlv[0] != CRC32C]
    source, destination = (None, None) if header.local else (header.source, header.destination)
    return build(header.version, source, destination, tlvs=tlvs, crc32c=len(tlvs) < len(header.tlvs))


def _without_zone(sockaddr: Any) -> Any:
    """Leave the zone of a link-local address out, which means something on this machine only."""
    return (sockaddr[0].partition("%")[0], sockaddr[1]) if isinstance(sockaddr, tuple) else sockaddr
