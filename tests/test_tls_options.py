"""What ``startSSL`` may be given, as far as it can be told without a connection."""

import pathlib
import ssl

import pytest
from certificates import authority, client_context, server_context

from pants_green import Client, Server
from pants_green._tls_options import TLSOptions, expires


def server_options(options=None):
    return TLSOptions("startSSL()", options, server_side=True)


def client_options(options=None):
    return TLSOptions("startSSL()", options, server_side=False, may_choose=True)


@pytest.fixture(autouse=True)
def certificate():
    return authority().localhost


# ---- what is secure by default


def test_client_default_checks_certificate_and_name():
    context = client_options().context
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize("make", [server_options, client_options])
def test_both_sides_speak_tls_1_2_or_newer_and_never_renegotiate(make):
    context = make().context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION


def test_server_default_asks_no_client_for_a_certificate(certificate):
    assert server_options(certificate).context.verify_mode == ssl.CERT_NONE


def test_server_with_authorities_alone_asks_for_none_as_python_does(certificate):
    assert server_options({**certificate, "ca_certs": authority().file}).context.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize("needed", [ssl.CERT_OPTIONAL, ssl.CERT_REQUIRED, 2])
def test_server_cert_reqs_asks_clients_for_one(certificate, needed):
    options = server_options({**certificate, "ca_certs": authority().file, "cert_reqs": needed})
    assert options.context.verify_mode == needed
    assert options.context.get_ca_certs() != []


def test_client_ca_certs_take_the_place_of_the_system_s_authorities():
    assert len(client_options({"ca_certs": authority().file}).context.get_ca_certs()) == 1


def test_client_cert_none_checks_neither_certificate_nor_name():
    context = client_options({"cert_reqs": ssl.CERT_NONE}).context
    assert context.verify_mode == ssl.CERT_NONE
    assert not context.check_hostname


def test_clients_that_say_nothing_share_one_context():
    assert client_options().context is client_options({"server_hostname": "a", "ca_certs": None}).context
    assert client_options({"check_hostname": False}).context is not client_options().context


def test_client_without_check_hostname_still_checks_the_certificate():
    context = client_options({"check_hostname": False}).context
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert not context.check_hostname


# ---- old names


@pytest.mark.parametrize("name", ["PROTOCOL_TLS", "PROTOCOL_TLS_CLIENT", "PROTOCOL_TLS_SERVER", "PROTOCOL_SSLv23"])
def test_ssl_version_of_old_means_the_best_that_both_know(name, certificate):
    context = server_options({**certificate, "ssl_version": getattr(ssl, name)}).context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.maximum_version == ssl.TLSVersion.MAXIMUM_SUPPORTED


@pytest.mark.parametrize(
    ("version", "least", "most"),
    [
        (ssl.PROTOCOL_TLSv1_2, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2),
        (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2),
        (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED),
    ],
)
def test_ssl_version_of_today_is_the_only_one(version, least, most):
    context = client_options({"ssl_version": version}).context
    assert (context.minimum_version, context.maximum_version) == (least, most)


@pytest.mark.parametrize("version", [ssl.PROTOCOL_TLSv1, ssl.PROTOCOL_TLSv1_1, ssl.TLSVersion.TLSv1_1, "TLSv1.2", 99])
def test_ssl_version_too_old_or_unknown_is_refused(version):
    with pytest.raises(ValueError, match=r"ssl_version is TLS 1\.2 or newer"):
        client_options({"ssl_version": version})


def test_old_options_that_change_nothing_are_taken(certificate):
    server_options({**certificate, "server_side": True, "do_handshake_on_connect": False, "suppress_ragged_eofs": True})


def test_certfile_may_hold_the_key_too(tmp_path, certificate):
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join(pathlib.Path(path).read_bytes() for path in certificate.values()))
    options = server_options({"certfile": both})
    assert options.has_certificate
    assert list(options.stamps) == options.certificates == [str(both)]


def test_ciphers_are_set(certificate):
    names = {one["name"] for one in server_options({**certificate, "ciphers": "ECDHE-RSA-AES256-GCM-SHA384"}).context.get_ciphers()}
    assert "ECDHE-RSA-AES256-GCM-SHA384" in names
    assert "ECDHE-RSA-AES128-GCM-SHA256" not in names


# ---- bad input: each error names what was called, the option, and the fix


BAD = [
    ({"certfil": "x"}, TypeError, "there is no option 'certfil'"),
    ("certificate.pem", TypeError, "a dict of options or an ssl.SSLContext"),
    (7, TypeError, "a dict of options or an ssl.SSLContext"),
    ({"context": "x"}, TypeError, "context is an ssl.SSLContext"),
    ({"do_handshake_on_connect": True}, ValueError, "do_handshake_on_connect can only be False"),
    *(({"server_side": value}, ValueError, "server_side can") for value in ("yes", 0, 1, None)),
    *(({"do_handshake_on_connect": value}, ValueError, "do_handshake_on_connect can only be False") for value in ("yes", 0, 1, None)),
    ({"suppress_ragged_eofs": 1}, TypeError, "suppress_ragged_eofs is True or False"),
    ({"certfile": 5}, TypeError, "5 is not the path of a file"),
    ({"ca_certs": 5}, TypeError, "5 is not the path of a file"),
    ({"certfile": b"\0"}, TypeError, "is not the path of a file"),
    ({"certfile": "x", "password": 5}, TypeError, "password is str, bytes or a function"),
    ({"ciphers": 5}, TypeError, "ciphers is a str"),
    ({"alpn_protocols": 5}, TypeError, "alpn_protocols is a list of str"),
    ({"alpn_protocols": [""]}, ValueError, "alpn_protocols"),
    ({"cert_reqs": 7}, ValueError, "cert_reqs is one of"),
    ({"keyfile": "x"}, ValueError, "without certfile"),
    ({"password": "x"}, ValueError, "without certfile"),
    ({"ciphers": "NONSENSE"}, ValueError, "ciphers, 'NONSENSE'"),
    ({"alpn_protocols": "h2"}, TypeError, "alpn_protocols is a list of str"),
    ({"alpn_protocols": [b"h2"]}, TypeError, "alpn_protocols is a list of str"),
    ({"handshake_timeout": "x"}, TypeError, "handshake_timeout is a number of seconds"),
    ({"handshake_timeout": 0}, ValueError, "handshake_timeout is a finite number of seconds"),
]


