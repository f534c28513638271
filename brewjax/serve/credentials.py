"""Tokens that authenticate callers, and the certificate that authenticates the server; read again on SIGHUP."""

from __future__ import annotations

import dataclasses
import hmac
import ssl
from pathlib import Path

import grpc

from brewjax.serve.config import ServeConfig


@dataclasses.dataclass(frozen=True)
class _Secrets:
    """Contents of the files.

    Attributes:
      token: that every caller needs; None if callers need none.
      admin_token: that allows every call; None if Reload is refused to all.
      tls: private key and certificate, PEM; None without TLS.
    """

    token: str | None
    admin_token: str | None
    tls: tuple[bytes, bytes] | None


class Credentials:
    """The tokens and the certificate of a server. `read_again` replaces them while the server runs.

    Raises ConfigError, naming the setting, for a file that cannot be used.

    Attributes:
      ssl_context: of HTTP; None without TLS. New handshakes use the certificate that was read last.
    """

    def __init__(self, config: ServeConfig):
        self._config = config
        self._secrets = _read(config)
        self.ssl_context: ssl.SSLContext | None = None
        if config.tls_cert and config.tls_key:
            self.ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.ssl_context.load_cert_chain(config.tls_cert, config.tls_key)

    def read_again(self) -> None:
        """Reads the files again. Raises ConfigError, naming a file that cannot be used; the old ones stay in use."""
        self._secrets = _read(self._config)  # checks that certificate and key belong together
        if self.ssl_context and self._config.tls_cert:
            self.ssl_context.load_cert_chain(self._config.tls_cert, self._config.tls_key)

    @property
    def needs_token(self) -> bool:
        """Whether callers need a token."""
        return self._secrets.token is not None

    def may_call(self, authorization: str) -> bool:
        """Whether a caller with this `authorization` header may make any call but Reload."""
        secrets = self._secrets
        return secrets.token is None or _bears(authorization, secrets.token) or self.may_reload(authorization)

    def may_reload(self, authorization: str) -> bool:
        """Whether a caller with this `authorization` header may call Reload."""
        admin_token = self._secrets.admin_token
        return admin_token is not None and _bears(authorization, admin_token)

    def for_grpc(self) -> grpc.ServerCredentials | None:
        """gRPC's TLS credentials, which read the certificate at every handshake. None without TLS."""
        if self._secrets.tls is None:
            return None

        def current() -> grpc.ServerCertificateConfiguration:
            assert self._secrets.tls
            return grpc.ssl_server_certificate_configuration([self._secrets.tls])

        return grpc.dynamic_ssl_server_credentials(current(), current)


def _bears(authorization: str, token: str) -> bool:
    scheme, _, credentials = authorization.strip().partition(" ")  # "Bearer" in any case: RFC 9110, 11.1
    return scheme.lower() == "bearer" and hmac.compare_digest(credentials.strip().encode(), token.encode())


def _read(config: ServeConfig) -> _Secrets:
    """Reads the files. Raises ConfigError for one that cannot be used."""
    tls = None
    if config.tls_cert and config.tls_key:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
            tls = Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes()
        except OSError as error:  # SSLError is one
            raise config.error(f"{error}", "tls_cert") from None
    secrets = _Secrets(_read_token(config, "token_file"), _read_token(config, "admin_token_file"), tls)
    if secrets.token and secrets.token == secrets.admin_token:
        raise config.error("the same token as in token_file: every caller could reload", "admin_token_file")
    return secrets


def _read_token(config: ServeConfig, key: str) -> str | None:
    path = getattr(config, key)
    if not path:
        return None
    try:
        token = Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise config.error(f"{error}", key) from None
    if not (token and token.isascii() and token.isprintable()):
        raise config.error(f"{path} holds no token: write one line of ASCII there", key)
    return token
