"""The suite of ``stream_contract`` over every transport. It runs in patched processes, too: see ``test_contract_patched``."""

import pytest

pytest.register_assert_rewrite("stream_contract")

from stream_contract import StreamContract  # noqa: E402
from transports import TCPClient, TCPServer, TLS12Server, TLS12UnixPair, TLS13Client, TLS13Server, UnixPair, fixture_of  # noqa: E402
from waiting import nothing_is_kept  # noqa: E402, F401


class TestTCPServer(StreamContract):
    transport = fixture_of(TCPServer)


class TestTCPClient(StreamContract):
    transport = fixture_of(TCPClient)


class TestUnixPair(StreamContract):
    transport = fixture_of(UnixPair)


class TestTLS12Server(StreamContract):
    transport = fixture_of(TLS12Server)


class TestTLS13Server(StreamContract):
    transport = fixture_of(TLS13Server)


class TestTLS12UnixPair(StreamContract):
    transport = fixture_of(TLS12UnixPair)


class TestTLSClient(StreamContract):
    transport = fixture_of(TLS13Client)