@pytest.mark.parametrize(("options", "kind", "text"), BAD)
@pytest.mark.parametrize("make", [server_options, client_options])
def test_bad_input_is_an_error_that_names_the_fix(make, options, kind, text):
    with pytest.raises(kind, match=text) as caught:
        make(options)
    assert str(caught.value).startswith("startSSL()")


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"server_side": False}, ValueError, "server_side can only be True on a server"),
        ({"server_hostname": "localhost"}, ValueError, "server_hostname is the client's to say"),
        ({"check_hostname": True}, ValueError, "check_hostname is for clients"),
        ({"cert_reqs": ssl.CERT_REQUIRED}, ValueError, "give ca_certs"),
        ({"sni": ["a"]}, TypeError, "sni is a dict of names"),
        ({"sni": {"": {}}}, TypeError, "the keys of sni are names of hosts"),
        ({"sni": {7: {}}}, TypeError, "the keys of sni are names of hosts"),
        *(
            ({"sni": {name: {}}}, ValueError, "in sni is not the name of a host")
            for name in ("a..b", "*", "*.", "www.*.org", "a*.example", "127.0.0.1", "::1")
        ),
        ({"sni": {"a": {}}}, ValueError, r"sni\['a'\] needs a certificate"),
        ({"sni": {"a": 7}}, TypeError, r"sni\['a'\] is a dict of options or an ssl.SSLContext"),
        ({"sni": {"a": {"cert_reqs": 2}}}, TypeError, r"no option 'cert_reqs' of sni\['a'\]"),
    ],
)
def test_bad_input_of_a_server_is_an_error_that_names_the_fix(options, kind, text):
    with pytest.raises(kind, match=text):
        server_options(options)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"server_hostname": 7}, TypeError, "server_hostname is a str"),
        ({"server_hostname": ""}, ValueError, "server_hostname is the name of a host"),
        ({"server_hostname": ".a"}, ValueError, "server_hostname is the name of a host"),
        ({"check_hostname": 1}, TypeError, "check_hostname is True or False"),
        ({"check_hostname": True, "cert_reqs": ssl.CERT_NONE}, ValueError, "check_hostname needs a certificate to check"),
        ({"sni": {}}, ValueError, "sni is for servers"),
    ],
)
def test_bad_input_of_a_client_is_an_error_that_names_the_fix(options, kind, text):
    with pytest.raises(kind, match=text):
        client_options(options)


@pytest.mark.parametrize("name", ["certfile", "ca_certs", "ciphers", "alpn_protocols", "ssl_version", "cert_reqs", "check_hostname", "sni"])
def test_context_and_what_would_change_it_do_not_go_together(name):
    with pytest.raises(ValueError, match=f"{name} and context do not go together"):
        server_options({"context": server_context(), name: "x"})


@pytest.mark.parametrize("option", ["certfile", "ca_certs"])
def test_missing_file_is_an_error_that_names_it(option):
    with pytest.raises(FileNotFoundError, match=r"startSSL\(\): cannot read '/no/such.pem'"):
        client_options({option: "/no/such.pem"})


def test_missing_key_is_an_error_that_names_both_files(certificate):
    with pytest.raises(FileNotFoundError, match=r"such\.key"):
        server_options({**certificate, "keyfile": "/no/such.key"})


@pytest.mark.parametrize("option", ["certfile", "ca_certs"])
def test_file_with_nonsense_is_an_ssl_error_that_names_it(option, tmp_path):
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(ssl.SSLError, match=r"nonsense\.pem"):
        client_options({option: str(nonsense)})


def test_key_of_another_certificate_is_an_ssl_error(certificate):
    other = authority().issue("other.example")
    with pytest.raises(ssl.SSLError, match="a key that fits"):
        server_options({**certificate, "keyfile": other["keyfile"]})


def test_sni_context_that_asks_for_other_certificates_is_refused(certificate):
    asks = server_context()
    asks.load_verify_locations(authority().file)
    asks.verify_mode = ssl.CERT_REQUIRED
    with pytest.raises(ValueError, match="verify_mode of sni"):
        server_options({**certificate, "sni": {"a.example": asks}})


# ---- nothing of the caller's is changed


def test_options_are_not_changed(certificate):
    options = {**certificate, "alpn_protocols": ["a"], "sni": {"a.example": authority().issue("a.example")}}
    before = repr(options)
    server = Server(ssl_options=options)
    server.reload_certificates()
    server.close()
    assert repr(options) == before


def test_context_is_not_changed():
    context = client_context()
    before = (context.options, context.minimum_version, context.verify_mode, context.check_hostname, context.sni_callback)
    client = Client(ssl_options=context)
    assert client.ssl_enabled
    assert before == (context.options, context.minimum_version, context.verify_mode, context.check_hostname, context.sni_callback)
    client.close()


# ---- when certificates end


def test_expires_tells_the_end_of_the_first_certificate(certificate):
    assert expires(certificate["certfile"]) > 0


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_expires_is_none_if_there_is_no_certificate(tmp_path, content):
    path = tmp_path / "some.pem"
    if content is not None:
        path.write_bytes(content)
    assert expires(str(path)) is None
