"""How a QUIC connection begins and ends: the half of the engine that deals with handshake and errors.

The core does packets and the library's TLS the handshake; each is given here what the other made. Whatever
either of them raises ends this connection and nothing else.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

from qh3 import tls
from qh3._hazmat import QuicConnectionCore, pull_quic_header
from qh3.quic.crypto import CIPHER_SUITES
from qh3.quic.tls_bridge import QuicTlsBridgeError

from expressgateway.net.quic.credit import Credit, PacketSealer
from expressgateway.net.quic.events import (
    CRYPTO_BUFFER_EXCEEDED,
    INTERNAL_ERROR,
    Address,
    Ended,
    EngineOwner,
    EngineSink,
)
from expressgateway.net.quic.tls import PEER_CIDS, UNEXPECTED_MESSAGE, EngineTls, Settled, TlsSettings
from expressgateway.net.quic.unnamed import UnnamedClient
from expressgateway.wire.quic import RETRY, RETRY_TAG_BYTES, is_genuine_retry, read_long

log = logging.getLogger(__name__)

MAX_CRYPTO_BYTES: Final = 65_536  # of one peer's handshake: a chain of certificates is a few thousand
MAX_HANDSHAKE_DATAGRAMS: Final = 128
MAX_DATAGRAM_BYTES: Final = 1232  # what every IPv6 path carries (RFC 8200 5), and IPv4 ones do

_ENDLESS: Final = 1 << 60
_DATAGRAM_OVERHEAD_BYTES: Final = 1 + 20 + 4 + 16 + 1 + 2  # short header with the longest ID, tag, frame
_WAITING_WINDOWS: Final = 4  # of a connection: one is granted, the others are for copies and for being wrong
_LOCAL_CIDS: Final = 4  # for the peer to use; it must keep two at least
_FIXED_BIT: Final = 0x40
_INITIAL: Final = 0  # a packet number space
_CRYPTO_FRAME: Final = 0x6
_PADDING_FRAME: Final = 0x0


class Opening:
    """See the module's text. ``Engine`` is the other half."""

    __slots__ = (
        "_core",
        "_credit",
        "_crypto_bytes",
        "_datagram_bytes",
        "_ended",
        "_finished",
        "_handshake_datagrams",
        "_hello",
        "_is_client",
        "_is_over",
        "_is_told",
        "_most_waiting_bytes",
        "_original_cid",
        "_owner",
        "_peer_cid",
        "_peer_cid_bytes",
        "_polled",
        "_retry_cid",
        "_sealer",
        "_sent_head",
        "_settings",
        "_settled",
        "_tls",
        "_unasked",
        "_unnamed",
        "_waiting_bytes",
        "_waiting_since",
        "address",
        "cid",
        "is_open",
        "now",
        "sink",
    )

    def __init__(
        self,
        sink: EngineSink,
        owner: EngineOwner,
        settings: TlsSettings,
        address: Address,
        cid: bytes,
        now: float,
        *,
        version: int,
        original_cid: bytes,
        destination_cid: bytes | None = None,
        retry_cid: bytes | None = None,
        reset_token: bytes | None = None,
        is_unnamed: bool = False,
    ) -> None:
        """``cid``: ours, the first. Of a server's connection ``original_cid`` is what the client chose at the
        very first, ``destination_cid`` what its Initial now goes to, and ``retry_cid`` what our Retry made it
        use, which proves its address; ``is_unnamed``: its own ID is empty. A client chooses ``original_cid``
        at random."""
        # Wiring
        self.sink = sink
        self._owner = owner
        self._settings = settings
        self._is_client = settings.configuration.is_client
        self.cid = cid
        # Connection
        self.now = now
        self.address = address
        self.is_open = False
        self._ended: Ended | None = None  # as told
        self._is_over = False  # nothing more is received or sent
        self._original_cid = original_cid
        self._retry_cid = retry_cid
        self._sealer: PacketSealer | None = None
        self._peer_cid_bytes = -1  # of its first one; unknown yet
        self._peer_cid = b""  # that grants go to
        self._sent_head = b""  # of the last packet with a short header
        self._datagram_bytes = 0  # of the largest DATAGRAM's data that fits into a packet
        self._finished: set[int] = set()  # streams that have ended one way; as many as may be open
        self._polled = 0  # datagrams of the core and of ours: no packet number in use is higher
        self._unasked = 0  # datagrams sent that neither bytes to send nor packets received account for
        self._crypto_bytes = 0
        self._handshake_datagrams = 0
        self._hello = b""  # a client's, until the connection is open
        self._is_told = False  # the core, of what the peer grants
        grants = settings.grants
        self._credit = Credit(
            grants.stream_bytes, grants.connection_bytes, grants.first_bytes, is_client=self._is_client
        )
        self._waiting_bytes = 0  # a guess at what the core keeps because something before it is missing
        self._waiting_since = now  # seconds: when that was looked at
        self._most_waiting_bytes = _WAITING_WINDOWS * grants.connection_bytes
        self._unnamed = UnnamedClient(destination_cid or original_cid, cid) if is_unnamed else None
        self._core = self._make_core(version, b"" if is_unnamed else destination_cid or original_cid)
        if self._unnamed is not None:
            self._unnamed.install(self._core, version)
        self._settled: Settled | None = None  # in the place of the next, which is then gone
        self._tls = EngineTls(
            settings,
            version=version,
            local_initial_source_connection_id=cid,
            original_destination_connection_id=original_cid,
            retry_source_connection_id=retry_cid,
            stateless_reset_token=reset_token,
        )

    def _make_core(self, version: int, destination_cid: bytes) -> QuicConnectionCore:
        grants = self._settings.grants
        return QuicConnectionCore(
            self._is_client,
            version,
            ("0.0.0.0", 0),
            self.address,
            self.cid,
            destination_cid,
            self._is_client or self._retry_cid is not None,
            PEER_CIDS,
            MAX_DATAGRAM_BYTES,
            False,  # no path MTU discovery
            grants.idle_timeout_s,
            3,  # the ACK delay exponent
            grants.datagram_bytes or None,
            None,
            _ENDLESS,
            0,
            _ENDLESS,
            0,
            0,
            0,
            grants.stream_bytes,
            grants.streams,
            grants.unidirectional,
            0,
            0,
            0.333,  # RFC 9002 6.2.2
            0.025,
            self.now,
        )

    def _drain_core(self) -> None:
        """Tell what has happened."""
        raise NotImplementedError

    # -- the handshake ---------------------------------------------------------------------------------

    def connect(self) -> None:
        """A client's first flight."""
        self._guard(self._connect)

    def _connect(self) -> None:
        self._tls.start()
        self._drain_tls()

    @property
    def alpn(self) -> str:
        """What both agreed to speak."""
        return self._settled.alpn if self._settled is not None else self._tls.tls.alpn_negotiated or ""

    @property
    def sni(self) -> str | None:
        """The name that the client asked for."""
        return self._settled.sni if self._settled is not None else self._tls.sni

    @property
    def idle_timeout_s(self) -> float:
        """Silence after which the connection is over: the lower of what both said (RFC 9000 10.1)."""
        ours_s = self._settings.grants.idle_timeout_s
        if self._settled is not None:
            peers_ms = self._settled.max_idle_timeout_ms
        else:
            parameters = self._tls.remote_transport_parameters
            peers_ms = parameters.max_idle_timeout if parameters is not None else None
        return min(ours_s, peers_ms / 1000) if peers_ms else ours_s

    @property
    def is_resumed(self) -> bool:
        if self._settled is not None:
            return self._settled.is_resumed
        return bool(self._tls.tls.session_resumed)

    def _receive_handshake(self, data: bytes, address: Address) -> None:
        """Packet by packet: the keys of the next one in a datagram may be in the one before."""
        self._handshake_datagrams += 1
        if self._handshake_datagrams > MAX_HANDSHAKE_DATAGRAMS:
            self._close_transport(CRYPTO_BUFFER_EXCEEDED, "a handshake without end")
            return
        if self._is_client and self._receive_retry(data):
            return
        at = 0
        size = len(data)
        while at < size:
            try:
                end = pull_quic_header(data, at, len(self.cid))[9]
            except ValueError:
                end = size
            # Zeros behind the last packet count as received (RFC 9000 8.1): the core counts what it is given.
            if end <= at or (end < size and not data[end] & _FIXED_BIT):
                end = size
            packet = data[at:end]
            if self._unnamed is not None:
                packet = self._unnamed.readdressed(packet)
            report = self._core.receive_datagram(packet, address, self.now, size)
            if report[2]:
                header = read_long(packet)
                if header is not None and not self.is_open:
                    if header.source:
                        self._tls.remote_initial_source_connection_id = header.source
                    elif self._tls.remote_initial_source_connection_id is None:
                        self._tls.remote_initial_source_connection_id = b""
                    if self._peer_cid_bytes < 0:
                        self._peer_cid_bytes = len(header.source)
            self._drain_core()
            at = end

    def _receive_retry(self, data: bytes) -> bool:
        """A Retry (RFC 9000 17.2.5.2) begins the connection anew, with the same first message and the packet
        numbers going on; a second one is dropped."""
        header = read_long(data)
        if header is None or header.type != RETRY:
            return False
        if (
            self._retry_cid is None
            and header.destination == self.cid
            and not self._core.received_authenticated_packet
            and header.version == self._core.version
            and is_genuine_retry(data, header, self._original_cid)
        ):
            self._retry_cid = self._tls.retry_source_connection_id = header.source
            self._core = core = self._make_core(header.version, header.source)
            core.restore_send_packet_number(_INITIAL, self._polled)
            core.set_initial_token(data[header.end : -RETRY_TAG_BYTES])
            core.send_crypto(int(tls.Epoch.INITIAL), 0, self._hello)
        return True

    def _receive_crypto(self, epoch: int, offset: int, data: bytes) -> None:
        self._crypto_bytes += len(data)
        if self._crypto_bytes > MAX_CRYPTO_BYTES:
            self._close_transport(CRYPTO_BUFFER_EXCEEDED, "a handshake too long", _CRYPTO_FRAME)
            return
        if self._settled is not None:
            # RFC 9001 4.1.3, 6: no message of a client may come here, also not KeyUpdate.
            self._close_transport(UNEXPECTED_MESSAGE, "a TLS message after the handshake", _CRYPTO_FRAME)
            return
        try:
            self._tls.receive(epoch, data, offset, self._core.version)
            self._drain_tls()
        except QuicTlsBridgeError as error:
            self._close_transport(error.error_code, error.reason_phrase, int(error.frame_type))

    def _drain_tls(self) -> None:
        bridge = self._tls
        core = self._core
        if core.version != bridge.version:
            core.set_version(bridge.version)  # RFC 9368: a compatible version was agreed on
            if self._unnamed is not None:
                self._unnamed.install(core, bridge.version)
        while (secret := bridge.next_traffic_secret()) is not None:
            if secret.epoch == tls.Epoch.ZERO_RTT:
                continue  # never decrypted
            is_ours = secret.direction == tls.Direction.ENCRYPT
            if is_ours and secret.epoch == tls.Epoch.ONE_RTT:
                self._sealer = PacketSealer(secret)
            protection, aead = CIPHER_SUITES[secret.cipher_suite]
            core.install_packet_key(
                "send" if is_ours else "receive",
                int(secret.epoch),
                (aead.decode(), protection.decode()),
                secret.key,
                secret.iv,
                secret.hp,
                0,
                secret.secret,
                secret.version,
            )
        while (crypto := bridge.next_crypto_data()) is not None:
            if self._is_client and crypto.epoch == tls.Epoch.INITIAL:
                self._hello += crypto.data
            core.send_crypto(int(crypto.epoch), crypto.offset, crypto.data)
        parameters = bridge.remote_transport_parameters
        if parameters is not None and not self._is_told:
            self._is_told = True
            packet_bytes = min(MAX_DATAGRAM_BYTES, parameters.max_udp_payload_size or MAX_DATAGRAM_BYTES)
            # What fits into none would be in the way of all the others, for ever.
            self._datagram_bytes = packet_bytes - _DATAGRAM_OVERHEAD_BYTES
            core.apply_peer_transport_parameters(
                parameters.initial_max_data or 0,
                parameters.initial_max_stream_data_bidi_local or 0,
                parameters.initial_max_stream_data_bidi_remote or 0,
                parameters.initial_max_stream_data_uni or 0,
                parameters.initial_max_streams_bidi or 0,
                parameters.initial_max_streams_uni or 0,
                3 if parameters.ack_delay_exponent is None else parameters.ack_delay_exponent,
                0.025 if parameters.max_ack_delay is None else parameters.max_ack_delay / 1000,
                parameters.max_idle_timeout / 1000 if parameters.max_idle_timeout else None,
                parameters.max_datagram_frame_size,
                parameters.stateless_reset_token,
                min(parameters.active_connection_id_limit or 2, _LOCAL_CIDS),
                bool(parameters.disable_active_migration),
                parameters.max_udp_payload_size,
            )
        while bridge.next_event() is not None:
            pass
        if bridge.handshake_complete and not self.is_open and self._ended is None:
            self.is_open = True
            self._hello = b""
            self._unnamed = None
            core.handshake_complete()
            if not self._is_client:
                self._settled = Settled(bridge)
                del self._tls
            self.sink.on_open()

    # -- the end ---------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Closed, and no longer answering for it: it can be forgotten."""
        return self._is_over

    @property
    def ended(self) -> Ended | None:
        """Why it is over, as soon as that is decided; packets may still be answered with the close."""
        return self._ended

    def _close_transport(self, code: int, reason: str, frame_type: int = _PADDING_FRAME) -> None:
        self._end(Ended(code, reason, is_ours=True), frame_type)

    def _end(self, ended: Ended, frame_type: int | None) -> None:
        if self._ended is not None:
            return
        self._ended = ended
        self._guard(self._core.close, ended.code, frame_type, ended.reason.encode()[:200])
        self.sink.on_ended(ended)

    def _guard(self, call: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - what it gives
        try:
            return call(*arguments)
        except BaseException as error:  # noqa: BLE001 - as in receive
            self._fail(error)
            return None

    def _fail(self, error: BaseException) -> None:
        """The library raised. The peer made it, or we did: in any case this connection is over."""
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        if self._ended is not None:
            self._is_over = True
            return
        log.warning("a QUIC connection was closed: the transport failed", exc_info=error)
        self._ended = ended = Ended(INTERNAL_ERROR, f"the transport failed: {error!r}", is_ours=True)
        try:
            self._core.close(INTERNAL_ERROR, _PADDING_FRAME, b"")
        except BaseException as again:
            if not isinstance(again, Exception) and type(again).__name__ != "PanicException":
                raise
            self._is_over = True
        self.sink.on_ended(ended)

    def _tell(self, ended: Ended) -> None:
        if self._ended is None:
            self._ended = ended
            self.sink.on_ended(ended)
