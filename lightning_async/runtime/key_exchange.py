"""How rank 0 gives the run's token to the other ranks without saying it: Diffie-Hellman through the rendezvous.

Who reads the rendezvous (torch's store and process group, which protect nothing) learns public numbers only. Who can
change what is said there could take the place of a rank; a secret that is on every host beforehand
(`LIGHTNING_ASYNC_SECRET`) keeps that out, too. Pure: numbers and texts in, numbers and texts out.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

__all__ = ["KeyExchange", "KeyExchangeError"]

# The 2048-bit group 14 of RFC 3526, whose generator is 2.
_PRIME = int(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74"
    "020BBEA63B139B22514A08798E3404DDEF9519B3CD3A431B302B0A6DF25F1437"
    "4FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"
    "EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF05"
    "98DA48361C55D39A69163FA8FD24CF5F83655D23DCA3AD961C62F356208552BB"
    "9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B"
    "E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF695581718"
    "3995497CEA956AE515D2261898FA051015728E5A8AACAA68FFFFFFFFFFFFFFFF",
    16,
)
_GENERATOR = 2
_PRIVATE_BITS = 384
_MAX_TOKEN_BYTES = 32
_TAG_BYTES = 16


class KeyExchangeError(RuntimeError):
    """A token cannot be opened: the sides do not have the same secret, or what was said is not theirs."""


class KeyExchange:
    """One side of an exchange.

    Args:
        secret: what all sides know beforehand; empty if nothing.

    Examples:
        >>> mine, theirs = KeyExchange(), KeyExchange()
        >>> sealed = mine.seal("token", theirs.public)
        >>> "token" in sealed, theirs.open(sealed, mine.public)
        (False, 'token')
    """

    def __init__(self, secret: str = "") -> None:
        self._secret = secret.encode()
        self._private = secrets.randbits(_PRIVATE_BITS) | 1 << (_PRIVATE_BITS - 1)
        self.public = f"{pow(_GENERATOR, self._private, _PRIME):x}"

    def seal(self, token: str, public: str) -> str:
        """The token for the side whose public number this is.

        Raises:
            KeyExchangeError: if it is no such number.
        """
        data = token.encode()
        if len(data) > _MAX_TOKEN_BYTES:
            raise ValueError(f"a token has at most {_MAX_TOKEN_BYTES} bytes, not {len(data)}")
        key = self._key(public)
        mask = _derive(key, b"mask")
        sealed = bytes(ours ^ theirs for ours, theirs in zip(data, mask, strict=False))
        return (sealed + _derive(key, b"tag" + sealed)[:_TAG_BYTES]).hex()

    def open(self, sealed: str, public: str) -> str:
        """Inverse of `seal`, at the other side.

        Args:
            sealed: what it has returned.
            public: the public number of the side that has sealed it.

        Raises:
            KeyExchangeError: if it was not sealed for this side, or with another secret.
        """
        key = self._key(public)
        try:
            data = bytes.fromhex(sealed)
        except ValueError:
            data = b""
        hidden, tag = data[:-_TAG_BYTES], data[-_TAG_BYTES:]
        if not hidden or not hmac.compare_digest(tag, _derive(key, b"tag" + hidden)[:_TAG_BYTES]):
            raise KeyExchangeError("what rank 0 has sealed for this rank does not open")
        return bytes(ours ^ theirs for ours, theirs in zip(hidden, _derive(key, b"mask"), strict=False)).decode()

    def _key(self, public: str) -> bytes:
        try:
            theirs = int(public, 16)
        except ValueError:
            theirs = 0
        # The others would make a shared number that anyone can guess.
        if not 1 < theirs < _PRIME - 1:
            raise KeyExchangeError("a rank's part of the key exchange is no public number")
        shared = pow(theirs, self._private, _PRIME)
        both = ":".join(sorted((self.public, f"{theirs:x}"))).encode()
        return hmac.digest(self._secret or b"-", both + shared.to_bytes(256, "big"), "sha256")


def _derive(key: bytes, purpose: bytes) -> bytes:
    return hashlib.sha256(key + purpose).digest()
