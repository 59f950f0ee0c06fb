"""A few bytes of weights that lie on the Hub, by range requests."""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass, field

from mergekit_monosoup.errors import InputError


@dataclass(frozen=True)
class RemoteWeights:
    """The safetensors files of a repository, of which single ranges are read."""

    repo: str
    revision: str | None
    _starts: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def read(self, file: str, begin: int, length: int) -> bytes:
        """Return `length` bytes of a file's data, from the byte `begin` behind its header on.

        Raises:
            InputError: the Hub does not give them.
        """
        with self._lock:
            if file not in self._starts:
                (header,) = struct.unpack("<Q", self._range(file, 0, 8))
                self._starts[file] = 8 + header
        return self._range(file, self._starts[file] + begin, length)

    def _range(self, file: str, begin: int, length: int) -> bytes:
        from huggingface_hub import get_session, get_token, hf_hub_url

        from mergekit_monosoup.checkpoint.hub import connection_errors

        url = hf_hub_url(self.repo, file, revision=self.revision)
        headers = {"range": f"bytes={begin}-{begin + length - 1}"}
        if token := get_token():
            headers["authorization"] = f"Bearer {token}"
        broken: tuple[type[Exception], ...] = connection_errors()
        try:
            response = get_session().get(url, headers=headers)
        except broken as error:
            raise InputError(f"values of {self.repo} cannot be read from the Hub: {error}") from error
        if response.status_code != 206:
            raise InputError(f"values of {file} of {self.repo}: the Hub answers {response.status_code}")
        content: bytes = response.content
        if len(content) != length:
            raise InputError(
                f"the Hub gives {len(content)} bytes of {file} of {self.repo} where {length} were asked for"
            )
        return content
