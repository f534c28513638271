"""Tokens that authenticate callers, and the certificate that authenticates the server; read again on SIGHUP."""

from __future__ import annotations

import dataclasses
import hmac
import ssl
from pathlib import Path

import grpc

from brewjax.serve.callers import UNNAMED, Caller
from brewjax.serve.config import ServeConfig


@dataclasses.dataclass(frozen=True)
class _Secrets:
    """Contents of the files.

    Attributes:
      token: that every caller needs who has none of its own; None without one.
      callers: those with tokens of their own, with these.
      admin_token: that allows every call; None if Reload is refused to all.
      tls: private key and certificate, PEM; None without TLS.
    """

    token: str | None
    callers: tuple[tuple[str, Caller], ...]
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
        secrets = self._secrets
        return secrets.token is not None or (bool(secrets.callers) and not self._config.anonymous)

    def find_caller(self, authorization: str) -> Caller | None:
        """Finds who sends this `authorization` header: a caller who may make any call but Reload, Upsert and Delete.

        Returns:
          The caller; None if a token is needed, and this is none.
        """
        secrets = self._secrets
        for token, caller in secrets.callers:
            if _bears(authorization, token):
                return caller
        if not self.needs_token or (secrets.token is not None and _bears(authorization, secrets.token)):
            return UNNAMED
        return UNNAMED if self.may_reload(authorization) else None

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
    places: dict[str, str] = {}  # of each token, the setting that its file is named by
    token = _read_token(config, config.token_file, places, "token_file")
    callers = []
    for name, caller in config.callers.items():
        if caller_token := _read_token(config, caller.token_file, places, "callers", name, "token_file"):
            callers.append((caller_token, Caller(name, caller.share, caller.priority)))
    admin_token = _read_token(config, config.admin_token_file, places, "admin_token_file")
    return _Secrets(token, tuple(callers), admin_token, tls)


def _read_token(config: ServeConfig, path: str | None, places: dict[str, str], *location: str) -> str | None:
    """The token in a file, if there is one; adds its location to `places`, where no other file may have put it."""
    if not path:
        return None
    try:
        token = Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise config.error(f"{error}", *location) from None
    if not (token and token.isascii() and token.isprintable()):
        raise config.error(f"{path} holds no token: write one line of ASCII there", *location)
    if token in places:
        raise config.error(f"the same token as in {places[token]}: callers are known by their tokens", *location)
    places[token] = ".".join(location)
    return token
