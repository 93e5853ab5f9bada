"""Backends, from the model to the settings that both the supervisor and its workers go by."""

from collections.abc import Mapping

from expressgateway.config.pools import Backend as BackendConfig
from expressgateway.upstream.backend import BackendSettings, TlsSettings

Files = Mapping[str, bytes]


def backend_settings(backend: BackendConfig, files: Files) -> BackendSettings:
    """``files``: the contents of what the backend names, by path."""
    tls = None
    if backend.tls:
        tls = TlsSettings(
            verify_peer=backend.tls_verify_peer,
            hostname=backend.tls_verify_hostname or "",
            ca_pem=files[str(backend.tls_ca_path)] if backend.tls_ca_path is not None else None,
            cert_pem=files[str(backend.tls_cert_path)] if backend.tls_cert_path is not None else None,
            key_pem=files[str(backend.tls_key_path)] if backend.tls_key_path is not None else None,
        )
    return BackendSettings(
        id=backend.id,
        host=backend.address.host,
        port=backend.address.port,
        protocol=backend.protocol,
        weight=backend.weight,
        tls=tls,
        send_proxy=backend.send_proxy,
    )
