"""TLS to brokers and servers: certificates are verified, host names too, and nothing turns that off.

context = tls_context("output 'mqtts://broker/line1'", {"ca": "/etc/line/ca.pem"})
"""

from __future__ import annotations

import ssl
from urllib.parse import unquote

from recontrast_edge.errors import InputError, UsageError

TLS_OPTIONS = ("ca", "cert", "key")
"""Paths of PEM files. ``ca``: certificates to trust instead of the system's; ``cert``, ``key``: our own."""


def tls_context(what: str, options: dict[str, str]) -> ssl.SSLContext:
    """A client's context from the options of a URI.

    Raises:
        UsageError: ``cert`` without ``key``, or the other way round.
        InputError: a file that cannot be used.
    """
    ca, cert, key = (unquote(options[name]) if name in options else None for name in TLS_OPTIONS)
    if (cert is None) != (key is None):
        raise UsageError(f"{what}: cert and key belong together; give both or neither")
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise InputError(f"{what}: {ca} holds no certificates that can be read ({error})") from None
    if cert is not None:
        try:
            # The password keeps OpenSSL from asking for one on the terminal.
            context.load_cert_chain(cert, key, password="")
        except OSError as error:
            raise InputError(
                f"{what}: expected a certificate in {cert} and its key, not encrypted, in {key} ({error})"
            ) from None
    return context
